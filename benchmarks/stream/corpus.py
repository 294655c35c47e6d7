"""The samples that all contestants stream: real 96³ patches as our shards, then the same ones in every other format."""

from __future__ import annotations

import io
import math
import os
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import blosc2
import numpy as np
import xxhash

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.format.manifest import Manifest

EDGE = 96
CONFIG = BuildConfig(
    patch_size=(EDGE, EDGE, EDGE), overlap=0.9, min_body_fraction=0.15, samples_per_shard=32, workers=2
)
"""Patches that overlap are as good as others here: each is stored and decoded by itself."""
TORSO = ("totalseg_aorta.nii.gz", "totalseg_example.nii.gz")
EVERY_OPENKBP = {False: 3, True: 40}
"""Of OpenKBP's training scans, sorted by name, each so manyth; by --quick."""


class Corpus(NamedTuple):
    folder: Path
    digests: list[str]
    """xxh3 of 128 bits of every patch's voxels."""
    facts: dict[str, object]


def prepare(ct: Path, folder: Path, quick: bool, baselines: Path | None, say: Callable[[str], None]) -> Corpus:
    """Write what `folder` does not hold yet, and read all of it once, so that it lies in the page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MIXCL_PSEUDONYM_KEY", "benchmark")  # the same names everywhere; the scans are public
    shards = folder / "shards"
    sources = link_sources(ct, folder / "sources", quick)
    _once(shards, lambda: build([sources], shards, CONFIG), say)
    _once(folder / "npz", lambda: write_npz(shards, folder / "npz"), say)
    if baselines:
        writer = [str(baselines / "bin" / "python"), str(Path(__file__).with_name("foreign.py"))]
        _once(folder / "mosaic-array", lambda: _run([*writer, str(shards), str(folder)]), say)
    say("reading everything once")
    for file in folder.rglob("*"):
        if file.is_file():
            file.read_bytes()
    return Corpus(folder, sorted(truth(shards)), facts(shards, folder))


def link_sources(ct: Path, folder: Path, quick: bool) -> Path:
    """A folder of links to the scans that are cut into patches."""
    scans = sorted((ct / "openkbp" / "imagesTr").glob("*.nii.gz"))[:: EVERY_OPENKBP[quick]]
    scans += [ct / "torso" / "images" / name for name in (TORSO[1:] if quick else TORSO)]
    folder.mkdir(exist_ok=True)
    for scan in scans:
        if not (folder / scan.name).exists():
            (folder / scan.name).symlink_to(scan.resolve())
    return folder


def payloads(shard: Path) -> dict[str, bytes]:
    """Key → blosc2 payload of one shard, read as the plain tar file it is."""
    found = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            if name == "ct.b2":
                found[key] = tar.extractfile(member).read()
    return found


def truth(shards: Path) -> list[str]:
    """Digests of all patches, decoded by blosc2 without any code of ours."""
    tars = sorted(shards.glob("shard-*.tar"))
    return [xxhash.xxh3_128_hexdigest(blosc2.decompress(payload)) for tar in tars for payload in payloads(tar).values()]


def write_npz(shards: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(partial(_write_npz_shard, out), sorted(shards.glob("shard-*.tar"))))


def _write_npz_shard(out: Path, shard: Path) -> None:
    with tarfile.open(out / shard.name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, payload in payloads(shard).items():
            content = io.BytesIO()
            image = np.frombuffer(blosc2.decompress(payload), np.int16).reshape(CONFIG.patch_size)
            np.savez_compressed(content, image=image)
            header = tarfile.TarInfo(f"{key}.npz")
            header.size = content.tell()
            content.seek(0)
            tar.addfile(header, content)


def facts(shards: Path, folder: Path) -> dict[str, object]:
    """What a reader must know of the corpus."""
    manifest = Manifest.load(shards)
    voxels = manifest.patches * math.prod(manifest.patch_size)
    sizes = [len(payload) for tar in sorted(shards.glob("shard-*.tar")) for payload in payloads(tar).values()]
    return {
        "patches": manifest.patches,
        "cases": len(manifest.cases),
        "patch_size": list(manifest.patch_size),
        "bytes_per_voxel": sum(sizes) / voxels,
        "least_most_bytes_per_voxel": [edge(sizes) * manifest.patches / voxels for edge in (min, max)],
        "npz_bytes_per_voxel": sum(tar.stat().st_size for tar in (folder / "npz").glob("*.tar")) / voxels,
        "manifest": manifest.digest,
    }


def _once(result: Path, write: Callable[[], object], say: Callable[[str], None]) -> None:
    """Write unless an earlier run finished with it."""
    done = result.with_name(f"{result.name}.done")
    if not done.exists():
        say(f"writing {result.name} …")
        write()
        done.touch()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
