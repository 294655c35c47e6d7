"""The contract of the mixed contrastive loss, held by every implementation.

The Triton kernels run on a GPU where there is one, and in Triton's interpreter elsewhere.
`objective_cases.npz` has worked cases in float64: inputs, loss, log-sum-exps and gradients.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import ContrastiveLoss
from torch.nn.functional import cross_entropy, normalize

from mixcl_dist.kernels import mixed_contrastive_loss

IMPLEMENTATIONS = ["reference", "tiled", "triton"]
FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
CASES = np.load(Path(__file__).with_name("objective_cases.npz"))
CASE_NUMBERS = range(int(CASES["cases"]))
NAMES = {"z": "embeddings", "u": "identity", "c": "candidate_set", "T": "set_table", "tau": "temperature"}

#: What an implementation computes float64 arguments in here, and how near to float64 its results are.
PRECISE = {"reference": torch.float64, "tiled": torch.float64, "triton": torch.float32}
TOLERANCE = {"reference": 1e-10, "tiled": 1e-10, "triton": 2e-5}
#: Rows that span several tiles of each implementation.
ROWS = {"reference": 700, "tiled": 700, "triton": 100}
#: Of the temperature's gradient in half precision: Triton rounds weights before it multiplies, as tensor cores want it.
TAU_TOLERANCE = {"reference": 1e-4, "tiled": 1e-4, "triton": 3e-3}
DEVICE = {"triton": "cuda" if torch.cuda.is_available() else "cpu"}

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_fast_implementation = pytest.mark.parametrize("implementation", FAST)


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def worked_case(number: int) -> tuple[dict, dict]:
    """Arguments and expected outputs of one worked case."""
    prefix = f"case{number}_"
    values = {key.removeprefix(prefix): torch.tensor(CASES[key]) for key in CASES.files if key.startswith(prefix)}
    expected = {key.removeprefix("out_"): value for key, value in values.items() if key.startswith("out_")}
    arguments = {NAMES.get(key, key): value for key, value in values.items() if not key.startswith("out_")}
    weights = {name: float(CASES[name]) for name in ("identity_weight", "label_weight")}
    return arguments | weights, expected


def random_rows(n: int, d: int, *, seed: int = 0, group: bool = True, row_weight: bool = True) -> dict:
    """Rows of five classes, some of them only partly known, with twins, groups and row weights, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    table = torch.cat(
        [
            torch.eye(5, dtype=torch.bool),
            torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool),
        ]
    )
    return {
        "embeddings": normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1),
        "identity": integers(-1, max(n // 3, 1)),
        "candidate_set": integers(0, len(table)),
        "set_table": table,
        "group": integers(-1, max(n // 8, 1)) if group else None,
        "row_weight": torch.rand(n, generator=generator, dtype=torch.float64) if row_weight else None,
        "temperature": torch.tensor(0.1, dtype=torch.float64),
    }


def loss_of(arguments: dict, implementation: str):
    """Outputs, from arguments on the implementation's device in a dtype that it takes."""
    if arguments["embeddings"].dtype == torch.float64:
        arguments = to_dtype(arguments, PRECISE[implementation])
    device = DEVICE.get(implementation, "cpu")
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return mixed_contrastive_loss(**moved, implementation=implementation)


def evaluate(arguments: dict, implementation: str):
    """Outputs and the gradients of embeddings and temperature, on the CPU."""
    arguments = dict(arguments)
    for name in ("embeddings", "temperature"):
        arguments[name] = torch.as_tensor(arguments[name]).detach().clone().requires_grad_()
    out = loss_of(arguments, implementation)
    gradients = torch.autograd.grad(out.loss, (arguments["embeddings"], arguments["temperature"]))
    return out._make(value.cpu() for value in out), *gradients


def to_dtype(arguments: dict, dtype: torch.dtype) -> dict:
    """The embeddings in ``dtype``; the small floating arguments in what they are computed in."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    kept = {n: v for n, v in arguments.items() if not (isinstance(v, torch.Tensor) and v.is_floating_point())}
    cast = {n: arguments[n].to(small) for n in arguments.keys() - kept.keys()}
    return kept | cast | {"embeddings": arguments["embeddings"].to(dtype)}


def assert_equal(got: tuple, want: tuple, tolerance: float) -> None:
    """All outputs and both gradients agree."""
    for value, target in zip((*got[0], *got[1:]), (*want[0], *want[1:]), strict=True):
        torch.testing.assert_close(value.double(), target.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def relative_error(value: torch.Tensor, target: torch.Tensor) -> float:
    return float((value.double() - target).norm() / target.norm())


# The worked cases


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [(name, torch.float32, 1e-5) for name in IMPLEMENTATIONS]
    + [(name, torch.float64, 1e-10) for name, precise in PRECISE.items() if precise == torch.float64],
)
@pytest.mark.parametrize("number", CASE_NUMBERS)
def test_worked_case(number, implementation, dtype, tolerance):
    arguments, expected = worked_case(number)
    out, dz, dtau = evaluate(to_dtype(arguments, dtype), implementation)
    got = {
        "loss": out.loss,
        "identity": out.identity_loss,
        "label": out.label_loss,
        "lse": out.lse,
        "dtau": dtau,
    }
    for name, value in got.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)
    assert relative_error(dz, expected["dz"]) < tolerance
    assert out.identity_anchors == expected["anchors_identity"]
    assert out.label_anchors == expected["anchors_label"]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", CASE_NUMBERS)
def test_half_precision_is_exact_for_the_rounded_embeddings(number, dtype, implementation):
    arguments = to_dtype(worked_case(number)[0], dtype)
    out, dz, dtau = evaluate(arguments, implementation)
    want, want_dz, want_dtau = evaluate(to_dtype(arguments, torch.float64), "reference")
    assert out.loss.dtype == out.lse.dtype == torch.float32 and dz.dtype == dtype
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dtau.double(), want_dtau, rtol=TAU_TOLERANCE[implementation], atol=1e-4)
    assert relative_error(dz, want_dz) < 3e-3


# The gradient


@pytest.mark.parametrize("implementation", ["reference", "tiled"])  # finite differences need float64
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("optional", [True, False])
def test_gradient_is_the_derivative(optional, weights, implementation):
    arguments = random_rows(20, 4, group=optional, row_weight=optional)
    arguments |= {"identity_weight": weights[0], "label_weight": weights[1]}

    def loss(embeddings, temperature):
        changed = arguments | {"embeddings": embeddings, "temperature": temperature}
        return mixed_contrastive_loss(**changed, implementation=implementation).loss

    inputs = [arguments[name].clone().requires_grad_() for name in ("embeddings", "temperature")]
    assert torch.autograd.gradcheck(loss, inputs)


@every_fast_implementation
@pytest.mark.parametrize("row_weight", [True, False])
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_equals_the_reference_with_every_argument_on_and_off(weights, group, row_weight, implementation):
    arguments = random_rows(ROWS[implementation], 16, group=group, row_weight=row_weight)
    arguments |= {"identity_weight": weights[0], "label_weight": weights[1]}
    assert_equal(evaluate(arguments, implementation), evaluate(arguments, "reference"), TOLERANCE[implementation])


@every_implementation
def test_only_the_loss_is_differentiable(implementation):
    arguments = random_rows(30, 8)
    arguments["embeddings"].requires_grad_()
    out = loss_of(arguments, implementation)
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss"]


@every_implementation
@pytest.mark.parametrize("mass", [0.99, 0.9999])
def test_gradient_near_convergence(mass, implementation):
    """Softmax minus target is then a small difference of nearly equal numbers."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(128, 128, generator=generator).repeat_interleave(2, 0)
    noise = 0.02 * torch.randn(256, 128, generator=generator)
    rows = normalize(centre + noise, dim=1).bfloat16()
    arguments = {
        "embeddings": rows,
        "identity": torch.arange(256) // 2,
        "candidate_set": torch.zeros(256, dtype=torch.int64),
        "set_table": torch.ones(1, 3, dtype=torch.bool),
        "temperature": temperature_for_mass(rows.double(), mass),
    }
    dz = evaluate(to_dtype(arguments, torch.bfloat16), implementation)[1]
    want = evaluate(to_dtype(arguments, torch.float64), "reference")[1]
    assert relative_error(dz, want) < 5e-3


def temperature_for_mass(rows: torch.Tensor, mass: float) -> torch.Tensor:
    """The temperature at which twins hold this share of the softmax on average, by bisection."""
    low, high = 0.01, 1.0
    cosine = (rows @ rows.T).fill_diagonal_(-math.inf)
    twin = torch.arange(len(rows)) ^ 1
    for _ in range(40):
        middle = math.sqrt(low * high)
        reached = (cosine / middle).softmax(1)[torch.arange(len(rows)), twin].mean() > mass
        low, high = (middle, high) if reached else (low, middle)
    return torch.tensor(low, dtype=torch.float64)


# What must not matter


@every_implementation
def test_permuting_rows_permutes_the_gradient(implementation):
    arguments = random_rows(ROWS[implementation], 16)
    order = torch.randperm(ROWS[implementation], generator=torch.Generator().manual_seed(1))
    moved = arguments | {
        name: arguments[name][order] for name in ("embeddings", "identity", "candidate_set", "group", "row_weight")
    }
    out, dz, dtau = evaluate(arguments, implementation)
    expected = out._replace(lse=out.lse[:, order]), dz[order], dtau
    assert_equal(evaluate(moved, implementation), expected, TOLERANCE[implementation])


@every_implementation
def test_rows_that_are_not_present_take_no_part(implementation):
    """Whatever they hold: NaN, a twin of a row that is present, a class of theirs."""
    arguments = random_rows(ROWS[implementation], 16)
    present = torch.rand(ROWS[implementation], generator=torch.Generator().manual_seed(2)) > 0.3
    of_rows = ("embeddings", "identity", "candidate_set", "group", "row_weight")
    alone = evaluate(arguments | {name: arguments[name][present] for name in of_rows}, "reference")
    arguments["embeddings"][~present] = torch.nan
    out, dz, dtau = evaluate(arguments | {"present": present}, implementation)
    assert (out.lse[:, ~present] == -torch.inf).all() and (dz[~present] == 0).all()
    left = out._replace(lse=out.lse[:, present]), dz[present], dtau
    assert_equal(left, alone, TOLERANCE[implementation])
    none = evaluate(arguments | {"present": torch.zeros_like(present)}, implementation)
    assert none[0].loss == 0 and (none[1] == 0).all() and none[2] == 0


def renamed_identities(arguments):
    identity = arguments["identity"]
    return {"identity": torch.where(identity >= 0, 7_000_000_000_000 - 31 * identity, -1)}


def renamed_groups(arguments):
    group = arguments["group"]
    return {"group": torch.where(group >= 0, 2_000_000_000 - 3 * group, -1).int()}


def renamed_classes(arguments):
    return {"set_table": arguments["set_table"][:, [3, 1, 4, 0, 2]]}


def renamed_sets(arguments):
    return {
        "set_table": arguments["set_table"].flip(0),
        "candidate_set": len(arguments["set_table"]) - 1 - arguments["candidate_set"],
    }


def duplicated_sets(arguments):
    sets = len(arguments["set_table"])
    shift = torch.arange(len(arguments["candidate_set"])) % 2 * sets
    return {
        "set_table": arguments["set_table"].repeat(2, 1),
        "candidate_set": (arguments["candidate_set"] + shift).int(),
    }


@every_implementation
@pytest.mark.parametrize("rename", [renamed_identities, renamed_groups, renamed_classes, renamed_sets, duplicated_sets])
def test_names_do_not_matter(rename, implementation):
    arguments = random_rows(ROWS[implementation], 16)
    renamed = evaluate(arguments | rename(arguments), implementation)
    assert_equal(renamed, evaluate(arguments, implementation), TOLERANCE[implementation])


@every_implementation
def test_an_open_pair_does_not_exist_for_the_label_relation(implementation):
    arguments = random_rows(ROWS[implementation], 16)
    arguments["identity"][0] = -1
    arguments["candidate_set"][0] = 5  # may be of any class
    changed = arguments["embeddings"].clone()
    changed[0] = changed[1]
    before = loss_of(arguments, implementation)
    after = loss_of(arguments | {"embeddings": changed}, implementation)
    assert torch.equal(before.lse[1, 1:], after.lse[1, 1:])
    assert not torch.equal(before.lse[0, 1:], after.lse[0, 1:])


@every_implementation
def test_two_runs_give_the_same_bits(implementation):
    arguments = to_dtype(random_rows(2 * ROWS[implementation], 32), torch.float32)
    first, second = (evaluate(arguments, implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1:]), (*second[0], *second[1:]), strict=True))


# Known special cases


@every_implementation
def test_without_labels_it_is_infonce(implementation):
    pairs = 24
    rows = random_rows(2 * pairs, 16)["embeddings"]
    arguments = {
        "embeddings": rows,
        "identity": torch.arange(pairs).repeat(2),
        "candidate_set": torch.zeros(2 * pairs, dtype=torch.int64),
        "set_table": torch.ones(1, 4, dtype=torch.bool),
        "temperature": 0.2,
    }
    out = loss_of(arguments, implementation)
    logits = (rows @ rows.T / 0.2).fill_diagonal_(-math.inf)
    for other in (
        cross_entropy(logits, torch.arange(2 * pairs).roll(pairs)),
        ContrastiveLoss(temperature=0.2)(rows[:pairs], rows[pairs:]),
    ):
        assert out.loss.item() == pytest.approx(other.item(), rel=1e-6)
    assert out.label_loss == 0 and out.label_anchors == 0 and out.label_similarity.isnan()


@every_implementation
def test_with_every_label_and_no_identity_it_is_supcon(implementation):
    """Khosla et al. 2020, equation 2 (the mean over positives outside the logarithm), row by row."""
    rows = random_rows(40, 16)["embeddings"]
    label = torch.arange(40) % 4
    arguments = {
        "embeddings": rows,
        "identity": torch.full((40,), -1),
        "candidate_set": label,
        "set_table": torch.eye(4, dtype=torch.bool),
        "temperature": 0.2,
    }
    out = loss_of(arguments, implementation)
    terms = []
    for i in range(40):
        others = torch.arange(40) != i
        log_probability = (rows @ rows[i] / 0.2)[others].log_softmax(0)
        terms.append(-log_probability[label[others] == label[i]].mean())
    assert out.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
    assert out.identity_loss == 0 and out.identity_anchors == 0
    assert out.label_floor == pytest.approx(math.log(9))


@every_implementation
def test_the_floor_is_reached_when_positives_coincide_and_nothing_else_is_near(implementation):
    arguments = {
        "embeddings": torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0),
        "identity": torch.arange(4).repeat_interleave(3),
        "candidate_set": torch.zeros(12, dtype=torch.int64),
        "set_table": torch.ones(1, 2, dtype=torch.bool),
        "temperature": 0.02,
    }
    out = loss_of(arguments, implementation)
    assert out.identity_loss.item() == pytest.approx(out.identity_floor.item(), abs=TOLERANCE[implementation])
    assert out.identity_similarity == 1


