"""Small images, labels and lists that the tests of the sources write."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.sources import Case, read_case

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


LABELS = {"0": "background", "1": "liver", "2": "spleen"}


def ct_values(seed: int = 0, shape=(12, 14, 10)) -> np.ndarray:
    """A block of tissue in air, with the noise that no mask has."""
    hu = np.full(shape, -1000.0)
    hu[2:-2, 2:-2] = 40
    return np.rint(hu + np.random.default_rng(seed).normal(0, 15, shape)).astype(np.int16)


def organ_values(shape=(12, 14, 10)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[3:6, 4:8, 2:5] = 1
    label[7:9, 4:8, 2:5] = 2
    return label


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def nifti_case(image: Path, label: Path | None = None) -> Case:
    values = ((1, "liver"), (2, "spleen"))
    return Case("a", "set", "training", "nifti", (image,), (label,) if label else (), values, ("liver", "spleen"))


def read(case: Case):
    return read_case(case, merged([("spleen", "liver")]))
