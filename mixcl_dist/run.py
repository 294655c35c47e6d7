"""The folder of one run: its configuration, facts, metrics; the plain files that `report` and `export` read."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixcl_dist import __version__
from mixcl_dist.config import Config, to_yaml
from mixcl_dist.data_shards.storage.publishing import HeldError, exclusive
from mixcl_dist.data_shards.versions import versions_of

PACKAGES = ("torch", "deepspeed", "triton", "webdataset", "monai", "ray", "numpy")


LOCK = ".lock"
"""In a folder that `held` holds."""


class RunError(ValueError):
    """A run's folder that cannot be used; the message is one line with the cure."""


class Stopped(Exception):
    """A run that was asked to stop, and has saved all that it did; the message is one line that says how to go on."""


class Run:
    """A run's folder, written as the run goes on.

    `config.yaml` holds the resolved configuration, `run.json` the facts (who may read which labels, versions,
    machine, time), `metrics.jsonl` one object a logged step, `tensorboard/` the same numbers.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = facts
        self._start = time.monotonic() - facts.get("seconds", 0.0)

    @classmethod
    def create(cls, path: Path, kind: str, config: Config, **facts: Any) -> Run:
        """Make the folder, or continue in one of the same kind whose run has not finished.

        Raises `RunError` where the folder holds something else.
        """
        known = path / "run.json"
        earlier = read_json(known) if known.exists() else {}
        if earlier and earlier.get("kind") != kind:
            raise RunError(f"{path}: holds a {earlier.get('kind')} run; give another --run")
        if not earlier and path.exists() and not all(map(_is_begun, path.iterdir())):
            raise RunError(f"{path}: holds other files; give an empty or new folder")
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "config.yaml", to_yaml(config).encode())
        head = {
            "kind": kind,
            "name": path.name,
            "started": earlier.get("started") or now(),
            "finished": None,
            "warnings": earlier.get("warnings", {}),
        }
        origin = {"mixcl_version": __version__, "versions": _versions(), "machine": machine()}
        run = cls(path, head | origin | facts | {"seconds": earlier.get("seconds", 0.0)})
        run.update()
        return run

    def update(self, **facts: Any) -> None:
        """Add facts to `run.json`, with the time and memory used so far."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = round(time.monotonic() - self._start, 1)
        self.facts |= facts | {"seconds": seconds, "peak_memory_mb": round(peak_mb)}
        write_json(self.path / "run.json", self.facts)

    def warn(self, kind: str, text: str) -> None:
        """Say one line on standard error and keep it in `run.json`, the first time that `kind` is to be warned of."""
        if kind not in self.facts["warnings"]:
            tqdm.write(f"{self.facts['kind']}: {text}", file=sys.stderr)  # beside a bar, where one is shown
            self.update(warnings=self.facts["warnings"] | {kind: text})

    def log(self, step: int, **scalars: float) -> None:
        """Append one object to `metrics.jsonl` and the same scalars to TensorBoard."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop what an interrupted run logged past the checkpoint that it goes on from."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [entry for entry in read_metrics(path) if entry["step"] <= step]
            write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def finish(self, **facts: Any) -> None:
        self._tensorboard.close()
        self.update(finished=now(), **facts)

    @cached_property
    def _tensorboard(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path / "tensorboard"))


@contextmanager
def held(folder: Path, option: str) -> Iterator[None]:
    """Make the folder of a run, a study or a table, and let no other process work in it.

    One that is empty in the end is removed again. `option` is the one that another folder is given by. Raises
    `RunError` where another process works in it, or where it cannot be made.
    """
    made = not folder.exists()
    try:
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(folder / LOCK, lambda line: print(f"mixcl: {line}", file=sys.stderr)))
            except HeldError as error:
                raise RunError(f"{folder}: {error}, or give another {option}") from None
            except OSError as error:
                raise RunError(f"{folder}: {error.strerror}; give a folder that you may write") from None
            yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


def _is_begun(path: Path) -> bool:
    """Whether a run that was killed before it wrote its facts leaves such a file."""
    return path.name in (LOCK, "config.yaml") or (path.name.startswith(".") and path.suffix == ".tmp")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; raises `RunError` naming the file where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; is this a run's folder?") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); the run must be made again") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged objects of `metrics.jsonl`; a last line cut short by a killed process is left out."""
    *lines, _unfinished = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Publish a file whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # never through a link that waits there under this name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def machine() -> dict[str, Any]:
    """What a figure was measured on: processor, cores, memory and, where there is one, GPU."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_name(), "cores": cores, "gpu": gpu, "memory_gb": round(memory_gb, 1)}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | versions_of(PACKAGES)


def now() -> str:
    """The time as runs and studies record it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
