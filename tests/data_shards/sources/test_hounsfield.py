"""Numbers that are not HU are refused, whatever made them so; no CT is, however it was cut out or padded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import Case, CaseError, open_source, read_case
from mixcl_dist.data_shards.sources.dicom import read_series
from mixcl_dist.data_shards.sources.hounsfield import check_hu
from mixcl_dist.data_shards.sources.voxels import read_voxels

SCAN = Path("scan.nii.gz")


def body(seed: int = 0, shape: tuple[int, int, int] = (40, 36, 12)) -> np.ndarray:
    """Air, fat, soft tissue, organs and bone, with noise; float HU."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = (x / 0.85) ** 2 + (y / 0.75) ** 2
    hu = np.select([radius < 0.85, radius < 1], [40.0, -100.0], -1000.0)
    hu[((x - 0.3) / 0.3) ** 2 + (y / 0.35) ** 2 < 1] = 110
    bone = (x / 0.14) ** 2 + ((y + 0.45) / 0.14) ** 2 < 1
    hu[bone] = rng.uniform(300, 1000, bone.sum())
    return hu + rng.normal(0, 12, shape)


def outside(hu: np.ndarray, value: float) -> np.ndarray:
    """`hu` with `value` outside of a round field of view."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in hu.shape[:2]], indexing="ij")
    return np.where((x**2 + y**2 > 1)[..., None], value, hu)


def halved(hu: np.ndarray, order: int) -> np.ndarray:
    """Resampled in plane, as by a tool that knows of no padding."""
    return ndimage.zoom(hu, (0.5, 0.5, 1), order=order)


WRONG: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "stored values": lambda hu: np.maximum(hu + 1024, 0),
    "stored values, padded": lambda hu: outside(hu + 1024, -2000),
    "stored values, padded and resampled": lambda hu: halved(outside(hu + 1024, -2000), 1),
    "shifted by 1000": lambda hu: hu + 1000,
    "intercept twice": lambda hu: hu - 1024,
    "intercept twice, and padded": lambda hu: outside(hu - 1024, -3024),
    "shifted by -1000": lambda hu: hu - 1000,
    "ten times as large": lambda hu: hu * 10,
    "inverted": lambda hu: -hu,
}
RIGHT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda hu: hu,
    "whole numbers": lambda hu: np.rint(hu).astype(np.int16),
    "padded": lambda hu: outside(hu, -3024),
    "padded twice": lambda hu: outside(np.where(hu < -900, -2000, hu), -3024),
    "padded and resampled": lambda hu: halved(outside(hu, -2000), 1),
    "padded and resampled by splines": lambda hu: halved(outside(hu, -3024), 3),
    "clipped at -1000": lambda hu: np.maximum(hu, -1000),
    "air set to -1024": lambda hu: np.where(hu < -500, -1024, hu),
    "lung alone": lambda hu: np.where(hu < 200, hu / 10 - 850, hu - 300),
    "contrast alone": lambda hu: np.where(hu > -50, hu + 400, hu),
    "no air": lambda hu: np.where(hu < -500, 40, hu),
}
NOT_TOLD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "intercept twice, then clipped": lambda hu: np.maximum(hu - 1024, -1024),
    "shifted by 200": lambda hu: hu + 200,
    "a tenth": lambda hu: hu / 10,
    "inverted, without air": lambda hu: -np.where(hu < -500, 40, hu),
}
"""What can be a CT by its values alone; whoever finds a way to tell moves it up."""


@pytest.mark.parametrize("change", WRONG)
def test_numbers_that_are_not_hu_are_refused_and_it_is_said_what_was_seen(change):
    with pytest.raises(CaseError, match=r"scan\.nii\.gz: has .*-?\d+.*; leave it out, or convert it again from DICOM"):
        check_hu(WRONG[change](body()), SCAN)


@pytest.mark.parametrize("change", [*RIGHT, *NOT_TOLD])
def test_no_ct_is_refused(change):
    check_hu((RIGHT | NOT_TOLD)[change](body()), SCAN)


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from(sorted(WRONG)), st.sampled_from(["<i2", "<i4", "<f4", "<f8"]))
def test_the_type_of_the_numbers_makes_no_difference(seed, change, dtype):
    hu = WRONG[change](body(seed, (24, 20, 6)))
    with pytest.raises(CaseError):
        check_hu(np.rint(np.clip(hu, -32768, 32767)).astype(dtype), SCAN)
    check_hu(np.rint(body(seed, (24, 20, 6))).astype(dtype), SCAN)


def scans(ct: Path, every: int) -> list[Case]:
    cases = [case for name in ("torso", "sarcoma", "dicom") for case in open_source(ct / name).cases]
    real = [case for case in cases if not {"mask", "labels"} & {case.files[0].name.split(".")[0]}]
    return real + list(open_source(ct / "openkbp").cases[::every])


def not_refused(cases: list[Case], changes: dict[str, Callable[[np.ndarray], np.ndarray]]) -> set[tuple[str, str]]:
    passed = set()
    for case in cases:
        hu = (read_series(case.files) if case.format == "dicom" else read_voxels(case.files[0]))[0]
        hu = hu[::2, ::2] if hu.size < 2e6 else hu[::4, ::4]
        check_hu(hu, case.files[0])
        for name, change in changes.items():
            try:
                check_hu(change(hu.astype(np.float32)), case.files[0])
                passed.add((case.files[0].name, name))
            except CaseError:
                pass
    return passed


def test_real_ct_passes_and_what_is_made_of_it_does_not(ct):
    """An aorta without air is still a CT when it is inverted, by its values."""
    passed = not_refused(scans(ct, 200), WRONG)
    assert passed <= {("totalseg_aorta.nii.gz", "inverted")}


@pytest.mark.slow
def test_every_real_ct_passes_and_what_is_made_of_it_does_not(ct):
    """One head is cut so small (143) that resampling leaves next to nothing of it but its edge."""
    passed = not_refused(scans(ct, 1), WRONG)
    assert len(passed) < 10 and {change for _, change in passed} <= {"inverted", "stored values, padded and resampled"}


@pytest.mark.slow
def test_cut_outs_of_real_ct_pass(ct):
    rng, refused, count = np.random.default_rng(0), [], 0
    for case in scans(ct, 12):
        hu = (read_series(case.files) if case.format == "dicom" else read_voxels(case.files[0]))[0]
        for _ in range(10):
            edge = np.minimum(rng.integers(16, 80, 3), hu.shape)
            first = [int(rng.integers(0, length - e + 1)) for length, e in zip(hu.shape, edge, strict=True)]
            box = hu[tuple(slice(f, f + e) for f, e in zip(first, edge, strict=True))]
            if (box > -300).mean() > 0.02:
                count += 1
                try:
                    check_hu(box, case.files[0])
                except CaseError as error:
                    refused.append(str(error))
    assert count > 200 and len(refused) <= count // 100, refused


def test_every_reader_is_guarded(tmp_path):
    twice = np.rint(body() - 1024).astype(np.int16)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(twice, affine), tmp_path / "a.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    for name in ("b.nrrd", "c.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
    source = open_source(tmp_path)
    assert len(source.cases) == 3
    for case in source.cases:
        with pytest.raises(CaseError, match="different values below -1024"):
            read_case(case, Catalogue(()))
