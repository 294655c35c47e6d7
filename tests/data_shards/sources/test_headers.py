"""A damaged header of voxels is a volume or one line, never another exception: bytes changed, lost or put in."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import Case, read_case
from mixcl_dist.data_shards.sources.voxels import files_of, format_of
from mixcl_dist.data_shards.volume import CaseError

from ..conftest import write_scan

HEADER_BYTES = {"nii": 352, "nrrd": 600, "mha": 400}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ending → a scan in that format."""
    folder = tmp_path_factory.mktemp("headers")
    write_scan(folder / "scan.nii", seed=1, shape=(12, 10, 8))
    for ending in ("nrrd", "mha"):
        sitk.WriteImage(sitk.ReadImage(folder / "scan.nii"), folder / f"scan.{ending}")
    return {ending: (folder / f"scan.{ending}").read_bytes() for ending in HEADER_BYTES}


@st.composite
def changes(draw, size: int) -> list[tuple[int, bytes]]:
    """Places in a header, and what is put over the bytes there."""
    content = st.one_of(
        st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff" * 4, b"\0" * 8, b"1e99", b"-1", b"\n"])
    )
    return draw(st.lists(st.tuples(st.integers(0, size - 1), content), min_size=1, max_size=4))


@pytest.mark.parametrize("ending", HEADER_BYTES)
@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_damaged_header(whole, tmp_path, ending, examples):
    path = tmp_path / f"scan.{ending}"

    # The same every time: once ITK itself died of a MetaImage header, and this process with it, which a build survives.
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed=changes(HEADER_BYTES[ending]))
    def try_it(changed):
        content = bytearray(whole[ending])
        for place, put in changed:
            content[place : place + len(put)] = put
        path.write_bytes(content)
        try:
            case = Case("a", "d", "unlabelled", format_of(path), files_of(path))
            volume = read_case(case, Catalogue(()))
        except CaseError as error:
            assert "\n" not in str(error)
        else:
            assert volume.hu.dtype == np.int16 and np.isfinite(volume.affine).all()

    try_it()
