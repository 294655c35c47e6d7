"""The contrast of two ranks under the DeepSpeed engine: one step is that of one process with the rows of both."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist.cluster.engine import EngineConfig, launch
from mixcl_dist.kernels import MixedContrastiveLoss

RANKS = 2
COUNTS = [19, 45]
TABLE = torch.cat([torch.eye(3), torch.ones(1, 3)]).bool()
STEPS = 3

optimizer = functools.partial(torch.optim.SGD, lr=0.05)
schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1)


class NetworkWithLoss(torch.nn.Module):
    def __init__(self, process_group=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        self.loss = MixedContrastiveLoss(TABLE, learnable_temperature=True)
        self.process_group = process_group

    def forward(self, inputs, *rows):
        embeddings = normalize(self.layers(inputs), dim=1)
        return self.loss(embeddings, *rows, process_group=self.process_group).loss


def batch() -> list[torch.Tensor]:
    """Inputs, identities and candidate sets of the rows of all ranks."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(COUNTS)
    inputs = torch.randn(rows, 5, generator=generator)
    return [inputs, *(torch.randint(low, high, (rows,), generator=generator) for low, high in ((-1, 20), (0, 4)))]


def train(stage: int, answer: str) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    # The engine is what joins the group, and the group is what the loss needs: it is given once it is there.
    network = NetworkWithLoss()
    config = EngineConfig(zero_stage=stage, gradient_clipping=1e9)
    engine = launch(network, optimizer, schedule, micro_batch_size=1, config=config)
    network.process_group = torch.distributed.group.WORLD
    own = [values.split(COUNTS)[engine.rank] for values in batch()]
    losses = []
    for _ in range(STEPS):
        loss = engine(*own)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    with engine.whole_parameters():
        if engine.rank == 0:
            parameters = {name: values.detach().clone() for name, values in network.named_parameters()}
            torch.save((losses, parameters), answer)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_are_those_of_one_process_with_the_rows_of_all_ranks(tmp_path, stage):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    arguments = [__file__, str(stage), str(tmp_path / "answer.pt")]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses, parameters = torch.load(tmp_path / "answer.pt")

    network = NetworkWithLoss()
    plain = optimizer(network.parameters())
    for got in losses:
        loss = network(*batch())
        assert got == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        plain.step()
        plain.zero_grad()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameters[name], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name)


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2])
    # A thread of gloo that still holds the last tensor would abort an interpreter that is shutting down (PyTorch 2.13).
    os._exit(0)
