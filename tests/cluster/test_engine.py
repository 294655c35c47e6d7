"""The DeepSpeed engine without a launcher: one CPU process does what plain PyTorch does."""

import copy
import functools

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist.cluster.engine import EngineConfig, launch


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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_saved_engine_goes_on_as_if_never_stopped(tmp_path, stage):
    config = EngineConfig(zero_stage=stage)
    whole = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    train_engine(whole, batches(3))
    whole.save(tmp_path)
    train_engine(whole, batches(6)[3:])
    x = batches(1)[0]
    expected = whole(x).detach().clone()
    whole.close()

    resumed = launch(module(), optimizer, schedule, micro_batch_size=4, config=config)
    resumed.load(tmp_path)
    train_engine(resumed, batches(6)[3:])
    torch.testing.assert_close(resumed(x), expected, rtol=0, atol=0)
    resumed.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_parameters_are_at_hand_at_every_stage(stage):
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 400)  # large enough for stage 3 to scatter
    expected = model.weight.detach().clone()
    engine = launch(model, optimizer, schedule, micro_batch_size=4, config=EngineConfig(zero_stage=stage))
    with engine.whole_parameters():
        torch.testing.assert_close(model.state_dict()["weight"], expected)
    engine.close()
