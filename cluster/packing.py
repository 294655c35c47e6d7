"""How many trials one GPU holds: by what a few steps of one took of its memory, instead of by guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixcl_dist.cluster.ray import RayError
from mixcl_dist.cluster.trials import Report, TrialsConfig, joined

HEADROOM = 1.1
"""Times the peak of a few steps: the blocks of a longer trial leave holes between them."""
CURE = "give trials.gpus a share, as 0.5"


@dataclass(frozen=True)
class GpuMemory:
    """Of one GPU, in bytes, once a probe has worked on it."""

    peak: int
    """Most that its process held for tensors."""
    beside: int
    """What the process took beside that, for its CUDA context, and whatever else was there."""
    total: int

    @property
    def trials(self) -> int:
        """How many such processes it holds, at least one."""
        return max(1, int(self.total / (HEADROOM * self.peak + self.beside)))

    @property
    def share(self) -> float:
        """Of the GPU for each of them, in the steps of 1/10,000 that Ray counts in."""
        return 10_000 // self.trials / 10_000


def measure(
    function: Callable[[dict[str, Any], Report], dict[str, Any]],
    probes: Sequence[dict[str, Any]],
    *,
    storage: Path,
    read: Sequence[Path] = (),
    config: TrialsConfig,
) -> GpuMemory:
    """The memory of the probe that took most: short trials, each called as `trials.run_trials` would, one after the
    other on a GPU that no other trial has, in a process that ends.

    Raises `RayError` where there is no GPU, or a probe fails on it or leaves it alone.
    """
    with joined(config, storage, read):
        import ray

        # Ended with its one call: what it holds would be missing to the trials.
        remote = ray.remote(num_cpus=config.cpus, num_gpus=1, max_calls=1, max_retries=0)(_probe)
        found: list[GpuMemory | None] = []
        for probe in probes:
            try:
                found.append(ray.get(remote.remote(function, probe)))
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                raise RayError(f"trials.gpus measured: a few steps of a trial failed: {last}; {CURE}") from None
    took = [memory for memory in found if memory is not None]
    if len(took) < len(found):
        raise RayError(f"trials.gpus measured: a few steps of a trial took no memory of the GPU; {CURE}")
    return max(took, key=lambda memory: memory.peak)


def _probe(function: Callable[[dict[str, Any], Report], dict[str, Any]], trial: dict[str, Any]) -> GpuMemory | None:
    import torch

    function(trial, lambda figures: None)
    if not torch.cuda.is_available() or not (peak := torch.cuda.max_memory_reserved()):
        return None
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(peak=peak, beside=total - free - torch.cuda.memory_reserved(), total=total)
