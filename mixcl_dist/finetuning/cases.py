"""Cases as trials read them: decoded and resampled once for all trials that share a folder, then mapped from there."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixcl_dist.data_shards import sources, volume
from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.sources import Case, read_case
from mixcl_dist.data_shards.storage.publishing import publish
from mixcl_dist.data_shards.volume import Volume, resample
from mixcl_dist.finetuning.crops import LabelledVolume
from mixcl_dist.finetuning.task import Task


class Cases:
    """The cases of a task, kept in `folder` (None: in no folder) under a digest of all that they are made from.

    What is kept is mapped into memory, so that the trials of a machine have one copy of it together. A folder is for
    one machine, or on a file system that machines share; it may be deleted whenever nobody reads.
    """

    def __init__(self, task: Task, folder: Path | None = None) -> None:
        self._task, self._folder = task, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def volume(self, case: Case) -> Volume:
        """The case in its own voxels, its label in the catalogue's numbers; raises `CaseError`."""

        def make() -> dict[str, np.ndarray]:
            read = read_case(case, self._task.catalogue)
            return {"hu": read.hu, "affine": read.affine} | ({} if read.label is None else {"label": read.label})

        arrays = self._kept(case, "volume", make)
        return Volume(arrays["hu"], np.array(arrays["affine"]), arrays.get("label"))

    def training(self, case: Case, spacing_mm: Sequence[float] | None) -> tuple[LabelledVolume, np.ndarray]:
        """A labelled case as it is trained on, and which outputs (K + 1 and up to `IGNORED`, bool) it shows before it
        is resampled; raises `CaseError`."""
        task = self._task

        def make() -> dict[str, np.ndarray]:
            own = read_case(case, task.catalogue)
            assert own.label is not None, "a budget is made of labelled cases"
            shown = np.zeros(IGNORED + 1, dtype=bool)
            shown[np.unique(task.target(case, own.label))] = True
            seen = own if spacing_mm is None else resample(own, spacing_mm)
            assert seen.label is not None, "resampling keeps the label"
            return {"hu": seen.hu, "target": task.target(case, seen.label), "shown": shown}

        arrays = self._kept(case, f"training {task.classes} {case.reliable} {spacing_mm}", make)
        return LabelledVolume(arrays["hu"], arrays["target"], task.known(case)), np.array(arrays["shown"])

    def _kept(self, case: Case, what: str, make: Callable[[], dict[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        if self._folder is None:
            return make()
        form = (case.format, case.label_format, case.label_values, len(case.files))
        of = (what, self._task.catalogue, form, _reader(), [_content(path) for path in case.inputs])
        key = hashlib.sha256(repr(of).encode()).hexdigest()
        listing = self._folder / f"{key[:32]}.json"
        if not listing.exists():
            with listing.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes meanwhile waits, and finds it made
                if not listing.exists():
                    _keep(listing, make())
        return {
            name: np.load(listing.with_suffix(f".{name}.npy"), mmap_mode="c")
            for name in json.loads(listing.read_text())
        }


def _keep(listing: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Publish arrays, the list of them last."""
    for name, array in arrays.items():
        with publish(listing.with_suffix(f".{name}.npy")) as file:
            np.save(file, np.ascontiguousarray(array))
    with publish(listing) as file:
        file.write(json.dumps(list(arrays)).encode())


@functools.cache
def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _reader() -> str:
    """A digest of the code that reads."""
    total: Any = hashlib.sha256()
    for file in (Path(volume.__file__), *sorted(Path(sources.__file__).parent.glob("*.py"))):
        total.update(file.read_bytes())
    return total.hexdigest()
