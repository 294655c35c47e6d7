"""Label files take the catalogue's numbers, and fit their image or are refused."""

from __future__ import annotations

import numpy as np
import pytest

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.sources import CaseError, read_case

from .small_cases import AFFINE, ct_values, nifti_case, organ_values, read, write


def test_labels_take_the_catalogues_numbers_whatever_their_orientation(tmp_path):
    image = write(tmp_path / "a.nii.gz", ct_values(), AFFINE)
    flipped = AFFINE @ np.array([[-1, 0, 0, 11], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    label = write(tmp_path / "l.nii.gz", organ_values()[::-1].astype(np.float32), flipped)
    volume = read(nifti_case(image, label))  # catalogue: spleen 1, liver 2; both axes flip on the way to RAS
    np.testing.assert_array_equal(volume.label, np.array([0, 2, 1], np.uint8)[organ_values()[::-1, ::-1]])


@pytest.mark.parametrize(
    ("label", "affine", "says"),
    [
        (organ_values()[:-1], AFFINE, "differ in size: 11 x 14 x 10 and 12 x 14 x 10 voxels"),
        (organ_values(), AFFINE + np.diag([0, 0, 0.1, 0]), "label lies 0.9 mm off the image"),
        (organ_values(), AFFINE @ np.diag([-1, 1, 1, 1]), "off the image"),
        (organ_values() * 3, AFFINE, "label holds 3, 6, which has no class name"),
        (organ_values() * 0.5, AFFINE, "label holds 0.5, which"),
        (organ_values().astype(np.int16) * -1, AFFINE, "label holds -2, -1, which"),
        (np.where(organ_values(), np.nan, 0), AFFINE, "NaN"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(tmp_path, label, affine, says):
    image = write(tmp_path / "a.nii.gz", ct_values())
    file = write(tmp_path / "l.nii.gz", label, affine)
    with pytest.raises(CaseError, match=rf"l\.nii\.gz: .*{says}"):
        read(nifti_case(image, file))


def test_a_class_that_the_catalogue_lacks_is_refused(tmp_path):
    image, label = write(tmp_path / "a.nii.gz", ct_values()), write(tmp_path / "l.nii.gz", organ_values())
    with pytest.raises(CaseError, match="class 'liver' is unknown"):
        read_case(nifti_case(image, label), merged([("spleen",)]))
