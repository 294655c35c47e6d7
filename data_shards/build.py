"""From sources to shards: parallel over cases, restartable at any point, appending, bad cases quarantined.

    SHARDS/shard-000000.tar, shard-000000.index.json, …, tables, manifest.json     published whole, in this order
    SHARDS/.build/settings.json            what is being built, so that only the same build goes on from here
    SHARDS/.build/cases/                   stage 1: one shard and one outcome a case; removed at the end
    SHARDS/.build/draw                     stage 2: which cases the shards that no manifest names yet are of
    SHARDS/.build/stamps.json              the files of the cases in the shards as they were read
    SHARDS/.build/quarantine.jsonl         what could not be used, and why

The configuration imports this module, so what reads and writes is imported where the work begins.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mixcl_dist.data_shards.storage import exclusive, remove_unpublished

if TYPE_CHECKING:
    from mixcl_dist.data_shards.manifest import Manifest
    from mixcl_dist.data_shards.processes import Mapper
    from mixcl_dist.data_shards.sources import CaseError

Progress = Callable[[int, int, str], None]
"""Called with how many are done, of how many, and of what ("case" or "shard")."""


@dataclass(frozen=True)
class BuildConfig:
    """How volumes are cut into patches and written as shards."""

    patch_size: tuple[int, int, int] = (48, 48, 48)
    """Voxels of a stored patch."""
    spacing_mm: tuple[float, float, float] | None = None
    """Spacing that every volume is resampled to; None keeps each volume's own."""
    overlap: float = 0.25
    """Smallest share of a patch's edge that it has in common with its neighbour."""
    min_body_fraction: float = 0.05
    """Patches with a smaller share of voxels above -500 HU are skipped as air."""
    body_margin_mm: float = 10.0
    """Air kept around the body when a volume is cropped to it."""
    samples_per_shard: int = 256
    seed: int = 0
    """Of the shuffle over all volumes' patches."""
    splits: tuple[Literal["training", "validation", "unlabelled"], ...] = ("training", "unlabelled")
    """Which cases enter the shards; validation cases stay out, so that pre-training never sees them."""
    codec: Literal["fast", "small"] = "fast"
    """How HU are stored: LZ4HC, or pcodec, which takes a sixth less and decodes at a fifth of the speed."""
    quantise_hu: int = 0
    """Step in HU that values are rounded to, each by at most half of it, counted from air; 0 loses nothing."""
    workers: int = 1
    """Processes that read cases side by side; the shards do not depend on it."""

    def __post_init__(self) -> None:
        checks = {
            "patch_size": min(self.patch_size) >= 1,
            "spacing_mm": self.spacing_mm is None or min(self.spacing_mm) > 0,
            "overlap": 0 <= self.overlap < 1,
            "min_body_fraction": 0 <= self.min_body_fraction <= 1,
            "body_margin_mm": self.body_margin_mm >= 0,
            "samples_per_shard": self.samples_per_shard >= 1,
            "splits": len(self.splits) >= 1,
            "codec": self.codec in ("fast", "small"),
            "quantise_hu": 0 <= self.quantise_hu <= 100,
            "workers": self.workers >= 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise ValueError(f"build.{name} = {getattr(self, name)} is out of range")

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON has it."""
        settings = dataclasses.asdict(self)
        del settings["workers"]
        return json.loads(json.dumps(settings))


class BuildError(ValueError):
    """A build that cannot begin or go on; the message is one line with the cure."""


@dataclass(frozen=True)
class BuildResult:
    manifest: Manifest
    quarantined: list[CaseError]
    added: int
    """Cases whose patches this build appended."""
    absent: int
    """Cases in the shards that none of the sources has any more."""


def build(
    sources: Sequence[Path],
    out: Path,
    config: BuildConfig,
    progress: Progress = lambda done, total, unit: None,
    *,
    exclude: Sequence[Path] = (),
    run: Mapper | None = None,
) -> BuildResult:
    """Write the shards of `sources` to the folder `out`, finish what an interrupted build left there, or append.

    Cases that the shards hold already are left as they are: they are known by name, and unchanged as long as the
    files' size and time, or else their voxels and labels, are the same. New cases are shuffled among themselves into
    further shards; until the new manifest is published, the old set stays as it was. The shards depend on the sources,
    `config` and what `out` held alone, not on workers or interruptions. Scans of `exclude`, sources or other shards,
    are kept out, whatever they are called there (see `dedup`). `run` does the work elsewhere than in `config.workers`
    processes of this machine; `out` and `sources` must then be the same files there.

    Raises `CaseError` for a source that cannot be opened at all, `BuildError` for everything else.
    """
    from mixcl_dist.data_shards import appending, shuffle, spool
    from mixcl_dist.data_shards import sources as readers
    from mixcl_dist.data_shards.processes import in_processes, in_this_process

    out = Path(os.path.abspath(out))  # elsewhere, the working directory is another one
    opened = [readers.open_source(Path(source)) for source in sources]
    folder = out / ".build" / "cases"
    elsewhere = run or in_processes(config.workers)
    with _writing_to(out):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".build" / "lock"):
            remove_unpublished(out)
            base = appending.finished(out, config)
            catalogue = appending.grown_catalogue(base, opened)
            excluded = appending.read_excluded(exclude, out, base, elsewhere, progress)
            plan = appending.plan(out, base, opened, catalogue, config.splits)
            outcomes = spool.spool_cases(plan.fresh, catalogue, config, folder, elsewhere, progress)
            used, unusable = appending.sort_outcomes(plan.fresh, outcomes, base, excluded)
            refused = plan.refused + unusable
            if used:
                writers = run or (in_this_process if config.workers == 1 else elsewhere)
                manifest = shuffle.write_shards(used, base, catalogue, config, folder, out, writers, progress)
            elif base is None:
                raise BuildError(appending.nothing_usable(out, refused))
            else:
                manifest = base
            appending.remember(out, plan, manifest, refused)
            shutil.rmtree(folder)
            return BuildResult(manifest, [entry.error for entry in refused], len(used), plan.absent)


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Turn a failure to write into one line with its cure."""
    try:
        yield
    except BlockingIOError:
        raise BuildError(f"{out}: another build is writing here; wait for it, or give another --out") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free space there and build again: what is done is kept" if full else "give an --out that can be written"
        raise BuildError(f"{out}: {error.strerror or error}; {cure}") from error
