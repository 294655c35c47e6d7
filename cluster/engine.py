"""The one DeepSpeed import: the same engine for one CPU process and for ZeRO over many nodes."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from mixcl_dist.cluster.errors import ClusterError
from mixcl_dist.cluster.group import Group, ToldError, described, told_by_first
from mixcl_dist.cluster.snapshot import MODULE, STATE, Part, Snapshot, Snapshots
from mixcl_dist.cluster.watchdog import CURE, Watchdog

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


LATER_S = 30.0
"""By which collectives wait longer than the watchdog, which knows more."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep of every parameter."""


class EngineError(ClusterError):
    """Ranks that do not fit together, or a state that cannot be taken up; the message is one line with the cure."""


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
    _set_environment(group)
    stage = config.stage(group.world_size)

    if config.compile:
        module.compile(dynamic=False)
    # It serves inference alone, and its C++ build takes half a minute and leaves a lock where it is killed, on which
    # every later start would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _lost_ranks(config.timeout_s):
        if alone:
            _meet_nobody(deepspeed.get_accelerator().communication_backend_name())
        deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=config.timeout_s))
        _compare(common or {}, group)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer(parameters),
        lr_scheduler=scheduler,
        config=_settings(config, stage, micro_batch_size),
    )
    _limit_waits(config.timeout_s + LATER_S)
    if not stage and alone:
        engine.enable_backward_allreduce = False  # there is nobody to reduce with: it would only copy all gradients
    return _DeepSpeed(engine, config, None if alone else _watchdog(group, config.timeout_s, stacks))


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
            _group_of_hosts(config.timeout_s + LATER_S) if self.world_size > 1 else None for _ in range(2)
        )
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
        return _gather(value, self.world_size)

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
            with _lost_ranks(self._timeout_s, self._watchdog):
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
        updates = self._updates()
        facts = {"format": "1", "steps": str(self._engine.global_steps), "updates": str(updates)}
        return self._snapshots.take(self._whole(updates), self._parts(updates), facts)

    def _whole(self, updates: int) -> dict[str, torch.Tensor]:
        """Names, shapes and types of all that the state holds, on the meta device."""
        import torch

        parameters = dict(self.module.named_parameters())

        def like(name: str, tensor: torch.Tensor) -> torch.Tensor:
            shape = getattr(parameters.get(name), "ds_shape", tensor.shape)  # ZeRO stage 3 has scattered it
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        whole = {f"{MODULE}{name}": like(name, tensor) for name, tensor in self.module.state_dict().items()}
        for name, parameter in self._trained():
            whole |= {_moment(moment, name): like(name, parameter) for moment in MOMENTS if updates}
        return whole

    def _parts(self, updates: int) -> dict[str, Part]:
        """What of it is on this rank; what all ranks have is rank 0's part."""
        scattered = dict(self.module.named_parameters()) if self._engine.zero_optimization_stage() == 3 else {}
        parts = {}
        for name, tensor in self.module.state_dict().items():
            if (parameter := scattered.get(name)) is not None:
                parts[f"{MODULE}{name}"] = self._scattered(parameter, parameter.ds_tensor)
            elif self.rank == 0:
                parts[f"{MODULE}{name}"] = Part(0, tensor.flatten())
        for name, parameter in self._trained():
            for moment in MOMENTS if updates else ():
                if part := self._part_of_moment(parameter, moment):
                    parts[_moment(moment, name)] = part
        return parts

    def load(self, folder: Path) -> None:
        """Take up what any number of ranks saved at any ZeRO stage; raises `EngineError`.

        Rates and decays are this engine's. The file holds numbers alone: nothing in it can be run.
        """
        path = folder / STATE
        tensors, steps, updates = _read_state(path)
        expected = {name: like.shape for name, like in self._whole(updates).items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if differing := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            raise EngineError(f"{path}: is of another network, {differing[0]} first; go on with the run's own settings")
        self._load_weights({name: tensors[f"{MODULE}{name}"] for name in self.module.state_dict()})
        if updates:
            self._make_moments(updates)
        for name, parameter in self._trained():
            for moment in MOMENTS if updates else ():
                self._set_moment(parameter, moment, tensors[_moment(moment, name)].to(self.device))
        self._engine.global_steps = steps
        if steps:
            scheduler = self._engine.lr_scheduler
            scheduler.last_epoch, scheduler._step_count = steps - 1, steps + 1
            scheduler.step()

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, weights) for name, weights in self.module.named_parameters() if weights.requires_grad)

    def _states(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The tensors that torch's optimizer updates, flat parts of all parameters where ZeRO shards, and its state."""
        zero = self._engine.optimizer
        match self._engine.zero_optimization_stage():
            case 0:
                updated = [weights for _, weights in self._trained()]
            case 3:
                updated = zero.fp32_partitioned_groups_flat
            case _:
                updated = zero.single_partition_of_fp32_groups
        return [(tensor, self._optimizer.state[tensor]) for tensor in updated]

    def _updates(self) -> int:
        """How often the weights have been updated; before the first time the optimizer has no state."""
        return int(self._states()[0][1].get("step", 0))

    def _make_moments(self, updates: int) -> None:
        """The state that torch's optimizer makes in its first update, here before it."""
        import torch

        for tensor, state in self._states():
            where = tensor.device if self._optimizer.defaults.get("fused") else torch.device("cpu")
            state["step"] = torch.tensor(float(updates), device=where)
            state.update({moment: torch.zeros_like(tensor) for moment in MOMENTS})
        if self._engine.zero_optimization_stage() in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _part_of_moment(self, parameter: Any, moment: str) -> Part | None:
        import torch
        from deepspeed.utils import safe_get_local_optimizer_state

        match self._engine.zero_optimization_stage():
            case 0 if self.rank:
                return None
            case 0:
                # A parameter that never had a gradient, as a head whose term is off, has no state at this stage alone.
                whole = self._optimizer.state[parameter].get(moment)
                return Part(0, (torch.zeros_like(parameter) if whole is None else whole).flatten())
            case 3:
                return self._scattered(parameter, safe_get_local_optimizer_state(parameter, moment))
        fragment = parameter._hp_mapping  # None where no number of it is updated by this rank
        return fragment and Part(fragment.lp_fragment_address.start, fragment.get_hp_fragment(moment))

    def _scattered(self, parameter: Any, values: torch.Tensor) -> Part:
        """This rank's part of a tensor at ZeRO stage 3, without what it is filled up with."""
        start = self.rank * parameter.ds_tensor.numel()
        return Part(start, values.flatten()[: max(0, parameter.ds_numel - start)])

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, whole: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        match self._engine.zero_optimization_stage():
            case 0:
                self._optimizer.state[parameter][moment].copy_(whole)
            case 3:
                safe_set_local_optimizer_state(parameter, self._part(parameter, whole), moment)
            case _:
                safe_set_full_optimizer_state(parameter, whole, moment)

    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        import deepspeed
        import torch
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        stage = self._engine.zero_optimization_stage()
        parameters = list(self.module.parameters())
        whole = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0) if stage == 3 else nullcontext()
        with whole, torch.no_grad():
            if stage < 3 or self.rank == 0:
                self.module.load_state_dict(weights)
        for name, parameter in self._trained():  # the numbers that ZeRO's optimizer works on
            if stage == 3:
                safe_set_local_fp32_param(parameter, self._part(parameter, weights[name].to(self.device)))
            elif stage:
                safe_set_full_fp32_param(parameter, weights[name].to(self.device))

    def _part(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """The same of a whole tensor; the last one is filled up with zeros."""
        import torch

        size = parameter.ds_tensor.numel()
        part = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))

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


