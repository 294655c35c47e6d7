"""What the tests of builds read, and how they start one in a process of its own."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import webdataset as wds

from mixcl_dist.data_shards.format.codec import decode


def samples_of(shards: Path) -> list[dict]:
    """All samples as plain webdataset reads them, payloads decoded."""
    samples = []
    for sample in wds.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False):
        meta = json.loads(sample["json"])
        for member, dtype in meta["dtype"].items():
            meta[member] = decode(sample[member], meta["shape"], dtype, member)
        samples.append({"key": sample["__key__"], "shard": Path(sample["__url__"]).name} | meta)
    return samples


def published(shards: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}


# Children of a spawning process import its main module: what the script patches holds in the workers as well.
SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from mixcl_dist.data_shards.building import spool
    from mixcl_dist.data_shards.building.settings import BuildConfig
    from mixcl_dist.data_shards.building.build import build
    {patch}
    if __name__ == "__main__":
        result = build([Path(sys.argv[1])], Path(sys.argv[2]), BuildConfig(
            patch_size=(16, 16, 16), samples_per_shard=10, min_body_fraction=0.2, workers=int(sys.argv[3])))
        print(*result.quarantined, sep="\\n")
"""


def script(folder: Path, patch: str = "") -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(SCRIPT).format(patch=textwrap.dedent(patch)))
    return path
