"""Contrast across processes, held against one process with all the rows.

Each number of ranks is one set of real processes: this file, run as a script, which does what the tests send it and
answers with what came of it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mixcl_dist.kernels import MixedContrastiveLoss, distributed, mixed_contrastive_loss, tiled

ROWS = 96
BLOCK = 16  #: so that few rows make many tiles
OF_ROWS = ("embeddings", "identity", "candidate_set", "group", "row_weight")
TABLE = torch.cat([torch.eye(4), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])]).bool()
ALL_ON = {"identity_weight": 1.0, "label_weight": 0.7}
SPLITS = {
    "even": lambda ranks: [ROWS // ranks] * ranks,
    "uneven": lambda ranks: [*(7 * rank + 5 for rank in range(ranks - 1)), ROWS - sum(range(5, 7 * ranks - 7, 7))],
    "one empty": lambda ranks: [0 if rank == ranks // 2 else ROWS // max(ranks - 1, 1) for rank in range(ranks)],
    "all on one": lambda ranks: [*[0] * (ranks - 1), ROWS],
}

#: How a tensor of the answer comes near to float64 of the rounded embeddings: outputs, and gradients in their norm.
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-4, 3e-3)}

SLOW = pytest.mark.slow  # four processes take longer to start than all tests of two
gather_and_ring = pytest.mark.parametrize("ring", [False, True], ids=["gather", "ring"])


# What a rank does


def contrast(arguments: dict, *, group: str = "all", ring: bool = False, backward: bool = True, upstream=1.0) -> dict:
    """Outputs and gradients of the rank's rows."""
    distributed.RING_ABOVE = -1 if ring else 2**40
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("embeddings", "temperature")}
    out = mixed_contrastive_loss(**arguments | leaves, process_group=GROUPS[group])
    if backward:
        (upstream * out.loss).backward()
    return out._asdict() | {"loss": out.loss.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


def contrast_in_two_groups(arguments: dict, groups: tuple[str, str]) -> torch.Tensor:
    """The gradient of one loss in each of two groups, both forward passes before the first backward."""
    leaf = arguments["embeddings"].clone().requires_grad_()
    losses = [
        mixed_contrastive_loss(**arguments | {"embeddings": leaf}, process_group=GROUPS[group]).loss
        / GROUPS[group].size()
        for group in groups
    ]
    return torch.autograd.grad(sum(losses), leaf)[0]


def train(inputs: torch.Tensor, arguments: dict, *, compiled: bool = False) -> dict:
    """Gradients of a network's parameters, averaged by DDP."""
    network = network_with_loss(GROUPS["all"])
    wrapped = DistributedDataParallel(
        torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
    )
    wrapped(inputs, arguments).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def network_with_loss(process_group) -> nn.Module:
    torch.manual_seed(0)
    return NetworkWithLoss(process_group).double()


class NetworkWithLoss(nn.Module):
    def __init__(self, process_group) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 8)
        self.loss = MixedContrastiveLoss(TABLE, learnable_temperature=True, label_weight=0.7)
        self.process_group = process_group

    def forward(self, inputs: torch.Tensor, arguments: dict) -> torch.Tensor:
        rows = normalize(self.layer(inputs), dim=1)
        return self.loss(rows, **arguments, process_group=self.process_group).loss


def make_group(name: str, ranks: list[int], seconds: float = 300) -> None:
    group = dist.new_group(ranks, timeout=timedelta(seconds=seconds))
    if dist.get_rank() in ranks:
        GROUPS[name] = group


def walk_the_ring(rows: torch.Tensor, seconds_a_block: float) -> list:
    """Whose rows come, and the rows after a while of work on them."""
    distributed.RING_ABOVE = -1
    blocks = []
    for index, block in distributed.Peers(GROUPS["all"], rows, {}).blocks(rows):
        time.sleep(seconds_a_block)
        blocks.append((index.start, index.stop, block.clone()))
    return blocks