# Edges


HEIGHTS, WIDTHS = [0, 1, 2, 3, 127, 128, 129, 1000], [1, 8, 33, 64, 128, 192, 256, 768, 1024]


def sizes() -> list:
    """Every number of rows with every width; of interpreted kernels, which are slow, each once, and slowly the rest."""
    cases = []
    for implementation in FAST:
        for n in HEIGHTS:
            for d in WIDTHS:
                interpreted = implementation == "triton" and DEVICE["triton"] == "cpu"
                usual = d == 8 or (n == 129 and d in (33, 256, 1024))  # ragged, whole and in steps
                slow = interpreted and (n == 1000 or not usual)
                cases.append(pytest.param(implementation, n, d, marks=[pytest.mark.slow] if slow else []))
    return cases


@pytest.mark.parametrize(("implementation", "n", "d"), sizes())
def test_every_size(implementation, n, d):
    arguments = to_dtype(random_rows(n, d), torch.float32)
    assert_equal(evaluate(arguments, implementation), evaluate(arguments, "reference"), 2e-5)


def one_class(n):
    return {"candidate_set": torch.zeros(n, dtype=torch.int64)}


def one_identity(n):
    return {"identity": torch.zeros(n, dtype=torch.int64)}


def one_group(n):
    return {"group": torch.zeros(n, dtype=torch.int64)}


