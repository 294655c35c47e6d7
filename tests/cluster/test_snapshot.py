"""A snapshot of several ranks keeps no step waiting, and is of the step at which it was taken."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from .ranks import finish, start

PROGRAM = """
import functools, itertools, os, sys, time
from pathlib import Path
import torch
from torch.optim.lr_scheduler import LambdaLR
from mixcl_dist.cluster.engine import EngineConfig, launch

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
optimizer = functools.partial(torch.optim.AdamW, lr=0.02, fused=True)
schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1.0)


def train(engine, first, last):
    generator = torch.Generator().manual_seed(1)
    for x in [torch.randn(4, 6, generator=generator) for _ in range(last)][first:]:
        engine.backward(engine(x[2 * rank : 2 * rank + 2]).square().mean())
        engine.step()


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def snapshot_in_turns(engine, name):
    if rank == 1:
        wait_for(folder / name)
    taken = engine.snapshot()
    (folder / name).touch()  # the first time rank 0 is here, rank 1 has not even begun
    return taken


def written(snapshot, name):
    if rank == 0:
        (folder / name).mkdir()
        snapshot.write(folder / name)
    torch.distributed.barrier()


for stage, offload in ((0, False), *itertools.product((1, 2, 3), (False, True))):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 37), torch.nn.GELU(), torch.nn.Linear(37, 11))
    module.register_buffer("seen", torch.tensor(7))
    config = EngineConfig(zero_stage=stage, offload_optimizer=offload)
    engine = launch(module, optimizer, schedule, micro_batch_size=2, config=config)
    name = f"{stage}-{offload}"
    train(engine, 0, 1)
    written(engine.snapshot(), f"{name}-first")
    train(engine, 1, 3)
    taken = snapshot_in_turns(engine, f"{name}-turn")
    train(engine, 3, 6)
    written(taken, f"{name}-late")
    engine.load(folder / f"{name}-first")
    train(engine, 1, 3)
    written(engine.snapshot(), f"{name}-expected")
torch.distributed.barrier()
os._exit(0)  # none of these engines was closed, so threads of their watchdogs are still at work
"""


@pytest.mark.slow
def test_no_rank_waits_for_another_and_later_steps_change_nothing(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for code, _, errors in finish(start([program, tmp_path], 2)):
        assert code == 0, errors
    saved = {path.parent.name: load_file(path) for path in tmp_path.glob("*/engine.safetensors")}
    assert len(saved) == 3 * 7 and all(len(tensors) == 5 + 2 * 4 for tensors in saved.values())
    for name in [name.removesuffix("-late") for name in saved if name.endswith("-late")]:
        torch.testing.assert_close(saved[f"{name}-late"], saved[f"{name}-expected"], rtol=0, atol=0)
        torch.testing.assert_close(saved[f"{name}-late"], saved["0-False-late"], rtol=1e-4, atol=1e-5)
