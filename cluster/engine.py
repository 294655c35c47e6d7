"""The one door to DeepSpeed: the same engine for one CPU process and for ZeRO over many nodes."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from mixcl_dist.cluster.errors import EngineError
from mixcl_dist.cluster.group import ToldError, described
from mixcl_dist.cluster.meeting import (
    LATER_S,
    compare,
    gather,
    group_of_hosts,
    limit_waits,
    lost_ranks,
    meet_nobody,
    set_environment,
    watched,
)
from mixcl_dist.cluster.snapshot import STATE, Snapshot, Snapshots
from mixcl_dist.cluster.state import EngineState, read_state
from mixcl_dist.cluster.watchdog import Watchdog

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class EngineConfig:
    """How a step is computed by one process or many."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What ZeRO shards over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters; None is 0
    for one rank without offloading and 1 otherwise."""
    accumulation_steps: Annotated[int, Field(ge=1, le=10**6, strict=True)] = 1
    """Backward passes for each optimizer step."""
    gradient_clipping: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Largest norm of the global gradient; 0 leaves it as it is."""
    activation_checkpointing: bool = False
    """Keep no block's activations for the backward pass, which computes them again: less memory, and a third more
    arithmetic."""
    communication_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients are added up in between ranks; bfloat16 halves what crosses the network, and rounds."""
    bucket_size: Annotated[int, Field(ge=1024, le=10**10, strict=True)] = 500_000_000
    """Largest number of weights whose gradients ranks exchange at once, at ZeRO stage 1 and above; fewer need less
    memory."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in main memory and take its steps on the CPU, at ZeRO stage 1 and above: less GPU
    memory, and a step that is as slow as the CPU."""
    compile: bool = False
    """Let `torch.compile` make the network's kernels, which takes minutes once."""
    timeout_s: Annotated[float, Field(gt=0, le=10**6)] = 600.0
    """Seconds that the longest step may take, its probe and a shard that is slow to come included: then the rank that
    hangs is named, and all ranks end."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer is for ZeRO; set zero_stage to 1, 2 or 3, or leave it out")

    def stage(self, world_size: int) -> int:
        """ZeRO's stage for so many ranks."""
        if self.zero_stage is not None:
            return self.zero_stage
        return int(self.offload_optimizer or world_size > 1)


class Engine(Protocol):
    """What the training loop needs of a distributed engine."""

    device: torch.device
    rank: int
    world_size: int
    module: torch.nn.Module
    process_group: ProcessGroup | None
    """All ranks, None where there is one alone."""

    def __call__(self, *args: Any) -> Any: ...
    def doing(self, what: str) -> None: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> None: ...
    def learning_rate(self) -> float: ...
    def scale_rate(self, factor: float) -> None: ...
    def gradient_norms(self) -> list[float]: ...
    def barrier(self) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...
    def any(self, flag: bool) -> bool: ...
    def together(self) -> AbstractContextManager: ...
    def whole_parameters(self) -> AbstractContextManager: ...
    def snapshot(self) -> Snapshot: ...
    def load(self, folder: Path) -> None: ...
    def close(self) -> None: ...


def launch(
    module: torch.nn.Module,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    *,
    micro_batch_size: int,
    config: EngineConfig,
    common: Mapping[str, Any] | None = None,
    stacks: Path | None = None,
) -> Engine:
    """Wrap `module` in a DeepSpeed engine; without a launcher it is a group of one process, no MPI needed.

    `micro_batch_size` is the number of samples of one rank in one backward pass. Under a launcher (`described`) the
    process joins that group; `common` are the settings, as JSON has them, that all its ranks must have alike. Where a
    rank hangs, each one leaves the stacks of its threads in the folder `stacks`.
    `optimizer` makes an Adam or AdamW, `scheduler` a schedule whose rate is a function of its `last_epoch` alone.
    DeepSpeed switches off an autocast around the engine on a GPU, so a module that wants one has it within its forward.
    At ZeRO stage 0 nothing in a step waits for the device. A step whose gradient is not finite changes nothing but the
    rate (at stage 0 where the optimizer is one with `fused=True`).
    Raises `GroupError`, and `EngineError` where ranks are missing or differ.
    """
    group = described()
    alone = group.world_size == 1
    deepspeed = _import_deepspeed()
    set_environment(group)
    stage = config.stage(group.world_size)

    if config.compile:
        module.compile(dynamic=False)
    # It serves inference alone, and its C++ build takes half a minute and leaves a lock where it is killed, on which
    # every later start would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with lost_ranks(config.timeout_s):
        if alone:
            meet_nobody(deepspeed.get_accelerator().communication_backend_name())
        deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=config.timeout_s))
        compare(common or {}, group)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer(parameters),
        lr_scheduler=scheduler,
        config=_settings(config, stage, micro_batch_size),
    )
    limit_waits(config.timeout_s + LATER_S)
    if not stage and alone:
        engine.enable_backward_allreduce = False  # there is nobody to reduce with: it would only copy all gradients
    return _DeepSpeed(engine, config, None if alone else watched(group, config.timeout_s, stacks))


