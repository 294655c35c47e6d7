"""Are the shards of real CT still what an earlier version made of it? Every sample of both, voxel by voxel.

    git worktree add ../earlier 85e5dda
    python benchmarks/shards/versions.py --ct ../shared/ct --earlier ../earlier --out benchmarks/results/shards

Both versions build by their own command line what is copied to one archive: real scans as NIfTI with labels, as DICOM
with SEG and RTSTRUCT, and those that are to be refused. A sample is known by its scan's digest and its place there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset as wds

from mixcl_dist.data_shards.format.codec import decode

HERE = Path(__file__).resolve().parents[2]
EVERY_OPENKBP = 8
SETTINGS = {
    "as scanned": ["--build.patch_size", "48,48,48"],
    "at 4 mm": ["--build.patch_size", "32,32,32", "--build.spacing_mm", "4,4,4"],
}
CLASSES = {"liver_seg": "liver: {source: Liver}", "dicom": "tumour: {source: GTV_Mass_CT}"}
"""Folder → its `classes.yaml`."""
Sample = tuple[dict, dict[str, np.ndarray]]
"""What a sample's JSON says, and its arrays."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ct", type=Path, required=True, help="folder of real CT")
    parser.add_argument("--earlier", type=Path, required=True, help="checkout of the earlier version")
    parser.add_argument("--out", type=Path, required=True, help="folder for versions.json")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, sources in archive(options.ct.resolve(), Path(folder, "archive")).items():
            for name, words in SETTINGS.items():
                out = Path(folder, kind, name)
                then = built(options.earlier, sources, out / "then", words)
                rows[f"{kind}, {name}"] = compare(then, built(HERE, sources, out / "now", words))
    content = {"earlier": commit(options.earlier), "now": commit(HERE), "settings": SETTINGS, "compared": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "versions.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in row.items() if isinstance(count, int)))
        for line in row["differences"]:
            print(f"  {line}")


def archive(ct: Path, folder: Path) -> dict[str, list[Path]]:
    """What is built together, in `folder` as far as something is added to it; of copies of a scan each has one."""
    content = json.loads((ct / "openkbp/dataset.json").read_text())
    chosen = [
        entry | {key: str(ct / "openkbp" / entry[key]) for key in ("image", "label")}
        for entry in content["training"][::EVERY_OPENKBP]
    ]
    (folder / "openkbp").mkdir(parents=True)
    (folder / "openkbp/dataset.json").write_text(json.dumps(content | {"training": chosen, "validation": []}))
    kinds = {"NIfTI": [folder / "openkbp", ct / "torso"], "DICOM": []}
    for path in (*sorted((ct / "dicom").iterdir()), *sorted((ct / "sarcoma").glob("STS*/*"))):
        copy = shutil.copytree(path, folder / path.relative_to(ct))
        kinds["NIfTI" if path.name in ("nifti", "mixed_series") else "DICOM"].append(copy)
        if classes := CLASSES.get(path.name):
            (copy / "classes.yaml").write_text(classes)
    return kinds


def built(root: Path, sources: list[Path], out: Path, words: list[str]) -> dict[tuple, Sample]:
    """The samples that the version in `root` makes, by scan and place."""
    environment = os.environ | {"PYTHONPATH": str(root.resolve()), "MIXCL_PSEUDONYM_KEY": "versions"}
    command = [sys.executable, "-m", "mixcl_dist", "shards", "build", *map(str, sources), "--out", str(out), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode == 2 or not (out / "manifest.json").exists():
        sys.exit(f"{root}: {done.stderr}")
    return {(about["source_digest"], *about["offset_voxels"]): (about, arrays) for about, arrays in samples(out)}


def samples(shards: Path) -> Iterator[Sample]:
    """Every sample, read by plain webdataset."""
    for raw in wds.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False):
        about = json.loads(raw["json"])
        types = {member: np.dtype(dtype) for member, dtype in about["dtype"].items()}
        yield about, {name: decode(raw[name], about["shape"], dtype, name) for name, dtype in types.items()}


def compare(then: dict[tuple, Sample], now: dict[tuple, Sample]) -> dict:
    """How many samples are equal, and a line for each scan in which they are not."""
    equal, differences = 0, []
    names = {about["case"] for about, _ in (*then.values(), *now.values())}
    for name in sorted(names):
        old, new = ({key: s for key, s in side.items() if s[0]["case"] == name} for side in (then, now))
        same = [key for key in old.keys() & new.keys() if is_equal(old[key], new[key])]
        equal += len(same)
        if len(same) < max(len(old), len(new)):
            voxels = sum(int((old[key][1]["ct.b2"] != new[key][1]["ct.b2"]).sum()) for key in old.keys() & new.keys())
            differences.append(
                f"{name}: {len(old)} samples then, {len(new)} now, {len(same)} equal; "
                f"{voxels} voxels of samples at the same place differ"
            )
    return {
        "cases": len(names),
        "samples then": len(then),
        "samples now": len(now),
        "equal": equal,
        "differences": differences,
    }


def is_equal(one: Sample, other: Sample) -> bool:
    """In voxels, labels and all that is said of them but digests of payloads."""
    said = [{key: value for key, value in about.items() if key != "xxh3"} for about, _ in (one, other)]
    return (
        said[0] == said[1]
        and one[1].keys() == other[1].keys()
        and all(np.array_equal(one[1][name], other[1][name]) for name in one[1])
    )


def commit(root: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
