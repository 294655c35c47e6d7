"""Where a trial stands while it learns, so that one whose process was ended goes on as if nothing had been."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.crops import Crops
from mixcl_dist.finetuning.segmenter import LearningNetwork
from mixcl_dist.jsonfiles import write_atomic

UNFINISHED = "unfinished.pt"


@dataclass(frozen=True)
class Learning:
    """All that changes from step to step."""

    network: LearningNetwork
    kept: LearningNetwork
    """With the average of the weights."""
    optimizer: Optimizer
    schedule: LRScheduler
    crops: Crops

    def save(self, run: Path, step: int, seconds: float) -> None:
        """Publish where the trial in the folder `run` stands after a step."""
        content = io.BytesIO()
        torch.save(
            {name: part.state_dict() for name, part in self._parts()} | {"step": step, "seconds": seconds}, content
        )
        write_atomic(run / UNFINISHED, content.getvalue())

    def load(self, run: Path) -> tuple[int, float]:
        """Take up what was saved; returns the step and the seconds that were spent on learning, 0 where there is none.

        Raises `RunError` for a file that cannot be gone on from. It runs nothing that stands in it.
        """
        file = run / UNFINISHED
        if not file.exists():
            return 0, 0.0
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
            for name, part in self._parts():
                part.load_state_dict(state[name])
            return int(state["step"]), float(state["seconds"])
        except Exception as error:
            problem = f"{file}: cannot be gone on from ({type(error).__name__})"
            raise RunError(f"{problem}; remove it to begin the trial anew") from None

    def _parts(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in ("network", "kept", "optimizer", "schedule", "crops")]
