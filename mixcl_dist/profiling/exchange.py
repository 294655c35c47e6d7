"""What the parts of an exchange between ranks cost on this machine: run by torchrun, a line of JSON from rank 0.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m mixcl_dist.profiling.exchange ROWS WIDTH PARAMETERS
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping

import torch
from torch import distributed
from torch.utils.benchmark import timer

from mixcl_dist.cluster.group import leave
from mixcl_dist.errors import RunError
from mixcl_dist.kernels import mixed_contrastive_loss
from mixcl_dist.precision import row_dtype

ROUNDS = 7


def measured_parts(
    ranks: int, rows: int, width: int, parameters: int, environment: Mapping[str, str]
) -> dict[str, float]:
    """Seconds of each part among `ranks` processes of this machine, each with a GPU where there are any; of the loss
    over `rows` rows of a rank, alone and together, forward and backward. Raises `RunError`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = ["-m", __name__, *map(str, (rows, width, parameters))]
    done = subprocess.run([*torchrun, *program], env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{ranks} processes could not exchange anything here ({problem}); see mixcl doctor --cluster")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    rows, width, parameters = map(int, sys.argv[1:])
    device = _device()
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = distributed.get_world_size()
    block = torch.ones(rows * width, dtype=row_dtype(device), device=device)
    gradients = torch.ones(parameters, device=device)
    number, numbers = torch.ones(1, device=device), torch.empty(ranks, device=device)
    gathered = block.new_empty(ranks * block.numel())
    group = distributed.group.WORLD
    found = {
        "loss_alone": seconds(lambda: loss(rows, width, device, None)),
        "loss_together": seconds(lambda: loss(rows, width, device, group)),
        "gather": seconds(lambda: distributed.all_gather_into_tensor(gathered, block)),
        "reduce": seconds(lambda: distributed.all_reduce(gradients)),
        "gather_number": seconds(lambda: distributed.all_gather_into_tensor(numbers, number)),
        "reduce_number": seconds(lambda: distributed.all_reduce(number)),
    }
    if distributed.get_rank() == 0:
        print(json.dumps(found))
    distributed.destroy_process_group()
    leave(0)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def loss(rows: int, width: int, device: torch.device, group: distributed.ProcessGroup | None) -> None:
    """Forward and backward over rows of pairs of views, of which nothing is labelled."""
    rank = 0 if group is None else group.rank()
    random = torch.randn(rows, width, device=device)
    embeddings = torch.nn.functional.normalize(random, dim=1).to(row_dtype(device)).requires_grad_()
    identity = torch.arange(rows, device=device) // 2 + rank * rows
    sets = torch.zeros(rows, dtype=torch.int64, device=device)
    table = torch.ones(1, 2, dtype=torch.bool, device=device)
    mixed_contrastive_loss(embeddings, identity, sets, table, process_group=group).loss.backward()


def seconds(call: Callable[[], object]) -> float:
    """The median of some calls that all ranks begin together."""
    times = []
    for _ in range(ROUNDS + 1):
        distributed.barrier()
        begin = timer()  # which waits for a GPU
        call()
        times.append(timer() - begin)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
