"""What of the network and its optimizer is where, at each ZeRO stage: told and taken up by name, whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixcl_dist.cluster.errors import EngineError
from mixcl_dist.cluster.snapshot import MODULE, Part

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep of every parameter."""


class EngineState:
    """The state of a `deepspeed.DeepSpeedEngine`, of which each rank has a part."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._module = engine, engine.module
        self._optimizer: Any = engine.basic_optimizer  # torch's own, within DeepSpeed's
        self._rank, self._device = engine.global_rank, engine.device

    def whole(self, updates: int) -> dict[str, torch.Tensor]:
        """Names, shapes and types of all that the state holds, on the meta device."""
        import torch

        parameters = dict(self._module.named_parameters())

        def like(name: str, tensor: torch.Tensor) -> torch.Tensor:
            shape = getattr(parameters.get(name), "ds_shape", tensor.shape)  # ZeRO stage 3 has scattered it
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        whole = {f"{MODULE}{name}": like(name, tensor) for name, tensor in self._module.state_dict().items()}
        for name, parameter in self._trained():
            whole |= {_moment(moment, name): like(name, parameter) for moment in MOMENTS if updates}
        return whole

    def parts(self, updates: int) -> dict[str, Part]:
        """What of it is on this rank; what all ranks have is rank 0's part."""
        scattered = dict(self._module.named_parameters()) if self._engine.zero_optimization_stage() == 3 else {}
        parts = {}
        for name, tensor in self._module.state_dict().items():
            if (parameter := scattered.get(name)) is not None:
                parts[f"{MODULE}{name}"] = self._scattered(parameter, parameter.ds_tensor)
            elif self._rank == 0:
                parts[f"{MODULE}{name}"] = Part(0, tensor.flatten())
        for name, parameter in self._trained():
            for moment in MOMENTS if updates else ():
                if part := self._part_of_moment(parameter, moment):
                    parts[_moment(moment, name)] = part
        return parts

    def take_up(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Make all that of this rank is its part of a saved state, which fits `whole`."""
        self._load_weights({name: tensors[f"{MODULE}{name}"] for name in self._module.state_dict()})
        if updates:
            self._make_moments(updates)
        for name, parameter in self._trained():
            for moment in MOMENTS if updates else ():
                self._set_moment(parameter, moment, tensors[_moment(moment, name)].to(self._device))

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, weights) for name, weights in self._module.named_parameters() if weights.requires_grad)

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

    def updates(self) -> int:
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
            case 0 if self._rank:
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
        start = self._rank * parameter.ds_tensor.numel()
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
        parameters = list(self._module.parameters())
        whole = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0) if stage == 3 else nullcontext()
        with whole, torch.no_grad():
            if stage < 3 or self._rank == 0:
                self._module.load_state_dict(weights)
        for name, parameter in self._trained():  # the numbers that ZeRO's optimizer works on
            if stage == 3:
                safe_set_local_fp32_param(parameter, self._part(parameter, weights[name].to(self._device)))
            elif stage:
                safe_set_full_fp32_param(parameter, weights[name].to(self._device))

    def _part(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """The same of a whole tensor; the last one is filled up with zeros."""
        import torch

        size = parameter.ds_tensor.numel()
        part = whole.flatten()[self._rank * size : (self._rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))


def _moment(moment: str, name: str) -> str:
    """In a saved state, its name of the parameter `name`."""
    return f"optimizer.{moment}.{name}"


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], int, int]:
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
