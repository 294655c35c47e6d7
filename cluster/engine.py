"""The one DeepSpeed import: the same engine for one CPU process and for ZeRO over many nodes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over the ranks: 1 optimizer states, 2 also gradients, 3 also parameters."""
    accumulation_steps: int = 1
    """Backward passes for each optimizer step."""
    gradient_clipping: float = 1.0
    """Largest norm of the global gradient."""


class Engine(Protocol):
    """What the training loop needs of a distributed engine."""

    device: torch.device
    rank: int
    world_size: int
    module: torch.nn.Module

    def __call__(self, *args: Any) -> Any: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> None: ...
    def learning_rate(self) -> float: ...
    def gradient_norm(self) -> float: ...
    def barrier(self) -> None: ...
    def whole_parameters(self) -> AbstractContextManager: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...
    def close(self) -> None: ...


def launch(
    module: torch.nn.Module,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    *,
    micro_batch_size: int,
    config: EngineConfig,
) -> Engine:
    """Wrap `module` in a DeepSpeed engine; without a launcher it is a group of one process, no MPI needed.

    `micro_batch_size` is the number of samples of one rank in one backward pass. Under a launcher (RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT in the environment) the process joins that group.
    """
    alone = _stand_alone()
    deepspeed = _import_deepspeed()

    if alone:
        # One process has nobody to share memory with: this spares a C++ build of half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer(parameters),
        lr_scheduler=scheduler,
        config={
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": config.accumulation_steps,
            "gradient_clipping": config.gradient_clipping,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        },
    )
    return _DeepSpeed(engine)


def world_size() -> int:
    """Processes in the group that a launcher has described, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _DeepSpeed:
    """`Engine` over a `deepspeed.DeepSpeedEngine`."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.device = engine.device
        self.rank = engine.global_rank
        self.world_size = engine.world_size
        self.module = engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    def gradient_norm(self) -> float:
        """Norm of the global gradient before clipping; NaN before the first step and at ZeRO stage 0."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def barrier(self) -> None:
        from deepspeed import comm

        comm.barrier()

    def whole_parameters(self) -> AbstractContextManager:
        """Block in which `module` holds all its parameters, which ZeRO stage 3 scatters over the ranks otherwise."""
        if self._engine.zero_optimization_stage() < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.module.parameters()))

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag="engine")

    def close(self) -> None:
        from deepspeed import comm

        self._engine.destroy()
        comm.destroy_process_group()


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its notices; what it has to say as a warning is still said."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _stand_alone() -> bool:
    """Describe a group of one in the environment unless a launcher has described another; tell whether it is so."""
    if world_size() > 1:
        return False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)
    return True