def no_weight(n):
    return {"row_weight": torch.zeros(n, dtype=torch.float64)}


@every_fast_implementation
@pytest.mark.parametrize("extreme", [one_class, one_identity, one_group, no_weight])
def test_extreme_batches(extreme, implementation):
    arguments = random_rows(ROWS[implementation], 16) | extreme(ROWS[implementation])
    assert_equal(evaluate(arguments, implementation), evaluate(arguments, "reference"), TOLERANCE[implementation])


@every_fast_implementation
def test_non_contiguous_inputs(implementation):
    arguments = random_rows(ROWS[implementation], 16)
    strided = arguments | {
        name: arguments[name].repeat_interleave(2, 0)[::2]
        for name in ("identity", "candidate_set", "group", "row_weight")
    }
    strided["embeddings"] = arguments["embeddings"].T.contiguous().T
    assert not strided["embeddings"].is_contiguous() and not strided["identity"].is_contiguous()
    assert_equal(evaluate(strided, implementation), evaluate(arguments, "reference"), TOLERANCE[implementation])


@every_fast_implementation
@pytest.mark.parametrize(("temperature", "scale"), [(0.01, 1.0), (0.1, 5.0), (0.1, 100.0)])
def test_large_logits(temperature, scale, implementation):
    arguments = random_rows(ROWS[implementation], 16)
    arguments["embeddings"] *= scale * torch.linspace(0.5, 1, ROWS[implementation], dtype=torch.float64)[:, None]
    arguments["temperature"] = torch.tensor(temperature, dtype=torch.float64)
    want = evaluate(arguments, "reference")
    if implementation != "triton":
        assert_equal(evaluate(arguments, implementation), want, 1e-9)
    single = evaluate(to_dtype(arguments, torch.float32), implementation)
    torch.testing.assert_close(single[0].loss.double(), want[0].loss, rtol=1e-5, atol=1e-5)
    assert relative_error(single[1], want[1]) < 1e-2 and single[1].isfinite().all()