def _set_environment(group: Group) -> None:
    """Describe the group as torch and DeepSpeed read it; DeepSpeed would look for MPI otherwise."""
    import torch

    # srun may show each process one GPU alone, which is then number 0 for all of them.
    devices = torch.accelerator.device_count() or group.local_rank + 1
    names = {
        "RANK": group.rank,
        "LOCAL_RANK": group.local_rank % devices,
        "WORLD_SIZE": group.world_size,
        "MASTER_ADDR": group.address,
        "MASTER_PORT": group.port,
    }
    os.environ.update({name: str(value) for name, value in names.items() if value is not None})


def _meet_nobody(backend: str) -> None:
    """Make a group of this process alone; without a port, which another one might take before it is listened at."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def _compare(common: Mapping[str, Any], group: Group) -> None:
    """Raise `EngineError` on every rank where one has been started with other settings than rank 0."""
    if group.world_size == 1:
        return
    first, *others = _gather(dict(common), group.world_size)
    for rank, theirs in enumerate(others, 1):
        if names := sorted(name for name in first | theirs if first.get(name) != theirs.get(name)):
            shown = [f"{name} ({first.get(name)} and {theirs.get(name)})" for name in names[:3]]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            cure = "start all ranks with the same command and the same installation"
            problem = f"ranks 0 and {rank} differ in {', '.join(shown)}{more}; {cure}"
            raise told_by_first(EngineError(problem), group.rank)


def _gather(value: Any, world_size: int) -> list[Any]:
    """Of every rank its value, as JSON: what a peer sends is never unpickled."""
    import torch
    from torch import distributed

    if world_size == 1:
        return [json.loads(json.dumps(value))]
    device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    distributed.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = max(map(int, sizes))
    contents = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    distributed.all_gather(contents, torch.nn.functional.pad(content, (0, longest - len(content))))
    return [json.loads(row[:size].cpu().numpy().tobytes()) for row, size in zip(contents, sizes, strict=True)]


@contextmanager
def _lost_ranks(timeout_s: float, watchdog: Watchdog | None = None) -> Iterator[None]:
    """Turn what torch raises where another rank has died or does not answer into one line, told by one rank."""
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, distributed.DistError) and not any(word in text for word in ("gloo", "NCCL")):
            raise
        if watchdog is None:
            raise EngineError(f"{_reason(text, timeout_s)}; {CURE}") from None
        line = watchdog.blame(_reason(text, timeout_s))
        raise (EngineError(line) if watchdog.claim() else ToldError(line)) from None


def _reason(text: str, timeout_s: float) -> str:
    if "EADDRINUSE" in text:
        return f"MASTER_PORT {os.environ['MASTER_PORT']} is taken on this machine; set it to another"
    ended = "onnection" in text and "imed out" not in text
    what = "has ended" if ended else f"did not answer within engine.timeout_s, {timeout_s:g} s"
    return f"another rank {what}; see what it says"


def _watchdog(group: Group, timeout_s: float, stacks: Path | None) -> Watchdog:
    from torch.distributed import PrefixStore, distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    # torchrun keeps its store for the next start, too.
    start = _gather(secrets.token_hex(8), group.world_size)[0]
    own = PrefixStore(f"watchdog {start}", store.clone())  # with a connection of its own
    host = socket.gethostname()
    return Watchdog(own, group.rank, group.world_size, host=host, hung_s=timeout_s, stacks=stacks)


def _moment(moment: str, name: str) -> str:
    """In a saved state, its name of the parameter `name`."""
    return f"optimizer.{moment}.{name}"


def _group_of_hosts(timeout_s: float) -> Any:
    """For words between the processes of all ranks, whatever their devices do."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def _limit_waits(timeout_s: float) -> None:
    """Let the groups that DeepSpeed made for itself wait no longer than the first one."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], int, int]:
    """Tensors of a saved state, steps taken, and updates among them; raises `EngineError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != "1":
                raise ValueError("is no engine's state of this version")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return tensors, int(facts["steps"]), int(facts["updates"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{path}: cannot be taken up ({reason}); begin anew with another --run") from None
