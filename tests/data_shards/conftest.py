"""A small synthetic cohort on disk, and shards built from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.settings import BuildConfig

SPACING_MM = (2.0, 2.0, 3.0)


def write_scan(path: Path, seed: int, shape: tuple[int, int, int] = (40, 36, 30)) -> np.ndarray:
    """A noisy ellipsoid of fat and soft tissue in air; returns its mask of soft tissue as uint8."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    hu = np.select([radius < 0.6, radius < 0.95], [50, -100], -1000) + rng.normal(0, 20, shape)
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    nib.save(nib.Nifti1Image(hu.round().astype(np.int16), affine), path)
    return (radius < 0.6).astype(np.uint8)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a Decathlon data set of scans "a", "b", … with labels for the first `labelled` of them."""

    def make(*names: str, labelled: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("cohort")
        entries = []
        for number, name in enumerate(names):
            organ = write_scan(folder / f"{name}.nii.gz", seed=ord(name[0]))
            entry = {"image": f"{name}.nii.gz"}
            if number < labelled:
                affine = nib.load(folder / f"{name}.nii.gz").affine
                nib.save(nib.Nifti1Image(organ, affine), folder / f"{name}_label.nii.gz")
                entry |= {"label": f"{name}_label.nii.gz"}
            entries.append(entry)
        content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "core"}, "training": entries}
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="session")
def small_config() -> BuildConfig:
    """Patches of 16³ and shards of 10, so that a few scans give a few shards."""
    return BuildConfig(patch_size=(16, 16, 16), samples_per_shard=10, min_body_fraction=0.2)


@pytest.fixture(scope="session")
def built(cohort, small_config, tmp_path_factory) -> Path:
    """Shards of five scans, "a" and "b" with labels. To be read, not changed."""
    out = tmp_path_factory.mktemp("built") / "shards"
    assert build([cohort("a", "b", "c", "d", "e", labelled=2)], out, small_config).quarantined == []
    return out
