"""The least time that the parts of a pre-training step can take: bytes over bandwidth, FLOP over the matmul rate.

Legend: V views of E³ voxels, P parameters, N rows of width D. Floors count what no implementation can leave out, each
input and output once, in 16 bits where the step computes in bfloat16; they say how far off a part is, not why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from mixcl_dist import constants
from mixcl_dist.config import Config
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.precision import has_bfloat16

HALF, SINGLE = 2, 4  #: bytes
COPY_BYTES = 2**30  #: of a GPU; of a CPU an eighth
GPU_MATMUL, CPU_MATMUL = 8192, 2048  #: rows and columns


class Rates(NamedTuple):
    """What a machine reaches at best."""

    flop: float
    """A second, of a product of matrices, in the numbers that a network is computed in (see `precision`)."""
    bandwidth: float
    """Bytes a second, read and written, of a copy."""


@dataclass(frozen=True)
class Work:
    """What a part has to do at least."""

    flop: float = 0.0
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        return max(self.flop / rates.flop, self.bytes / rates.bandwidth)


def floors(config: Config) -> dict[str, Work]:
    """By part, for one step of a configuration on one rank; from shapes alone."""
    views, voxels = 2 * config.pretrain.batch_size, torch.Size(config.views.size).numel()
    rows = views * config.rows.per_view_pair
    forward, backward, parameters = network(config, views)
    width = config.network.voxel_dim
    return {
        # A patch is read for either view; image, clean view and mask are written.
        "views": Work(bytes=views * voxels * (2 * SINGLE + HALF + 1)),
        "network": forward,
        "loss": Work(2 * rows**2 * width, rows * width * HALF + 2 * views * voxels * SINGLE),
        "backward": Work(backward.flop + 4 * rows**2 * width, backward.bytes),
        # Parameter, gradient and both moments are read, all but the gradient written.
        "optimizer": Work(bytes=7 * SINGLE * parameters),
    }


def network(config: Config, views: int) -> tuple[Work, Work, int]:
    """Forward and backward of the network, its convolutions alone, and its number of parameters."""
    constants.forget()
    with FakeTensorMode():  # shapes without numbers
        model = PretrainNetwork(config.network)
        image = torch.empty(views, 1, *config.views.size)
        index = torch.zeros(views * config.rows.per_view_pair, 4, dtype=torch.int64)
        with FlopCounterMode(display=False) as flop, _ConvolutionBytes() as traffic:
            output = model(image, index)
            forward = Work(flop.get_total_flops(), traffic.bytes)
            sum(part.float().sum() for part in output).backward()
    constants.forget()
    backward = Work(flop.get_total_flops() - forward.flop, traffic.bytes - forward.bytes)
    return forward, backward, sum(parameter.numel() for parameter in model.parameters())


class _ConvolutionBytes(TorchDispatchMode):
    """16-bit bytes of all convolutions' inputs and outputs; what stands between two of them can be fused into them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "convolution" in func.__name__:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(HALF * tensor.numel() for tensor in tensors)
        return result


def measured_rates(device: torch.device, seconds: float = 0.5) -> Rates:
    """Of one large product and one large copy, some `seconds` each."""
    is_gpu = device.type == "cuda"
    dtype, size = torch.bfloat16 if has_bfloat16(device) else torch.float32, GPU_MATMUL if is_gpu else CPU_MATMUL
    left, right, out = (torch.rand(size, size, device=device).to(dtype) for _ in range(3))
    source = torch.ones(COPY_BYTES if is_gpu else COPY_BYTES // 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(statement: str) -> float:
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
        return min(timer.blocked_autorange(min_run_time=seconds).times)

    names = {"torch": torch, "left": left, "right": right, "out": out, "source": source, "target": target}
    product = best("torch.matmul(left, right, out=out)")
    return Rates(2 * size**3 / product, 2 * source.numel() / best("target.copy_(source)"))