def ring_diary(rows: torch.Tensor) -> list[str]:
    """What happens on a ring, in order."""
    distributed.RING_ABOVE = -1
    diary = []
    begin = dist.batch_isend_irecv

    class Transfer:
        def __init__(self, works):
            self.works = works

        def wait(self):
            diary.append("arrived")
            for work in self.works:  # all of them: what is left under way would meet the next test
                work.wait()

    def record(operations):
        diary.append("under way")
        return [Transfer(begin(operations))]

    dist.batch_isend_irecv = record
    try:
        for _ in distributed.Peers(GROUPS["all"], rows, {}).blocks(rows):
            diary.append("sweep")
    finally:
        dist.batch_isend_irecv = begin
    return diary


def largest_allocation(arguments: dict, *, ring: bool) -> int:
    """Bytes of the largest tensor that the loss and its backward make, apart from tiles."""
    tiled.BLOCK = 256
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contrast(arguments, ring=ring)
    tiled.BLOCK = BLOCK
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def count_keys_of_store() -> int:
    return GROUPS["all"].get_group_store().num_keys()


# Processes


GROUPS: dict[str, dist.ProcessGroup] = {}


def serve(rank: int, size: int, port: int) -> None:
    """Do what comes in, until nothing more comes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    tiled.BLOCK = BLOCK
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    GROUPS["all"] = dist.group.WORLD
    with contextlib.suppress(EOFError):  # nobody sends any more
        while True:
            name, arguments = pickle.load(requests)
            try:
                answer = globals()[name](**arguments)
            except Exception as error:
                answer = error if type(error) in (ValueError, TimeoutError) else RuntimeError(repr(error))
            pickle.dump(answer, answers)
            answers.flush()


class Ranks:
    """Processes that do the same with their own arguments each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size), str(self.store.port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for rank in range(size)
        ]

    def __call__(self, function, arguments: list[dict] | dict[int, dict] | None = None, **common) -> list:
        """Each rank's value or error, in the order of ranks; ``arguments`` of some ranks leave the others idle."""
        if arguments is None:
            arguments = [{}] * self.size
        own = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
        for rank, values in own.items():
            self.send(rank, function, **values, **common)
        return [self.receive(rank) for rank in own]

    def send(self, rank: int, function, **arguments) -> None:
        pickle.dump((function.__name__, arguments), self.processes[rank].stdin)
        self.processes[rank].stdin.flush()

    def receive(self, rank: int):
        try:
            return pickle.load(self.processes[rank].stdout)
        except EOFError:
            raise AssertionError(f"rank {rank} is gone") from None

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # they hold nothing, and would take seconds to leave by themselves
            process.communicate()


@pytest.fixture(scope="module", params=[1, 2, *(pytest.param(size, marks=SLOW) for size in (3, 4))])
def ranks(request):
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def with_ranks(size: int):
    return pytest.mark.parametrize("ranks", [pytest.param(size, marks=SLOW if size > 2 else ())], indirect=True)


# Rows and the truth


def rows(
    n: int = ROWS, d: int = 8, *, dtype=torch.float64, seed: int = 0, group: bool = True, weight: bool = True
) -> dict:
    """Rows of four classes, some only partly known, with twins, groups and weights."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    return ALL_ON | {
        "embeddings": normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype),
        "identity": integers(-1, max(n // 3, 1)),
        "candidate_set": integers(0, len(TABLE)),
        "set_table": TABLE,
        "group": integers(-1, max(n // 8, 1)) if group else None,
        "row_weight": torch.rand(n, generator=generator, dtype=torch.float64) if weight else None,
        "temperature": torch.tensor(0.1, dtype=torch.float64),
    }


def split(arguments: dict, counts: list[int]) -> list[dict]:
    """Each rank's arguments."""
    parts = {
        name: values.split(counts) if name in OF_ROWS and values is not None else [values] * len(counts)
        for name, values in arguments.items()
    }
    return [{name: values[rank] for name, values in parts.items()} for rank in range(len(counts))]


