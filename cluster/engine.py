"""The one DeepSpeed import: the same engine for one CPU process and for ZeRO over many nodes."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pydantic.dataclasses
from pydantic import ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class EngineConfig:
    """How a step is computed by one process or many."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What ZeRO shards over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters; None is 0
    for one rank and 1 for several."""
    accumulation_steps: Annotated[int, Field(ge=1, le=10**6, strict=True)] = 1
    """Backward passes for each optimizer step."""
    gradient_clipping: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Largest norm of the global gradient; 0 leaves it as it is."""
    compile: bool = False
    """Let `torch.compile` make the network's kernels, which takes minutes once."""


class Engine(Protocol):
    """What the training loop needs of a distributed engine."""

    device: torch.device
    rank: int
    world_size: int
    module: torch.nn.Module
    process_group: ProcessGroup | None
    """All ranks, None where there is one alone."""

    def __call__(self, *args: Any) -> Any: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> None: ...
    def learning_rate(self) -> float: ...
    def gradient_norms(self) -> list[float]: ...
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
    MASTER_ADDR, MASTER_PORT in the environment) the process joins that group. DeepSpeed switches off an autocast
    around the engine on a GPU, so a module that wants one has it within its forward. At ZeRO stage 0 nothing in a step
    waits for the device.
    """
    alone = _stand_alone()
    deepspeed = _import_deepspeed()
    stage = _zero_stage(config)

    if config.compile:
        module.compile(dynamic=False)
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
            "gradient_clipping": config.gradient_clipping if stage else 0.0,  # see `_DeepSpeed.step`
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
            # It would wait for the device twice in every step.
            "timers": {"throughput": {"enabled": False}},
        },
    )
    if not stage and alone:
        engine.enable_backward_allreduce = False  # there is nobody to reduce with: it would only copy all gradients
    return _DeepSpeed(engine, config.gradient_clipping)


def _zero_stage(config: EngineConfig) -> int:
    return config.zero_stage if config.zero_stage is not None else int(world_size() > 1)


def world_size() -> int:
    """Processes in the group that a launcher has described, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _DeepSpeed:
    """`Engine` over a `deepspeed.DeepSpeedEngine`."""

    def __init__(self, engine: Any, gradient_clipping: float):
        import torch

        self._engine = engine
        self._largest_norm = gradient_clipping or math.inf
        self._norms: list[torch.Tensor | float | None] = []
        self.device = engine.device
        self.rank = engine.global_rank
        self.world_size = engine.world_size
        self.module = engine.module
        self.process_group = torch.distributed.group.WORLD if engine.world_size > 1 else None

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        from torch.nn.utils import clip_grad_norm_

        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        elif self._engine.zero_optimization_stage():
            self._engine.step()
            self._norms.append(self._engine.get_global_grad_norm())
        else:  # DeepSpeed would clip with a few kernels for each parameter and constants that the host waits for
            self._norms.append(clip_grad_norm_(self.module.parameters(), self._largest_norm))
            self._engine.step()

    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    def gradient_norms(self) -> list[float]:
        """Norm of the global gradient before clipping, of each step since the last call; waits for the device."""
        norms, self._norms = self._norms, []
        return [float("nan") if norm is None else float(norm) for norm in norms]

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
