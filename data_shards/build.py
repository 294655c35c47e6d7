"""From sources to shards: parallel over cases, restartable at any point, bad cases quarantined.

    SHARDS/manifest.json, shard-000000.tar, shard-000000.index.json, …      published whole; the manifest last
    SHARDS/.build/plan.json                what is being built, so that only the same build goes on from here
    SHARDS/.build/cases/                   stage 1: one shard and one outcome a case; removed at the end
    SHARDS/.build/quarantine.jsonl         what could not be used, and why

The configuration imports this module, so what reads and writes is imported where the work begins.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mixcl_dist.data_shards.storage import exclusive, publish, remove_unpublished

if TYPE_CHECKING:
    from mixcl_dist.data_shards.manifest import Manifest
    from mixcl_dist.data_shards.sources import Case, CaseError

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
            "workers": self.workers >= 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise ValueError(f"build.{name} = {getattr(self, name)} is out of range")


class BuildError(ValueError):
    """A build that cannot begin or go on; the message is one line with the cure."""


@dataclass(frozen=True)
class BuildResult:
    manifest: Manifest
    quarantined: list[CaseError]


def build(
    sources: Sequence[Path],
    out: Path,
    config: BuildConfig,
    progress: Progress = lambda done, total, unit: None,
) -> BuildResult:
    """Write the shards of `sources` to the folder `out`, or finish what an interrupted build left there.

    The shards depend on the sources and `config` alone, not on workers or interruptions. A finished build is left as
    it is. Raises `CaseError` for a source that cannot be opened at all, `BuildError` for everything else.
    """
    from mixcl_dist.data_shards import catalogue, manifest, shuffle, spool
    from mixcl_dist.data_shards import sources as readers

    out = Path(out)
    opened = [readers.open_source(Path(source)) for source in sources]
    classes = catalogue.merged(source.classes for source in opened)
    cases, refused = spool.choose_cases(opened, config.splits)
    folder = out / ".build" / "cases"
    quarantine = out / ".build" / "quarantine.jsonl"
    with _writing_to(out):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".build" / "lock"):
            _adopt_plan(out, _plan(cases, classes.classes, config))
            remove_unpublished(out)
            if not (out / manifest.FILE_NAME).exists():
                spool.spool_cases(cases, classes, config, folder, progress)
                used, unusable = spool.sort_outcomes(cases, folder)
                spool.write_quarantine(quarantine, refused + unusable)
                if not used:
                    problems = [str(problem) for problem in spool.read_quarantine(quarantine)]
                    first, *others = problems or ["the sources hold none of build.splits"]
                    more = f" ({len(others)} more in {quarantine})" if others else ""
                    raise BuildError(f"no case could be used: {first}{more}")
                shuffle.write_shards(used, classes, config, folder, out, progress)
            shutil.rmtree(folder)
            built = manifest.Manifest.load(out)
            for shard in built.shards:
                path = out / shard.file
                if not path.exists() or path.stat().st_size != shard.bytes:
                    raise BuildError(f"{path}: is not as it was built; remove {out} and build again")
            return BuildResult(built, spool.read_quarantine(quarantine))


def _plan(cases: Sequence[Case], classes: Sequence[str], config: BuildConfig) -> dict[str, Any]:
    """All that the shards depend on, as JSON has it; files count as unchanged while size and time are the same."""

    def stamp(path: Path) -> list[int] | None:
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None

    settings = dataclasses.asdict(config) | {"classes": classes}
    del settings["workers"]
    described = {}
    for case in cases:
        files = [*case.files, *([case.label] if case.label else [])]
        described[case.name] = dataclasses.asdict(case) | {"stamps": [stamp(path) for path in files]}
    return json.loads(json.dumps({"build": settings, "case": described}, default=str))


def _adopt_plan(out: Path, plan: dict[str, Any]) -> None:
    """Go on only with what was begun here; raises `BuildError` naming the first difference."""
    path = out / ".build" / "plan.json"
    if path.exists():
        begun = json.loads(path.read_bytes())
        differs = [
            f"{section}.{name}"
            for section in plan
            for name in begun[section] | plan[section]
            if begun[section].get(name) != plan[section].get(name)
        ]
        if differs or list(begun["case"]) != list(plan["case"]):
            first = differs[0] if differs else "the order of cases"
            raise BuildError(
                f"{out}: holds a build with other settings or sources ({first} differs); "
                "give another --out, or remove this one"
            )
    elif any(out.glob("shard-*.tar")):
        raise BuildError(f"{out}: holds shards that were built elsewhere; give another --out, or remove this one")
    else:
        with publish(path) as file:
            file.write(json.dumps(plan, indent=1).encode())


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
