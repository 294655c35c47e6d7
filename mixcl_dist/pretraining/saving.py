"""What a pre-training goes on from: its state is copied between two steps, and written beside those that follow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import save

from mixcl_dist.cluster import checkpoint
from mixcl_dist.cluster.checkpoint import CheckpointConfig, CheckpointError
from mixcl_dist.cluster.engine import Engine
from mixcl_dist.cluster.group import told_by_first
from mixcl_dist.cluster.snapshot import weights_of
from mixcl_dist.data_shards.streaming.stream import PatchStream
from mixcl_dist.errors import RunError
from mixcl_dist.pretraining.recorder import BACKBONE, backbone_of


class Saver:
    """Checkpoints of weights, optimizer and the stream's position as one state; rank 0 writes, one at a time.

    Every rank has to call every method. Leaving the block waits for what is being written.
    """

    def __init__(self, run: Path, config: CheckpointConfig, engine: Engine, stream: PatchStream) -> None:
        self.run, self._folder = run, run / "checkpoints"
        self._engine, self._stream = engine, stream
        self._writer = checkpoint.Writer(self._folder, keep=config.keep) if engine.rank == 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def resume(self) -> int:
        """Take up the newest whole checkpoint, if there is one; returns the step it was made at, 0 without one.

        Rank 0 chooses and verifies it for all.
        """
        name = self._told_by_first(self._newest)
        if name is None:
            return 0
        path = self._folder / name
        state = checkpoint.read_state(path)
        step, position = state.get("step"), state.get("stream")
        if not isinstance(step, int) or not isinstance(position, dict):
            raise RunError(f"{path}: does not tell where the run stood; begin anew with another --run")
        self._engine.load(path)
        self._stream.seek(position)
        return step

    def save(self, step: int) -> None:
        """Copy the state, and let it be written once the checkpoint before is; raises where that failed.

        The next step waits for the copy alone.
        """
        self.wait()
        snapshot = self._engine.snapshot()
        if not self._writer:
            return

        def write(folder: Path) -> None:
            snapshot.write(folder)
            (folder / BACKBONE).write_bytes(save(backbone_of(snapshot.weights)))

        state = {"step": step, "stream": self._stream.position(), "world_size": self._engine.world_size}
        backbone = backbone_of(weights_of(snapshot.whole))
        size = snapshot.size + sum(tensor.nbytes for tensor in backbone.values())
        self._writer.begin(step, state=state, write=write, size=size)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once; this alone may differ between ranks."""
        return self._writer is not None and self._writer.failed

    def wait(self) -> None:
        """Until the newest checkpoint is published; raises on every rank where it could not be."""
        self._told_by_first(lambda: self._writer.wait() if self._writer else None)

    def set_aside(self, step: int) -> str | None:
        """Let no run go on from checkpoints made at `step` or later; the name of the newest that is left."""
        self.wait()

        def newest() -> str | None:
            checkpoint.set_aside(self._folder, step)
            path = checkpoint.newest(self._folder)
            return None if path is None else path.name

        return self._told_by_first(newest)

    def _newest(self) -> str | None:
        path = checkpoint.newest(self._folder, _say)
        if path is None:
            _say(f"{self.run}: has no checkpoint yet; begins at step 0")
        return None if path is None else path.name

    def _told_by_first(self, what: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank; where it finds a `CheckpointError`, that ends every rank."""
        found, problem = None, None
        if self._engine.rank == 0:
            try:
                found = what()
            except CheckpointError as error:
                problem = str(error)
        found, problem = self._engine.gather([found, problem])[0]
        if problem:
            raise told_by_first(CheckpointError(problem), self._engine.rank)
        return found


def _say(line: str) -> None:
    print(f"pretrain: {line}", file=sys.stderr)
