"""What some ranks saved at some ZeRO stage any others take up, and ranks that do not fit together are told so."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from mixcl_dist.cluster import watchdog

from .ranks import finish, start

PROGRAM = """
import functools, os, sys
from pathlib import Path
import torch
from torch.optim.lr_scheduler import LambdaLR
from mixcl_dist.cluster.engine import EngineConfig, launch

folder, sources, stages = Path(sys.argv[1]), sys.argv[2].split(","), [int(stage) for stage in sys.argv[3].split(",")]
optimizer = functools.partial(torch.optim.AdamW, lr=0.02, fused=True)
schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])


def module(seed):
    torch.manual_seed(seed)  # 37 and 11 are no multiple of any number of ranks
    return torch.nn.Sequential(torch.nn.Linear(6, 37), torch.nn.GELU(), torch.nn.Linear(37, 11), torch.nn.Linear(11, 1))


def train(engine, first, last):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 6, generator=generator) for _ in range(last)]
    for x in batches[first:]:
        engine.backward(engine(x[rank * 4 // world : (rank + 1) * 4 // world]).square().mean())
        engine.step()


def launched(stage, seed):
    return launch(module(seed), optimizer, schedule, micro_batch_size=4 // world, config=EngineConfig(zero_stage=stage))


def saved(engine, name):
    path = folder / name
    path.mkdir(exist_ok=True)
    snapshot = engine.snapshot()
    if rank == 0:
        snapshot.write(path)
    engine.barrier()


for source, stage in [(source, stage) for source in sources for stage in stages]:
    engine = launched(stage, seed=0 if source == "none" else 9)
    name = f"{world}-{stage}"
    if source == "none":
        train(engine, 0, 3)
        saved(engine, name)
    else:
        engine.load(folder / source)
        name = f"{source}-to-{name}"
        saved(engine, name)
    train(engine, 3, 6)
    saved(engine, name + "-end")
torch.distributed.barrier()
os._exit(0)  # none of these engines was closed, so threads of their watchdogs are still at work
"""


def run(tmp_path, ranks, sources, stages):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for code, _, errors in finish(start([program, tmp_path, ",".join(sources), ",".join(map(str, stages))], ranks)):
        assert code == 0, errors


def state(tmp_path, name):
    return load_file(tmp_path / name / "engine.safetensors")


def check_resumed(tmp_path, source, name):
    """Taking it up loses no bit, and what is learnt then is what the one that was not stopped learnt: to the bit, or
    to a thousandth of it where sums are in another order, which Adam makes much of where a gradient is nearly 0."""
    saved = state(tmp_path, source)
    torch.testing.assert_close(state(tmp_path, f"{source}-to-{name}"), saved, rtol=0, atol=0)
    exact = source == name and name[0] in "12"  # more than two are added up in the order in which they come
    ended, resumed = state(tmp_path, f"{source}-end"), state(tmp_path, f"{source}-to-{name}-end")
    for tensor, expected in ended.items():
        learnt, apart = (expected - saved[tensor]).norm(), (resumed[tensor] - expected).norm()
        assert apart <= (0 if exact else 1e-3) * learnt, f"{name}: {tensor} {apart / learnt:.1e}"


@pytest.mark.slow
def test_two_ranks_are_gone_on_with_by_one(tmp_path):
    run(tmp_path, 2, ["none"], [3])
    run(tmp_path, 1, ["2-3"], [0, 1])
    for stage in (0, 1):
        check_resumed(tmp_path, "2-3", f"1-{stage}")


@pytest.mark.slow
def test_any_ranks_at_any_stage_go_on_with_what_any_others_saved(tmp_path):
    stages = (0, 1, 2, 3)
    for ranks in (1, 2, 4):
        run(tmp_path, ranks, ["none"], stages)
    sources = [f"{ranks}-{stage}" for ranks, stage in itertools.product((1, 2, 4), stages)]
    for ranks in (1, 2, 4):
        run(tmp_path, ranks, sources, stages)
    for source, ranks, stage in itertools.product(sources, (1, 2, 4), stages):
        check_resumed(tmp_path, source, f"{ranks}-{stage}")


EXCHANGED = """
import functools, json, os
import torch
from torch.optim.lr_scheduler import LambdaLR
from mixcl_dist.cluster.engine import EngineConfig, launch

rank = int(os.environ["RANK"])
optimizer = functools.partial(torch.optim.AdamW, lr=0.02, fused=True)
schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1.0)


def weights(steps=4, **settings):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 400), torch.nn.GELU(), torch.nn.Linear(400, 11))
    engine = launch(module, optimizer, schedule, micro_batch_size=2, config=EngineConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        engine.backward(engine(torch.randn(4, 6, generator=generator)[2 * rank : 2 * rank + 2]).square().mean())
        engine.step()
    found = engine.snapshot().weights
    return torch.cat([tensor.flatten().clone() for tensor in found.values()]) if rank == 0 else torch.zeros(1)


for stage in (0, 1, 2, 3):
    plain, first = weights(zero_stage=stage), weights(0, zero_stage=stage)
    others = [{"bucket_size": 1024}, {"communication_dtype": "bfloat16"}]
    apart = [float((weights(zero_stage=stage, **other) - plain).norm()) for other in others]
    print(json.dumps(apart + [float((plain - first).norm())]), flush=True)
torch.distributed.barrier()
os._exit(0)  # none of these engines was closed, so threads of their watchdogs are still at work
"""


@pytest.mark.slow
def test_what_is_exchanged_at_once_changes_nothing_and_its_dtype_little(tmp_path):
    """Sums rounded to bfloat16, which keeps three digits, move weights by less than 3 % of what they change."""
    program = tmp_path / "program.py"
    program.write_text(EXCHANGED)
    (code, output, errors), (other, *_) = finish(start([program], 2))
    assert (code, other) == (0, 0), errors
    found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(found) == 4
    for bucket, dtype, change in found:
        assert bucket == 0 and 0 < dtype < 0.03 * change, found


APART = """
import functools, os, signal, sys, time
from pathlib import Path
import torch
from torch.optim.lr_scheduler import LambdaLR
from mixcl_dist.cluster.engine import EngineConfig, EngineError, _import_deepspeed, launch
from mixcl_dist.cluster.group import ToldError

_import_deepspeed()
rank, what, stacks, lost = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if what == "missing" and rank == 1:
    sys.exit(3)
stacks.with_name(f"there {rank}").touch()
while what == "hung" and len(list(stacks.parent.glob("there *"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.1)  # imports take longer than the short time-out


def fail():
    told = engine._watchdog._exchanges
    while engine._watchdog._exchanges < told + 2:  # the others can hear of this step
        time.sleep(0.1)
    if what == "dead":
        os._exit(3)
    if what == "raises":
        raise EngineError("of its own")
    if what in ("frozen", "frozen early"):
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


common = {"rate": 1 + (rank if what == "settings" else 0), "code": "a"}
try:
    engine = launch(
        torch.nn.Linear(6, 1),
        functools.partial(torch.optim.AdamW, lr=0.02),
        functools.partial(LambdaLR, lr_lambda=lambda step: 1.0),
        micro_batch_size=2,
        config=EngineConfig(zero_stage=1, timeout_s={"missing": 5, "hung": 10, "frozen early": 10}.get(what, 300)),
        common=common,
        stacks=stacks,
    )
    print("flags", engine.any(rank == 1), engine.any(False), engine.gather({"rank": rank}), flush=True)
    with engine.together():
        for step in range(1000):
            engine.doing(f"step {step}")
            if step == 3 and rank == lost:
                fail()
            engine.backward(engine(torch.ones(2, 6)).square().mean())
            engine.step()
except EngineError as error:
    print(f"mixcl: {error}", file=sys.stderr)
    os._exit(2)
except ToldError:
    os._exit(2)
"""


def told(tmp_path, what, ranks, lost=1):
    """Exit codes, the lines that were said for people, and the output of the first rank that is left."""
    program = tmp_path / "program.py"
    program.write_text(APART)
    processes = start([program, what, tmp_path / "stacks", lost], ranks)
    try:
        others = [process.communicate(timeout=250) for rank, process in enumerate(processes) if rank != lost]
    finally:
        if what.startswith("frozen"):
            processes[lost].kill()
        failed = processes[lost].communicate(timeout=250)
    said = [error for _, error in [*others, failed]]
    lines = [line for text in said for line in text.splitlines() if line.startswith("mixcl:")]
    return [process.returncode for process in processes], lines, others[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ranks", "codes", "said"),
    [
        ("settings", 2, [2, 2], r"ranks 0 and 1 differ in rate \(1 and 2\); start all ranks with the same command"),
        (
            "missing",
            2,
            [2, 3],
            r"another rank did not answer within engine.timeout_s, 5 s; see what it says; start all",
        ),
        (
            "dead",
            3,
            [2, 3, 2],
            r"rank 1 on \S+ has ended or cannot be reached, in step 3; see .* start all ranks again",
        ),
        (
            "hung",
            3,
            [2, 2, 2],
            r"rank 1 on \S+ has hung for \d+ s .* in step 3, at program.py:\d+ in fail; the stacks ",
        ),
        ("frozen", 2, [2, -9], r"rank 1 on \S+ has ended or cannot be reached, in step 3; see what it or its machine"),
        ("raises", 2, [2, 2], r"of its own"),
    ],
)
def test_a_rank_that_is_missing_or_different_ends_all_with_one_line(tmp_path, what, ranks, codes, said):
    """Dead, hung in its main thread alone, frozen whole as a machine that is cut off, or ended by what it met alone."""
    ended, lines, output = told(tmp_path, what, ranks)
    assert ended == codes, lines
    assert len(lines) == 1 and re.match(f"mixcl: {said}", lines[0]), lines
    if what in ("dead", "hung"):
        flags = [{"rank": rank} for rank in range(ranks)]
        assert f"flags True False {flags}" in output
    if what == "hung":
        stacks = [(tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in range(ranks)]
        assert "in fail" in stacks[1] and all("distributed" in stacks[rank] for rank in (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["frozen", "frozen early"])
def test_the_others_end_where_rank_0_is_silent_but_its_connections_are_open(tmp_path, what):
    """No word with the store at which all met is answered then; a collective gives up before the watchdog, or after."""
    ended, lines, _ = told(tmp_path, what, 2, lost=0)
    assert ended == [-9, 2], lines
    (line,) = lines
    assert re.match(r"mixcl: rank 0, at which all ranks meet, cannot be reached from \S+; start all ranks again", line)


def test_all_have_ended_half_a_minute_after_one_was_lost():
    """As far as it is for the watchdog to say; a busy machine takes longer for its own part."""
    heard, judged, said = watchdog.LOST_S + 2 * watchdog.BEAT_S, watchdog.ASKED_S + watchdog.BEAT_S, watchdog.HEARD_S
    assert heard + judged + said < 30