def _settings(config: EngineConfig, stage: int, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    import torch

    zero: dict[str, Any] = {"stage": stage}
    zero |= {"reduce_bucket_size": config.bucket_size, "allgather_bucket_size": config.bucket_size}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.gradient_clipping if stage else 0.0,  # see `_DeepSpeed.step`
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # which is built in C++ when it first runs, as torch's fused one is not
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[config.communication_dtype],
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        # It would wait for the device twice in every step.
        "timers": {"throughput": {"enabled": False}},
    }


class _DeepSpeed:
    """`Engine` over a `deepspeed.DeepSpeedEngine`."""

    def __init__(self, engine: Any, config: EngineConfig, watchdog: Watchdog | None):
        import torch

        self._engine, self._watchdog = engine, watchdog
        self._largest_norm = config.gradient_clipping or math.inf
        self._timeout_s = config.timeout_s
        self._norms: list[torch.Tensor | float] = []
        self._optimizer: Any = engine.basic_optimizer  # torch's own, within DeepSpeed's
        self.device = engine.device
        self.rank = engine.global_rank
        self.world_size = engine.world_size
        self.module = engine.module
        self.process_group = torch.distributed.group.WORLD if engine.world_size > 1 else None
        self._hosts, saving = (
            group_of_hosts(config.timeout_s + LATER_S) if self.world_size > 1 else None for _ in range(2)
        )
        self._state = EngineState(engine)
        self._snapshots = Snapshots(self.rank, self.world_size, saving, of_gpu=self.device.type == "cuda")

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def doing(self, what: str) -> None:
        """Tell the other ranks that this one goes on, and with what."""
        if self._watchdog:
            self._watchdog.doing(what)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        from torch.nn.utils import clip_grad_norm_

        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        elif self._engine.zero_optimization_stage():
            self._engine.step()
            applied = self._engine.was_step_applied()  # DeepSpeed leaves out a step whose gradient is not finite
            self._norms.append(self._engine.get_global_grad_norm() if applied else math.inf)
            if not applied:
                self._engine.lr_scheduler.step()  # the rate is one of the run's step
        else:  # DeepSpeed would clip with a few kernels for each parameter and constants that the host waits for
            norm = clip_grad_norm_(self.module.parameters(), self._largest_norm)
            self._norms.append(norm)
            if self._optimizer.defaults.get("fused"):
                self._optimizer.found_inf = (~norm.isfinite()).float()  # its kernel then leaves all as it is
            self._engine.step()

    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    def scale_rate(self, factor: float) -> None:
        """Let the schedule give `factor` times its rates, from the next `load` or step on."""
        schedule = self._engine.lr_scheduler
        schedule.base_lrs = [factor * rate for rate in schedule.base_lrs]

    def gradient_norms(self) -> list[float]:
        """Norm of the global gradient before clipping, of each step since the last call; waits for the device.

        The same on all ranks. One that is not finite is of a step that was left out.
        """
        norms, self._norms = self._norms, []
        return [float(norm) for norm in norms]

    def barrier(self) -> None:
        from deepspeed import comm

        comm.barrier()

    def whole_parameters(self) -> AbstractContextManager:
        """Block in which `module` holds all its parameters, which ZeRO stage 3 scatters over the ranks otherwise."""
        if self._engine.zero_optimization_stage() < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.module.parameters()))

    def gather(self, value: Any) -> list[Any]:
        """The `value` of each rank, as JSON has it."""
        return gather(value, self.world_size)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; their hosts wait for each other, for no device."""
        if self._hosts is None:
            return flag
        import torch
        from torch import distributed

        raised = torch.tensor([int(flag)])
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=self._hosts)
        return bool(raised)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Block in which the loss of another rank is an `EngineError` that names it, or ends this process.

        What ends this rank in the block is told to the others.
        """
        try:
            with lost_ranks(self._timeout_s, self._watchdog):
                yield
        except BaseException as error:
            if self._watchdog:
                alone = not isinstance(error, ToldError) and self._watchdog.claim()
                self._watchdog.leave(" ".join(str(error).split()) or type(error).__name__ if alone else "")
            raise

    def snapshot(self) -> Snapshot:
        """Copy the whole state to rank 0, which must be able to hold it in main memory; every rank has to call.

        Waits for the copy of this rank's own part alone: rank 0 gets the others beside whatever follows.
        """
        updates = self._state.updates()
        facts = {"format": "1", "steps": str(self._engine.global_steps), "updates": str(updates)}
        return self._snapshots.take(self._state.whole(updates), self._state.parts(updates), facts)

    def load(self, folder: Path) -> None:
        """Take up what any number of ranks saved at any ZeRO stage; raises `EngineError`.

        Rates and decays are this engine's. The file holds numbers alone: nothing in it can be run.
        """
        path = folder / STATE
        tensors, steps, updates = read_state(path)
        expected = {name: like.shape for name, like in self._state.whole(updates).items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if differing := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            raise EngineError(f"{path}: is of another network, {differing[0]} first; go on with the run's own settings")
        self._state.take_up(tensors, updates)
        self._engine.global_steps = steps
        if steps:
            scheduler = self._engine.lr_scheduler
            scheduler.last_epoch, scheduler._step_count = steps - 1, steps + 1
            scheduler.step()

    def close(self) -> None:
        from deepspeed import comm

        if self._watchdog:
            self._watchdog.leave("")
        self._snapshots.close()
        self._engine.destroy()
        comm.destroy_process_group()


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its notices; what it has to say as a warning is still said."""
    import torch

    # It is DeepSpeed that calls them, several times in every step.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
