"""The folder of one run: its configuration, facts, metrics; the plain files that `report` and `export` read."""

from __future__ import annotations

import dataclasses
import functools
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
from mixcl_dist.cluster.launch.job import ID_VARIABLE
from mixcl_dist.config import Config, ConfigError, load, to_yaml
from mixcl_dist.data_shards.storage.publishing import HeldError, exclusive
from mixcl_dist.data_shards.versions import versions_of
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import append_line, write_atomic, write_lines
from mixcl_dist.records import ANEW, METRICS, Machine, RunRecord, read_metrics
from mixcl_dist.trackers import Tracker, Trackers, begin_tracker

PACKAGES = ("torch", "deepspeed", "triton", "webdataset", "monai", "ray", "numpy")
CONFIG = "config.yaml"
LOCK = ".lock"
"""In a folder that `held` holds."""


class Stopped(Exception):
    """A run that was asked to stop, and has saved all that it did; the message is one line that says how to go on."""


class Run:
    """A run's folder, written as the run goes on.

    `config.yaml` holds the resolved configuration, `run.json` the facts (who may read which labels, versions,
    machine, time), `metrics.jsonl` one object a logged step, `tensorboard/` the same numbers, and `pretrain.trackers`
    are told them, too.
    """

    def __init__(self, path: Path, config: Config, record: RunRecord):
        self.path = path
        self._config = config
        self.record = record
        self._start = time.monotonic() - record.seconds
        self._first_step = 1

    @classmethod
    def create(cls, path: Path, config: Config, record: RunRecord) -> Run:
        """Make the folder, or continue in one of the same kind whose run has not finished.

        What of `record` is not given is filled in: time, versions, machine. Raises `RunError` where the folder holds
        something else.
        """
        earlier = RunRecord.load_if_there(path)
        if earlier is not None and earlier.kind != record.kind:
            raise RunError(f"{path}: holds a {earlier.kind} run; give another --run")
        if earlier is None:
            begin(path)
        write_atomic(path / CONFIG, to_yaml(config).encode())
        run = cls(
            path,
            config,
            dataclasses.replace(
                record,
                started=earlier.started if earlier else now(),
                warnings=dict(earlier.warnings) if earlier else {},
                trackers=dict(earlier.trackers) if earlier else {},
                seconds=earlier.seconds if earlier else 0.0,
                mixcl_version=__version__,
                versions=_versions(),
                machine=machine(),
            ),
        )
        run.update()
        return run

    def update(self, **facts: Any) -> None:
        """Set facts in `run.json`, with the time and memory used so far."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = round(time.monotonic() - self._start, 1)
        self.record = dataclasses.replace(self.record, **facts, seconds=seconds, peak_memory_mb=round(peak_mb))
        self.record.save(self.path)

    def change(self, config: Config) -> None:
        """Go on with other settings."""
        self._config = config
        write_atomic(self.path / CONFIG, to_yaml(config).encode())

    def warn(self, kind: str, text: str) -> None:
        """Say one line on standard error and keep it in `run.json`, the first time that `kind` is to be warned of."""
        if kind not in self.record.warnings:
            tqdm.write(f"{self.record.kind}: {text}", file=sys.stderr)  # beside a bar, where one is shown
            self.update(warnings=self.record.warnings | {kind: text})

    def log(self, step: int, **scalars: float) -> None:
        """Append one object to `metrics.jsonl`, and tell TensorBoard and the trackers the same."""
        trackers, entry = self._trackers, {"step": step, **scalars}
        append_line(self.path / METRICS, entry)
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        trackers.log(entry)
        if trackers.ids != self.record.trackers:
            self.update(trackers=trackers.ids)

    def forget_metrics_after(self, step: int) -> None:
        """Drop what an interrupted run logged past the checkpoint that it goes on from."""
        path = self.path / METRICS
        if path.exists():
            write_lines(path, [entry for entry in read_metrics(path) if entry["step"] <= step])
        self._first_step = step + 1
        for shown in ("_tensorboard", "_trackers"):  # which begin anew at the next log
            if shown in self.__dict__:
                self.__dict__.pop(shown).close()

    def finish(self) -> None:
        self._tensorboard.close()
        self._trackers.close()
        self.update(finished=now(), trackers=self._trackers.ids)

    @cached_property
    def _tensorboard(self):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then shows nothing of what earlier files hold from that step on.
        return SummaryWriter(str(self.path / "tensorboard"), purge_step=self._first_step)

    @cached_property
    def _trackers(self) -> Trackers:
        names = self._config.pretrain.trackers if self.record.kind == "pretrain" else ()
        path, ids = self.path / METRICS, self.record.trackers
        logged = read_metrics(path) if names and path.exists() else []

        def begin(name: str) -> Tracker:
            return begin_tracker(name, self.path, self._config, logged, ids.get(name))

        return Trackers(names, begin, self.warn)


@contextmanager
def held(folder: Path, option: str) -> Iterator[None]:
    """Make the folder of a run, a study or a table, and let no other process work in it.

    One that is empty in the end is removed again. `option` is the one that another folder is given by. Raises
    `RunError` where another process works in it, or where it is an address, or cannot be made.
    """
    scheme, *rest = folder.parts or ("",)
    if scheme.endswith(":") and rest:  # a URL, as a path has it
        cure = "give a folder, on a file system that all machines see"
        raise RunError(f"{option} {scheme}//{'/'.join(rest)}: what goes on there needs locks and renames; {cure}")
    made = not folder.exists()
    try:
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                job = os.environ.get(ID_VARIABLE, "")
                warn = functools.partial(print, "mixcl:", file=sys.stderr)
                stack.enter_context(exclusive(folder / LOCK, warn, job=job))
            except HeldError as error:
                raise RunError(f"{folder}: {error}, or give another {option}") from None
            except OSError as error:
                raise RunError(f"{folder}: {error.strerror}; give a folder that you may write") from None
            yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


def begin(path: Path) -> None:
    """Make the folder of something that writes `config.yaml` first, then a record; raises `RunError` where it holds
    anything that a process killed between the two has not left."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(not _is_hidden(entry) for entry in path.iterdir()) and not is_barely_begun(path):
            raise RunError(f"{path}: holds other files; give an empty or new folder")
        for entry in path.glob(".*.tmp"):
            entry.unlink()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give a folder that you may write") from None


def is_barely_begun(path: Path) -> bool:
    """Whether a folder holds a `config.yaml` as this project writes it and nothing else, but locks and what was not
    published: what a process leaves that was killed before it wrote its record."""
    file = path / CONFIG
    try:
        alone = [entry for entry in path.iterdir() if not _is_hidden(entry)] == [file]
        return alone and to_yaml(load(file)) == file.read_text()
    except (OSError, ConfigError, UnicodeDecodeError):
        return False


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def read_config(folder: Path) -> Config:
    """The `config.yaml` of a run or table; raises `RunError` naming it."""
    try:
        return load(folder / CONFIG)
    except ConfigError as error:
        text = str(error).removeprefix(f"{folder / CONFIG}: ")
        raise RunError(f"{folder / CONFIG}: {text}; mend it, or {ANEW}") from None


def machine() -> Machine:
    """What a figure was measured on: processor, cores, memory and, where there is one, GPU."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(cpu=_cpu_name(), cores=cores or 1, gpu=gpu, memory_gb=round(memory_gb, 1))


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