def one_process(arguments: dict) -> dict:
    GROUPS["all"] = None
    arguments = arguments | {"embeddings": arguments["embeddings"].double(), "implementation": "reference"}
    return contrast(arguments)


def gradient(arguments: dict) -> torch.Tensor:
    return one_process(arguments)["d_embeddings"]


def assert_equal_to_one_process(answers: list, arguments: dict, dtype: torch.dtype = torch.float64) -> None:
    """All ranks have the outputs of one process, and the mean of their gradients is its gradient."""
    assert not any(isinstance(answer, Exception) for answer in answers), answers
    want = one_process(arguments)
    near, gradient_near = TOLERANCE[dtype]
    got = {name: [answer[name] for answer in answers] for name in want}
    together = {
        "lse": torch.cat(got.pop("lse"), dim=1),
        "d_embeddings": torch.cat(got.pop("d_embeddings")) / len(answers),
        "d_temperature": torch.stack(got.pop("d_temperature")).mean(0),
    }
    for name, values in got.items():
        assert all(torch.equal(value, values[0]) or value.isnan() for value in values), f"{name} differs between ranks"
        together[name] = values[0]
    for name, value in together.items():
        tolerance = gradient_near if name == "d_temperature" else near
        if name == "d_embeddings":
            assert (value.double() - want[name]).norm() <= gradient_near * want[name].norm(), name
        else:
            torch.testing.assert_close(
                value.double(), want[name].double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
            )


# Equality with one process


@gather_and_ring
@pytest.mark.parametrize("how", SPLITS)
def test_equals_one_process(ranks, how, ring):
    arguments = rows(sum(SPLITS[how](ranks.size)))
    answers = ranks(contrast, [{"arguments": own} for own in split(arguments, SPLITS[how](ranks.size))], ring=ring)
    assert_equal_to_one_process(answers, arguments)


