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

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixcl_dist.data_shards.building.settings import BuildConfig, BuildError, Progress
from mixcl_dist.data_shards.storage.publishing import HeldError, exclusive, remove_unpublished

if TYPE_CHECKING:
    from mixcl_dist.data_shards.building.processes import Mapper
    from mixcl_dist.data_shards.format.manifest import Manifest
    from mixcl_dist.data_shards.sources import CaseError


@dataclass(frozen=True)
class BuildResult:
    manifest: Manifest
    quarantined: list[CaseError]
    added: int
    """Cases whose patches this build appended."""
    absent: int
    """Cases in the shards that none of the sources has any more."""
    files: Mapping[str, int]
    """What the files of the sources are, in words → how many; each is counted once."""


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
    from mixcl_dist.data_shards import sources as readers
    from mixcl_dist.data_shards.building import appending, shuffle, spool
    from mixcl_dist.data_shards.building.census import census
    from mixcl_dist.data_shards.building.processes import in_processes, in_this_process
    from mixcl_dist.data_shards.sources import pseudonym

    out = Path(os.path.abspath(out))  # elsewhere, the working directory is another one
    opened = [readers.open_source(Path(source)) for source in sources]
    pseudonym.remember({case.name: case.files[0] for source in opened for case in source.cases})
    folder = out / ".build" / "cases"
    elsewhere = run or in_processes(config.workers)
    with _writing_to(out):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".build" / "lock", lambda line: print(f"build: {line}", file=sys.stderr)):
            remove_unpublished(out)
            base = appending.finished(out, config)
            appending.tell_of_namesakes(opened, base)
            opened = appending.named_apart(opened, base)
            catalogue = appending.grown_catalogue(base, opened)
            excluded = appending.read_excluded(exclude, out, base, elsewhere, progress)
            changes = appending.changes(out, base, opened, catalogue, config.splits)
            outcomes = spool.spool_cases(changes.fresh, catalogue, config, folder, elsewhere, progress)
            used, unusable = appending.sort_outcomes(changes.fresh, outcomes, base, excluded)
            refused = changes.refused + unusable
            appending.tell_doubts(used, out, base)
            if used:
                writers = run or (in_this_process if config.workers == 1 else elsewhere)
                manifest = shuffle.write_shards(used, base, catalogue, config, folder, out, writers, progress)
            elif base is None:
                raise BuildError(appending.nothing_usable(out, refused))
            else:
                manifest = base
            appending.remember(out, changes, manifest, refused)
            shutil.rmtree(folder)
            files = census(opened, config.splits, refused, {case.name for case in manifest.cases})
            return BuildResult(manifest, [entry.error for entry in refused], len(used), changes.absent, files)


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Turn a failure to write into one line with its cure."""
    try:
        yield
    except HeldError as held:
        raise BuildError(f"{out}: another build: {held}, or give another --out") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free space there and build again: what is done is kept" if full else "give an --out that can be written"
        raise BuildError(f"{out}: {error.strerror or error}; {cure}") from error
