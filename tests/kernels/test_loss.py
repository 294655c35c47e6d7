from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from mixcl_dist.kernels import MixedContrastiveLoss, mixed_contrastive_loss
from mixcl_dist.kernels.op import mixed_contrastive, mixed_contrastive_backward

TABLE = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)


def rows(n: int = 24, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = normalize(torch.randn(n, 8, generator=generator), dim=1).to(dtype)
    return embeddings, torch.arange(n) // 2, torch.arange(n) % 3


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(24)}, r"embeddings: expected shape \('any', 'any'\), got \(24,\)"),
        ({"embeddings": torch.zeros(24, 8).int()}, "embeddings: expected .*float32.* got torch.int32"),
        ({"identity": torch.arange(23)}, r"identity: expected shape \(24,\), got \(23,\)"),
        ({"identity": torch.arange(24).int()}, "identity: expected torch.int64, got torch.int32"),
        ({"identity": None}, "identity: expected a tensor, got None"),
        ({"identity": torch.arange(24, device="meta")}, "identity: expected device cpu .* got meta"),
        (
            {"candidate_set": torch.full((24,), 3)},
            "candidate_set: expected an index below 3.* got 3 in row 0",
        ),
        ({"candidate_set": torch.full((24,), -1)}, "candidate_set: .* got -1 in row 0"),
        ({"set_table": TABLE.int()}, "set_table: expected torch.bool, got torch.int32"),
        ({"set_table": TABLE & False}, "set_table: set 0 has no class"),
        ({"group": torch.zeros(24)}, "group: expected torch.int32 or torch.int64, got torch.float32"),
        ({"row_weight": -torch.ones(24)}, "row_weight: .* got -1.0 in row 0"),
        ({"present": torch.ones(24)}, "present: expected torch.bool, got torch.float32"),
        ({"row_weight": torch.ones(3)}, r"row_weight: expected shape \(24,\), got \(3,\)"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected a finite number > 0, got nan"),
        ({"temperature": torch.tensor(-1.0)}, "temperature: expected a finite number > 0, got -1.0"),
        ({"temperature": torch.ones(1)}, r"temperature: expected shape \(\), got \(1,\)"),
        ({"identity_weight": -1.0}, "identity_weight: expected a finite number >= 0, got -1.0"),
        ({"label_weight": math.inf}, "label_weight: expected a finite number >= 0, got inf"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_refusals_name_the_argument_and_the_value(change, message, implementation):
    names = ("embeddings", "identity", "candidate_set", "set_table")
    arguments = dict(zip(names, (*rows(), TABLE), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        mixed_contrastive_loss(**arguments, implementation=implementation)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"implementation: expected one of .*'tiled'.* got 'cuda'"):
        mixed_contrastive_loss(*rows(), TABLE, implementation="cuda")


def test_double_backward_is_refused_in_words():
    embeddings = rows()[0].requires_grad_()
    loss = mixed_contrastive_loss(embeddings, *rows()[1:], TABLE, implementation="tiled").loss
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# The operator


def test_auto_is_tiled_on_a_cpu():
    got, want = (mixed_contrastive_loss(*rows(), TABLE, implementation=name) for name in ("auto", "tiled"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optional", [True, False])
def test_operator_keeps_the_rules_of_the_dispatcher(optional, dtype):
    embeddings, identity, candidate_set = rows(dtype=dtype)
    temperature = torch.tensor(0.1, requires_grad=True)
    extra = (torch.arange(24) // 4, torch.rand(24), torch.arange(24) % 5 > 0) if optional else (None, None, None)
    group, row_weight, present = extra
    inputs = identity, candidate_set, TABLE, group, temperature, row_weight, present, 1.0, 0.5, "", "tiled"
    torch.library.opcheck(mixed_contrastive, (embeddings.requires_grad_(), *inputs))
    lse = mixed_contrastive(embeddings, *inputs)[2]
    inputs = (
        torch.tensor(1.0),
        lse,
        [],
        embeddings.detach(),
        *(value.detach() if isinstance(value, torch.Tensor) else value for value in inputs),
    )
    torch.library.opcheck(mixed_contrastive_backward, inputs)


def test_the_gradient_of_a_transposed_matrix_is_laid_out_as_the_compiler_was_told():
    embeddings = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)).T.requires_grad_()
    inputs = embeddings, *rows()[1:], TABLE, None, torch.tensor(0.1), None, None, 1.0, 0.5, "", "tiled"
    torch.library.opcheck(mixed_contrastive, inputs)


def test_contents_are_validated_on_request():
    with pytest.raises(ValueError, match=r"candidate_set: .* got -1 in row 0"):
        mixed_contrastive_loss(rows()[0], rows()[1], rows()[2] - 1, TABLE, validate=True)


@pytest.mark.parametrize("learnable", [True, False])
def test_compiles_without_a_graph_break(learnable):
    module = MixedContrastiveLoss(TABLE, learnable_temperature=learnable, implementation="tiled")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for call in (module, compiled):
        embeddings = rows()[0].requires_grad_()
        losses.append(call(embeddings, *rows()[1:]).loss)
        gradients.append(torch.autograd.grad(losses[-1], [embeddings, *module.parameters()]))
    assert torch.equal(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_autocast_changes_nothing(implementation):
    results = []
    for enabled in (False, True):
        embeddings = rows()[0].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = mixed_contrastive_loss(embeddings, *rows()[1:], TABLE, implementation=implementation).loss
        results.append((loss, *torch.autograd.grad(loss, embeddings)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_around_the_backward_changes_nothing():
    results = []
    for enabled in (False, True):
        embeddings = rows()[0].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            mixed_contrastive_loss(embeddings, *rows()[1:], TABLE, implementation="tiled").loss.backward()
        results.append(embeddings.grad)
    assert torch.equal(*results)


# The module


def test_module_calls_the_function_with_its_settings():
    module = MixedContrastiveLoss(TABLE, temperature=0.3, identity_weight=0.5, label_weight=2.0)
    group, row_weight = torch.arange(24) // 4, torch.rand(24)
    got = module(*rows(), group=group, row_weight=row_weight)
    want = mixed_contrastive_loss(
        *rows(),
        TABLE,
        group=group,
        temperature=0.3,
        row_weight=row_weight,
        identity_weight=0.5,
        label_weight=2.0,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not list(module.parameters()) and torch.equal(module.state_dict()["set_table"], TABLE)


def test_learnable_temperature_descends():
    module = MixedContrastiveLoss(TABLE, learnable_temperature=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        losses.append(module(*rows()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and module.temperature.item() != pytest.approx(0.1)


@pytest.mark.parametrize(("log_temperature", "bound"), [(-9.0, 0.01), (9.0, 1.0)])
def test_learnable_temperature_keeps_its_bounds_and_can_come_back(log_temperature, bound):
    module = MixedContrastiveLoss(TABLE, learnable_temperature=True)
    with torch.no_grad():
        module.log_temperature.fill_(log_temperature)
    assert module.temperature.item() == pytest.approx(bound)
    inward = -math.copysign(1.0, log_temperature)
    for direction in (inward, -inward):
        (gradient,) = torch.autograd.grad(-direction * module.temperature, module.log_temperature)
        assert (gradient != 0) == (direction == inward)


def test_learnable_temperature_must_start_within_its_bounds():
    with pytest.raises(ValueError, match=r"temperature: expected a value within \(0.01, 1.0\), got 2.0"):
        MixedContrastiveLoss(TABLE, temperature=2.0, learnable_temperature=True)