@with_ranks(4)
@gather_and_ring
@pytest.mark.parametrize("weights", [(1.0, 0.7), (2.0, 0.0), (0.0, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize(("group", "weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_argument_on_and_off(ranks, group, weight, weights, ring):
    arguments = rows(group=group, weight=weight) | {"identity_weight": weights[0], "label_weight": weights[1]}
    parts = split(arguments, SPLITS["uneven"](ranks.size))
    assert_equal_to_one_process(ranks(contrast, [{"arguments": own} for own in parts], ring=ring), arguments)


@with_ranks(2)
@gather_and_ring
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_and_dtype(ranks, dtype, implementation, ring):
    arguments = rows(d=16, dtype=dtype)
    arguments["temperature"] = arguments["temperature"].float()
    parts = split(arguments, SPLITS["uneven"](2))
    answers = ranks(contrast, [{"arguments": own | {"implementation": implementation}} for own in parts], ring=ring)
    assert answers[0]["d_embeddings"].dtype == dtype
    assert_equal_to_one_process(answers, arguments, dtype)


@with_ranks(2)
@gather_and_ring
def test_no_rows_at_all(ranks, ring):
    answers = ranks(contrast, [{"arguments": rows(0)}] * 2, ring=ring)
    assert_equal_to_one_process(answers, rows(0))


@with_ranks(4)
def test_rows_without_anchors_have_loss_zero(ranks):
    arguments = rows() | {"identity": torch.full((ROWS,), -1), "candidate_set": torch.full((ROWS,), 4)}
    answers = ranks(contrast, [{"arguments": own} for own in split(arguments, SPLITS["even"](ranks.size))])
    assert_equal_to_one_process(answers, arguments)
    assert all(answer["loss"] == 0 and not answer["d_embeddings"].any() for answer in answers)


@with_ranks(4)
@gather_and_ring
@pytest.mark.parametrize("seen", [True, False])
def test_an_embedding_that_is_not_finite_makes_the_loss_nan_on_every_rank(ranks, seen, ring):
    arguments = rows()
    if not seen:  # no row is a partner or a negative of another
        arguments |= {"identity": torch.full((ROWS,), -1), "group": torch.zeros(ROWS, dtype=torch.int64)}
        arguments["candidate_set"] = torch.full((ROWS,), 4)
    arguments["embeddings"][3, 2] = torch.inf
    parts = split(arguments, SPLITS["even"](ranks.size))
    assert all(answer["loss"].isnan() for answer in ranks(contrast, [{"arguments": own} for own in parts], ring=ring))


@with_ranks(2)
def test_non_contiguous_embeddings_travel_on_the_ring(ranks):
    arguments = rows()
    parts = split(arguments, SPLITS["even"](2))
    for own in parts:
        own["embeddings"] = own["embeddings"].T.contiguous().T
    assert_equal_to_one_process(ranks(contrast, [{"arguments": own} for own in parts], ring=True), arguments)


def test_a_network_under_ddp_gets_the_gradient_of_one_process(ranks):
    assert_trains_as_one_process(ranks, compiled=False)


@pytest.mark.parametrize("ranks", [1, 2], indirect=True)
def test_a_compiled_network_gets_the_same(ranks):
    assert_trains_as_one_process(ranks, compiled=True)


def assert_trains_as_one_process(ranks, *, compiled: bool) -> None:
    arguments = {name: values for name, values in rows().items() if name in OF_ROWS[1:]}
    inputs = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = split(arguments, SPLITS["uneven"](ranks.size))
    own_inputs = inputs.split(SPLITS["uneven"](ranks.size))
    network = network_with_loss(None)
    network(inputs, arguments).backward()
    calls = [{"inputs": mine, "arguments": own} for mine, own in zip(own_inputs, parts, strict=True)]
    for answer in ranks(train, calls, compiled=compiled):
        assert not isinstance(answer, Exception), answer
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(answer[name], parameter.grad, rtol=1e-9, atol=1e-11)


# Groups


@with_ranks(4)
@gather_and_ring
def test_groups_of_some_ranks_contrast_among_themselves(ranks, ring):
    for name, members in (("front", [0, 2]), ("back", [3, 1])):
        assert ranks(make_group, name=name, ranks=members) == [None] * 4
    batches = {"front": rows(40, seed=1), "back": rows(60, seed=2)}
    front, back = (split(batch, [len(batch["identity"]) - 25, 25]) for batch in batches.values())
    own = [(front[0], "front"), (back[0], "back"), (front[1], "front"), (back[1], "back")]
    answers = ranks(contrast, [{"arguments": part, "group": group} for part, group in own], ring=ring)
    assert_equal_to_one_process(answers[::2], batches["front"])
    assert_equal_to_one_process(answers[1::2], batches["back"])


@with_ranks(4)
def test_a_rank_may_be_under_way_in_two_groups(ranks):
    for name, members in (("first two", [0, 1]), ("last two", [2, 3])):
        ranks(make_group, name=name, ranks=members)
    arguments = rows()
    parts = split(arguments, [24] * 4)
    pair = ["first two", "first two", "last two", "last two"]
    answers = ranks(
        contrast_in_two_groups, [{"arguments": p, "groups": ("all", name)} for p, name in zip(parts, pair, strict=True)]
    )
    halves = [gradient(half) for half in split(arguments, [48, 48])]
    torch.testing.assert_close(torch.cat(answers), gradient(arguments) + torch.cat(halves), rtol=1e-9, atol=1e-11)


@with_ranks(2)
def test_a_process_outside_of_the_group_is_refused(ranks):
    with pytest.raises(ValueError, match="process_group: expected a group that this process is in, got -100"):
        mixed_contrastive_loss(**rows(), process_group=dist.GroupMember.NON_GROUP_MEMBER)


@with_ranks(2)
def test_the_reference_is_refused(ranks):
    for error in ranks(contrast, [{"arguments": rows() | {"implementation": "reference"}}] * 2):
        assert isinstance(error, ValueError) and '"reference" is for one process' in str(error)


# Bits


@with_ranks(4)
@gather_and_ring
def test_two_runs_give_the_same_bits(ranks, ring):
    parts = [{"arguments": own} for own in split(rows(dtype=torch.float32), SPLITS["uneven"](ranks.size))]
    first, second = (ranks(contrast, parts, ring=ring) for _ in range(2))
    for before, after in zip(first, second, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(answer["loss"], first[0]["loss"]) for answer in first)


# Ranks that do not fit together

SHORT = 5  #: seconds, of which a busy machine may need some to let all others enter


def assert_missing(answers: list, who: str) -> None:
    for answer in answers:
        assert isinstance(answer, TimeoutError), answer
        assert f"process_group: waited 0:00:05 for rank {who} to call" in str(answer)


@with_ranks(4)
@pytest.mark.parametrize("absent", [[2], [0], [1, 3]])
def test_ranks_that_do_not_enter_are_named(ranks, absent):
    ranks(make_group, name="short", ranks=[0, 1, 2, 3], seconds=SHORT)
    parts = [{"arguments": own, "group": "short"} for own in split(rows(), [24] * 4)]
    started = time.monotonic()
    answers = ranks(contrast, {rank: part for rank, part in enumerate(parts) if rank not in absent})
    assert time.monotonic() - started > SHORT - 0.5
    assert_missing(answers, f"{', '.join(map(str, absent))} of 4")

    # Who comes late hears of it at once, and what all of them call next fits together again.
    late = ranks(contrast, {rank: parts[rank] for rank in absent})
    assert_missing(late, f"{', '.join(map(str, absent))} of 4")
    assert_equal_to_one_process(ranks(contrast, parts), rows())


@with_ranks(4)
def test_a_rank_that_skips_the_backward_is_named(ranks):
    ranks(make_group, name="short", ranks=[0, 1, 2, 3], seconds=SHORT)
    parts = [{"arguments": own, "group": "short"} for own in split(rows(), [24] * 4)]
    answers = ranks(contrast, [part | {"backward": rank != 1} for rank, part in enumerate(parts)])
    assert answers[1]["d_embeddings"] is None
    assert_missing([answers[0], *answers[2:]], "1 of 4")


@with_ranks(4)
def test_ranks_of_a_group_are_named_by_their_rank_in_it(ranks):
    ranks(make_group, name="short pair", ranks=[1, 3], seconds=SHORT)
    answers = ranks(contrast, {1: {"arguments": rows(), "group": "short pair"}})
    assert_missing(answers, "1 of 2")


DIFFERING = {
    "D": ({"embeddings": rows(d=7)["embeddings"]}, "D is 8 on rank 0 and 7 on rank 1"),
    "dtype": (
        {"embeddings": rows(dtype=torch.float32)["embeddings"]},
        "dtype is torch.float64 on rank 0 and torch.float32",
    ),
    "weights": ({"identity_weight": 0.5}, "identity_weight is 1.0 on rank 0 and 0.5 on rank 1"),
    "label weights": ({"label_weight": 0.0}, "label_weight is 0.7 on rank 0 and 0.0 on rank 1"),
    "sets": ({"set_table": torch.ones(6, 9).bool()}, "set_table is of shape (6, 4), checksum"),
    "classes of a set": ({"set_table": TABLE.flip(0)}, "set_table is of shape (6, 4), checksum"),
    "group": ({"group": None}, "group is given on rank 0 and None on rank 1"),
    "temperature": ({"temperature": torch.tensor(0.2)}, "temperature is 0.1 on rank 0 and 0.2"),
    "implementation": ({"implementation": "triton"}, "implementation is tiled on rank 0 and triton on rank 1"),
}


@with_ranks(2)
@pytest.mark.parametrize("what", DIFFERING)
def test_ranks_that_disagree_are_told_both_values(ranks, what):
    change, message = DIFFERING[what]
    arguments = rows()
    if what == "implementation":  # Triton takes no float64
        arguments["embeddings"] = arguments["embeddings"].float()
    errors = ranks(contrast, [{"arguments": arguments}, {"arguments": arguments | change}])
    for error in errors:
        assert isinstance(error, ValueError), error
        assert f"process_group: {message}" in str(error)
    agreed = rows()
    parts = split(agreed, [48, 48])
    assert_equal_to_one_process(ranks(contrast, [{"arguments": own} for own in parts]), agreed)


@with_ranks(2)
def test_a_rank_in_the_forward_does_not_meet_one_in_the_backward(ranks):
    parts = split(rows(), [48, 48])
    ranks.send(0, contrast, arguments=parts[0])
    ranks.send(1, contrast, arguments=parts[1], backward=False)
    ranks.receive(1)
    ranks.send(1, contrast, arguments=parts[1])
    for error in (ranks.receive(0), ranks.receive(1)):
        assert isinstance(error, ValueError)
        assert "pass is backward on rank 0 and forward on rank 1" in str(error)


@with_ranks(2)
def test_the_gradients_that_come_to_the_loss_have_to_be_equal(ranks):
    parts = split(rows(), [48, 48])
    answers = ranks(contrast, [{"arguments": own, "upstream": 1.0 + rank} for rank, own in enumerate(parts)])
    for error in answers:
        assert isinstance(error, ValueError) and "upstream gradient is 1.0 on rank 0 and 2.0 on rank 1" in str(error)


@with_ranks(2)
def test_calls_leave_nothing_behind_in_the_store(ranks):
    parts = [{"arguments": own} for own in split(rows(), [48, 48])]
    ranks(contrast, parts)
    before = ranks(count_keys_of_store)
    for _ in range(10):
        ranks(contrast, parts)
    assert max(ranks(count_keys_of_store)) <= max(before)


# The ring


@with_ranks(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_come_round_whole_while_ranks_are_slow(ranks, dtype):
    """A slow rank works on a block while others have long sent it the next one."""
    counts = [5, 0, 3, 4]
    batch = torch.arange(12 * 6).view(12, 6).to(dtype)
    pieces = batch.split(counts)
    answers = ranks(walk_the_ring, [{"rows": pieces[rank], "seconds_a_block": 0.05 * (rank % 3)} for rank in range(4)])
    starts = [0, 5, 5, 8]
    for rank, blocks in enumerate(answers):
        owners = [(rank - hop) % 4 for hop in range(4)]
        for owner, (start, stop, block) in zip(owners, blocks, strict=True):
            assert (start, stop) == (starts[owner], starts[owner] + counts[owner])
            assert block.dtype == dtype and torch.equal(block, pieces[owner])


@with_ranks(4)
def test_the_ring_rounds_the_gradient_once(ranks):
    arguments = rows(400, 32, dtype=torch.bfloat16)
    parts = [{"arguments": own} for own in split(arguments, [100] * 4)]
    want = gradient(arguments)
    at_once, block_by_block = (
        (torch.cat([answer["d_embeddings"] for answer in ranks(contrast, parts, ring=ring)]) / 4 - want).norm()
        for ring in (False, True)
    )
    assert block_by_block < 1.05 * at_once


@with_ranks(4)
def test_the_next_block_is_under_way_while_one_is_swept(ranks):
    for diary in ranks(ring_diary, [{"rows": torch.ones(4, 2)}] * 4):
        assert diary == ["under way", "sweep", "arrived"] * 3 + ["sweep"]


@with_ranks(4)
def test_no_rank_on_the_ring_holds_the_rows_of_all(ranks):
    """Rows so wide that no tile of similarities is as large."""
    arguments = rows(2000, 256, dtype=torch.float32)
    parts = [{"arguments": own} for own in split(arguments, [500] * 4)]
    embeddings = 2000 * 256 * 4
    assert all(largest >= embeddings for largest in ranks(largest_allocation, parts, ring=False))
    assert all(largest <= embeddings / 4 for largest in ranks(largest_allocation, parts, ring=True))


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
