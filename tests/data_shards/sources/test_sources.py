"""What lies at a path is known for the source that it is, or refused; a case is read as one volume."""

from __future__ import annotations

import numpy as np
import pytest

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.sources import CaseError, open_source, read_case

from .small_cases import ct_values, nifti_case, organ_values, write


@pytest.mark.parametrize(
    ("path", "says"),
    [("empty", "holds no CT"), ("missing", "No such file"), ("scan.nii.gz", "is no data set")],
)
def test_what_is_no_source_is_refused(tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "scan.nii.gz", ct_values())
    with pytest.raises(CaseError, match=f"{path}: .*{says}"):
        open_source(tmp_path / path)


def test_read_case_resamples(tmp_path):
    case = nifti_case(write(tmp_path / "a.nii.gz", ct_values()), write(tmp_path / "l.nii.gz", organ_values()))
    volume = read_case(case, merged([("liver", "spleen")]), spacing_mm=(3.0, 3.0, 3.0))
    assert volume.hu.shape == volume.label.shape == (8, 9, 10)
    np.testing.assert_allclose(volume.spacing, 3.0)