@every_implementation
@pytest.mark.parametrize("n", [0, 1, 50])
def test_without_anchors_the_loss_is_zero_with_zero_gradients(n, implementation):
    arguments = random_rows(n, 8) | {
        "identity": torch.full((n,), -1),
        "candidate_set": torch.full((n,), 5),
    }
    out, dz, dtau = evaluate(arguments, implementation)
    assert out.loss == 0 and dtau == 0 and torch.equal(dz, torch.zeros_like(dz))
    assert out.identity_floor == 0 and out.identity_similarity.isnan()


@every_implementation
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("partner", [True, False])
def test_an_embedding_that_is_not_finite_makes_the_loss_nan(partner, value, implementation):
    rows = ROWS[implementation]
    arguments = random_rows(rows, 8)
    if not partner:  # no row of the batch is a partner or a negative of another
        arguments |= {"identity": torch.full((rows,), -1), "group": torch.zeros(rows, dtype=torch.int64)}
        arguments["candidate_set"] = torch.full((rows,), 5)
    arguments["embeddings"][7, 3] = value
    assert loss_of(arguments, implementation).loss.isnan()


@every_implementation
def test_every_element_of_the_outputs_is_written(implementation):
    """Memory is filled with NaN before it is handed out."""
    arguments = random_rows(ROWS[implementation], 16)
    want = evaluate(arguments, "reference")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_equal(evaluate(arguments, implementation), want, TOLERANCE[implementation])
    finally:
        torch.use_deterministic_algorithms(False)
