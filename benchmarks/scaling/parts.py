"""One rank's measurement of the parts of an exchange: run by torchrun, prints a line of JSON from rank 0.

python -m torch.distributed.run --standalone --nproc-per-node=2 parts.py ROWS WIDTH PARAMETERS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import distributed

from mixcl_dist.kernels import mixed_contrastive_loss

ROUNDS = 7


def main() -> None:
    rows, width, parameters = map(int, sys.argv[1:])
    distributed.init_process_group("gloo")
    block, gradients = torch.ones(rows * width), torch.ones(parameters)
    gathered = torch.empty(distributed.get_world_size() * block.numel())
    number, numbers = torch.ones(1), torch.empty(distributed.get_world_size())
    group = distributed.group.WORLD
    found = {
        "loss_alone": seconds(lambda: loss(rows, width, None)),
        "loss_together": seconds(lambda: loss(rows, width, group)),
        "gather": seconds(lambda: distributed.all_gather_into_tensor(gathered, block)),
        "reduce": seconds(lambda: distributed.all_reduce(gradients)),
        "gather_number": seconds(lambda: distributed.all_gather_into_tensor(numbers, number)),
        "reduce_number": seconds(lambda: distributed.all_reduce(number)),
    }
    if distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    distributed.destroy_process_group()


def loss(rows: int, width: int, group: distributed.ProcessGroup | None) -> None:
    """Forward and backward over rows of pairs of views, of which nothing is labelled."""
    rank = 0 if group is None else group.rank()
    embeddings = torch.nn.functional.normalize(torch.randn(rows, width), dim=1).requires_grad_()
    identity = torch.arange(rows) // 2 + rank * rows
    sets, table = torch.zeros(rows, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    mixed_contrastive_loss(embeddings, identity, sets, table, process_group=group).loss.backward()


def seconds(call: Callable[[], object]) -> float:
    """The median of some calls that all ranks begin together."""
    times = []
    for _ in range(ROUNDS + 1):
        distributed.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
