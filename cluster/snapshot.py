"""The whole state after a step: each rank copies its part at once, and rank 0 gets the others beside the next steps."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

STATE = "engine.safetensors"
"""In a checkpoint: every tensor whole and under its parameter's name, so that any number of ranks can take it up."""
MODULE = "module."
"""Before the name of every weight in it."""


class Part(NamedTuple):
    """What one rank has of a tensor."""

    start: int
    """Its first number's place in the whole tensor, flattened."""
    values: torch.Tensor
    """Flat."""


@dataclass(frozen=True)
class Snapshot:
    """The whole state after a step, which rank 0 alone comes to hold.

    The next one is made in the same memory.
    """

    whole: Mapping[str, torch.Tensor]
    """Shapes and types of what is in it, as tensors without numbers (device meta)."""
    facts: Mapping[str, str]
    gathered: Future[dict[str, torch.Tensor]]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """In main memory of rank 0; waits for the other ranks' parts, and raises torch's error where one is lost."""
        return self.gathered.result()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The module's, by their names in it; waits as `tensors` does."""
        return weights_of(self.tensors)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self.whole.values())

    def write(self, folder: Path) -> None:
        """Write it, on rank 0, for `Engine.load`; waits as `tensors` does, and raises `OSError`."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(dict(self.tensors), folder / STATE, metadata=dict(self.facts))
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())) from None


def weights_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The module's among a state's tensors, by their names in it."""
    return {name.removeprefix(MODULE): tensor for name, tensor in state.items() if name.startswith(MODULE)}


class Snapshots:
    """Makes one snapshot after another, of parts that are scattered over ranks.

    `group` (gloo) is for the thread that brings the parts together and for nothing else; None for one rank alone.
    """

    def __init__(self, rank: int, world_size: int, group: ProcessGroup | None, *, of_gpu: bool) -> None:
        self._rank, self._world_size, self._group = rank, world_size, group
        self._of_gpu = of_gpu
        self._memory: dict[str, torch.Tensor] = {}
        """Whole tensors on rank 0, on the others their parts; used again, as new memory takes longer than the copy."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._gathered: Future[dict[str, torch.Tensor]] | None = None

    def take(self, whole: Mapping[str, torch.Tensor], parts: Mapping[str, Part], facts: Mapping[str, str]) -> Snapshot:
        """Copy this rank's `parts` of the tensors that `whole` describes; every rank has to call.

        Waits for the device and the snapshot before, but neither for another rank's step nor for a disk.
        """
        import torch

        if self._gathered is not None:
            self._gathered.result()
        for name, like in (whole if self._rank == 0 else {name: part.values for name, part in parts.items()}).items():
            if name not in self._memory:
                self._memory[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._of_gpu)
        for name, (start, values) in parts.items():
            first = start if self._rank == 0 else 0
            place = self._memory[name].view(-1)[first : first + values.numel()]
            place.copy_(values.detach(), non_blocking=self._of_gpu)
        if self._of_gpu:
            torch.cuda.current_stream().synchronize()
        if self._rank == 0:
            self._gathered = self._executor.submit(self._gather, list(whole))
        else:
            spans = {name: (part.start, part.values.numel()) for name, part in parts.items()}
            self._gathered = self._executor.submit(self._send, {name: spans.get(name, (0, 0)) for name in whole})
        return Snapshot(whole, facts, self._gathered)

    def close(self) -> None:
        """Let the newest snapshot be brought together."""
        self._executor.shutdown()

    def _gather(self, names: list[str]) -> dict[str, torch.Tensor]:
        """On rank 0: receive the others' parts in their places, rank by rank, after a table of where these are."""
        import torch
        from torch import distributed

        tensors = {name: self._memory[name] for name in names}
        for rank in range(1, self._world_size):
            spans = torch.empty(len(names), 2, dtype=torch.int64)
            distributed.recv(spans, rank, group=self._group)
            for tensor, (start, size) in zip(tensors.values(), spans.tolist(), strict=True):
                if size:
                    distributed.recv(tensor.view(-1)[start : start + size], rank, group=self._group)
        return tensors

    def _send(self, spans: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        import torch
        from torch import distributed

        distributed.send(torch.tensor(list(spans.values())), 0, group=self._group)
        for name, (_, size) in spans.items():
            if size:
                distributed.send(self._memory[name], 0, group=self._group)
        return {}
