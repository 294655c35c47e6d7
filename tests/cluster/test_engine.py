"""The DeepSpeed engine without a launcher: one CPU process does what plain PyTorch does."""

import contextlib
import copy
import functools
import itertools
import math
import pathlib
import pickle
import re

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist.cluster.engine import STATE, EngineConfig, EngineError, launch


def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator) for _ in range(count)]


optimizer = functools.partial(torch.optim.AdamW, lr=0.02)
schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))


def train_engine(engine, inputs):
    for x in inputs:
        engine.backward(engine(x).square().mean())
        engine.step()


def train_plain(model, inputs, clipping, accumulation):
    plain = optimizer(model.parameters())
    course = schedule(plain)
    for number, x in enumerate(inputs, 1):
        (model(x).square().mean() / accumulation).backward()
        if number % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
            plain.step()
            plain.zero_grad()
            course.step()


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)])
def test_one_process_equals_plain_pytorch(stage, accumulation):
    model = module()
    plain = copy.deepcopy(model)
    config = EngineConfig(zero_stage=stage, accumulation_steps=accumulation, gradient_clipping=0.1)
    engine = launch(model, optimizer, schedule, micro_batch_size=4, config=config)
    train_engine(engine, batches(6))
    train_plain(plain, batches(6), 0.1, accumulation)
    assert engine.learning_rate() == pytest.approx(0.02 / (1 + 6 // accumulation))
    x = batches(1)[0]
    torch.testing.assert_close(engine(x), plain(x), rtol=1e-4, atol=1e-5)
    engine.close()


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_an_optimizer_in_main_memory_equals_plain_pytorch(stage):
    model, fused = module(), functools.partial(optimizer, fused=True)
    plain = copy.deepcopy(model)
    config = EngineConfig(zero_stage=stage, gradient_clipping=0.1, offload_optimizer=True)
    engine = launch(model, fused, schedule, micro_batch_size=4, config=config)
    assert engine._engine.optimizer.cpu_offload if stage != 3 else engine._engine.optimizer.offload_optimizer
    train_engine(engine, batches(6))
    train_plain(plain, batches(6), 0.1, 1)
    x = batches(1)[0]
    torch.testing.assert_close(engine(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(engine.gradient_norms()) == 6 and engine.learning_rate() == pytest.approx(0.02 / 7)
    engine.close()


@pytest.mark.parametrize(("stage", "offload"), [(0, False), *itertools.product((1, 2, 3), (False, True))])
def test_a_saved_engine_goes_on_as_if_never_stopped(tmp_path, stage, offload):
    config = EngineConfig(zero_stage=stage, offload_optimizer=offload)
    whole = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    train_engine(whole, batches(3))
    whole.snapshot().write(tmp_path)
    train_engine(whole, batches(6)[3:])
    x = batches(1)[0]
    expected = whole(x).detach().clone()
    whole.close()

    resumed = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    resumed.load(tmp_path)
    train_engine(resumed, batches(6)[3:])
    torch.testing.assert_close(resumed(x), expected, rtol=0, atol=0)
    resumed.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_that_never_had_a_gradient_are_saved_and_loaded(tmp_path, stage):
    """As of a head whose term is off."""

    def with_idle() -> torch.nn.Module:
        made = module()
        made.idle = torch.nn.Parameter(torch.full((3,), 7.0))
        return made

    engine = launch(with_idle(), optimizer, schedule, micro_batch_size=4, config=EngineConfig(zero_stage=stage))
    train_engine(engine, batches(2))
    engine.snapshot().write(tmp_path)
    engine.close()
    resumed = launch(with_idle(), optimizer, schedule, micro_batch_size=4, config=EngineConfig(zero_stage=stage))
    resumed.load(tmp_path)
    train_engine(resumed, batches(1))
    with resumed.whole_parameters():
        assert resumed.module.idle.tolist() == pytest.approx([7.0] * 3, rel=1e-3), "but for its decay"
    resumed.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_snapshot_stays_as_it_is_while_training_goes_on(tmp_path, stage):
    engine = launch(module(), optimizer, schedule, micro_batch_size=4, config=EngineConfig(zero_stage=stage))
    train_engine(engine, batches(2))
    snapshot = engine.snapshot()
    expected = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    train_engine(engine, batches(2))
    snapshot.write(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / STATE), expected, rtol=0, atol=0)
    again = engine.snapshot()
    assert all((again.tensors[name] != tensor).any() for name, tensor in expected.items())
    assert all(tensor.data_ptr() == snapshot.tensors[name].data_ptr() for name, tensor in again.tensors.items())
    engine.close()


@pytest.mark.parametrize(("ranks", "given", "stage"), [(1, None, 0), (4, None, 1), (1, 1, 1), (4, 0, 0), (4, 3, 3)])
def test_nothing_is_sharded_for_one_rank_unless_it_is_asked_for(ranks, given, stage):
    assert EngineConfig(zero_stage=given).stage(ranks) == stage


@pytest.mark.parametrize("stage", [0, 1])
def test_the_gradients_norm_is_that_before_clipping(stage):
    config = EngineConfig(zero_stage=stage, gradient_clipping=0.01)
    engine = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    plain, x = module(), batches(1)[0]
    assert engine.gradient_norms() == []
    train_engine(engine, [x])
    plain(x).square().mean().backward()
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
    assert engine.gradient_norms() == [pytest.approx(expected.item(), rel=1e-5)]
    engine.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_optimizer_step_since_the_last_question_has_its_norm(stage):
    config = EngineConfig(zero_stage=stage, accumulation_steps=2)
    engine = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    train_engine(engine, batches(6))
    norms = engine.gradient_norms()
    assert len(norms) == 3 and len(set(norms)) == 3 and min(norms) > 0
    train_engine(engine, batches(2))
    assert len(engine.gradient_norms()) == 1
    engine.close()


@pytest.mark.parametrize(("stage", "offload"), [(0, False), *itertools.product((1, 2, 3), (False, True))])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_changes_the_rate_alone(tmp_path, stage, offload, bad):
    fused = functools.partial(optimizer, fused=True)
    config = EngineConfig(zero_stage=stage, offload_optimizer=offload)
    engine = launch(module(), fused, schedule, micro_batch_size=4, config=config)
    (x,) = batches(1)
    train_engine(engine, [x])
    engine.snapshot().write(tmp_path)
    before = load_file(tmp_path / STATE)
    for factor in (bad, bad, 1.0):
        if factor == 1.0:
            engine.snapshot().write(tmp_path)
            for name, expected in before.items():
                torch.testing.assert_close(load_file(tmp_path / STATE)[name], expected, rtol=0, atol=0)
        engine.backward(engine(x).square().mean() * factor)
        engine.step()
    assert [math.isfinite(norm) for norm in engine.gradient_norms()] == [True, False, False, True]
    assert engine.learning_rate() == pytest.approx(0.02 / 5)
    assert any((load_file(tmp_path / STATE)[name] != engine.module.state_dict()[name[7:]]).any()
               for name in before if name.startswith("module."))  # fmt: skip
    engine.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_state_is_taken_up_at_the_rate_of_today(tmp_path, stage):
    config = EngineConfig(zero_stage=stage)
    engine = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    train_engine(engine, batches(3))
    engine.snapshot().write(tmp_path)
    engine.close()
    slower = launch(module(), functools.partial(optimizer, lr=0.002), schedule, micro_batch_size=4, config=config)
    slower.load(tmp_path)
    assert slower.learning_rate() == pytest.approx(0.002 / 4)
    slower.close()


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def damaged(content, how, tmp_path):
    header = int.from_bytes(content[:8], "little")
    return {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "length": (1 << 62).to_bytes(8, "little") + content[8:],
        "header": content[:8] + b"x" * header + content[8 + header :],
        "pickle": pickle.dumps(Trap(tmp_path / "ran")),
        "other tensors": save(
            {"module.0.weight": torch.zeros(3)}, metadata={"format": "1", "steps": "1", "updates": "1"}
        ),
        "other facts": save({}, metadata={"format": "1", "steps": "many", "updates": "1"}),
    }[how]


@pytest.mark.parametrize("how", ["empty", "cut", "length", "header", "pickle", "other tensors", "other facts"])
def test_a_state_of_a_stranger_is_refused_in_one_line_and_runs_nothing(tmp_path, how):
    engine = launch(module(), optimizer, schedule, micro_batch_size=4, config=EngineConfig())
    engine.snapshot().write(tmp_path)
    path = tmp_path / STATE
    path.write_bytes(damaged(path.read_bytes(), how, tmp_path))
    with pytest.raises(EngineError, match=re.escape(str(path))) as refused:
        engine.load(tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / "ran").exists()
    engine.close()


def test_no_clipping_leaves_gradients_as_they_are():
    config = EngineConfig(gradient_clipping=0)
    model = module()
    plain = copy.deepcopy(model)
    engine = launch(model, optimizer, schedule, micro_batch_size=4, config=config)
    train_engine(engine, batches(3))
    train_plain(plain, batches(3), math.inf, 1)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    engine.close()


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    fused = functools.partial(optimizer, fused=True)
    engine = launch(module(), fused, schedule, micro_batch_size=4, config=EngineConfig())
    waits = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *device: waits.append(device))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append(tensor))
    train_engine(engine, batches(5))
    assert not waits
    engine.close()


class AutocastProbe(torch.nn.Module):
    """Tells the dtype of a product in its forward, with an autocast of its own around it or not."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 1)
        self.own = own

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16) if self.own else contextlib.nullcontext():
            product = self.layer(x)
        self.dtype = product.dtype
        return product.float()


@pytest.mark.parametrize(("own", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_autocast_works_within_a_module_and_is_switched_off_around_the_engine(own, dtype):
    """DeepSpeed looks at CUDA's autocast state alone, so that is set here to see on a CPU what a GPU would do."""
    model = AutocastProbe(own)
    engine = launch(model, optimizer, schedule, micro_batch_size=4, config=EngineConfig())
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            engine(batches(1)[0])
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert model.dtype == dtype
    engine.close()


def test_a_network_is_compiled_where_that_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(options))
    launch(module(), optimizer, schedule, micro_batch_size=4, config=EngineConfig()).close()
    assert not compiled
    launch(module(), optimizer, schedule, micro_batch_size=4, config=EngineConfig(compile=True)).close()
    assert compiled == [{"dynamic": False}]


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_parameters_are_at_hand_at_every_stage(stage):
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 400)  # large enough for stage 3 to scatter
    expected = model.weight.detach().clone()
    engine = launch(model, optimizer, schedule, micro_batch_size=4, config=EngineConfig(zero_stage=stage))
    with engine.whole_parameters():
        torch.testing.assert_close(model.state_dict()["weight"], expected)
    engine.close()
