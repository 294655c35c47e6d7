"""NIfTI becomes volumes whose voxels lie where SimpleITK sees them; what is no CT is refused in one line."""

from __future__ import annotations

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.sources import CaseError, open_source, read_case

from .small_cases import ct_values, nifti_case, organ_values, read, write


def test_voxels_lie_where_simpleitk_sees_them(ct):
    """SimpleITK reads header and voxels on its own; each of its voxels is found again at its physical
    position."""
    rng = np.random.default_rng(0)
    for folder in ("torso", "sarcoma", "openkbp"):
        cases = [case for case in open_source(ct / folder).cases if case.format == "nifti"]
        cases = [case for case in cases if "mask" not in case.files[0].name]
        for case in cases[:6]:
            volume = read_case(case, merged([[name for _, name in case.label_values]]))
            assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
            image = sitk.ReadImage(str(case.files[0]))
            label = None if not case.labels else sitk.ReadImage(str(case.labels[0]))
            np.testing.assert_allclose(sorted(volume.spacing), sorted(image.GetSpacing()), rtol=1e-5)
            for index in rng.integers(0, image.GetSize(), (200, 3)).tolist():
                x, y, z = image.TransformIndexToPhysicalPoint(index)
                found = np.linalg.solve(volume.affine, [-x, -y, z, 1])[:3]
                voxel = tuple(np.rint(found).astype(int))
                np.testing.assert_allclose(found, voxel, atol=1e-2)
                assert volume.hu[voxel] == max(-1024, round(image[index])), case.name
                if label is not None:
                    assert (volume.label[voxel] > 0) == (label[index] > 0)


def test_sform_goes_before_qform(tmp_path):
    image = nib.Nifti1Image(ct_values(), np.eye(4))
    image.set_qform(np.diag([4.0, 4.0, 4.0, 1.0]), code=1)
    image.set_sform(np.diag([-2.0, -2.0, 3.0, 1.0]), code=1)
    nib.save(image, tmp_path / "a.nii")
    assert read(nifti_case(tmp_path / "a.nii")).spacing == (2.0, 2.0, 3.0)
    image.set_sform(None, code=0)
    nib.save(image, tmp_path / "b.nii")
    assert read(nifti_case(tmp_path / "b.nii")).spacing == (4.0, 4.0, 4.0)


def test_fractions_are_rounded_and_values_beyond_ct_clipped(tmp_path):
    values = ct_values().astype(np.float32)
    values[0, 0, :4] = [-3024, 40.6, 1e6, -1e6]
    image = nib.Nifti1Image(values, np.eye(4))
    nib.save(image, tmp_path / "a.nii")
    hu = read(nifti_case(tmp_path / "a.nii")).hu
    assert hu.dtype == np.int16 and hu[0, 0, :4].tolist() == [-1024, 41, 32767, -1024]


def test_scale_and_intercept_are_applied(tmp_path):
    hu = np.maximum(ct_values(), -1024)
    file = write(tmp_path / "a.nii", (2 * (hu + 1024)).astype(np.uint16))
    header = bytearray(file.read_bytes())
    header[112:120] = np.array([0.5, -1024], "<f4").tobytes()  # scl_slope, scl_inter
    file.write_bytes(header)
    np.testing.assert_array_equal(read(nifti_case(file)).hu, hu[::-1, ::-1])


def test_a_trailing_axis_of_one_is_no_fourth_dimension(tmp_path):
    image = write(tmp_path / "a.nii.gz", ct_values()[..., None])
    assert read(nifti_case(image)).hu.shape == (12, 14, 10)


def mask_like_pet() -> np.ndarray:
    return np.random.default_rng(0).gamma(1, 500, (12, 14, 10)).astype(np.int16)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (ct_values()[..., 0], "12 x 14 voxels"),
        (ct_values()[..., :1], "12 x 14 x 1 voxels"),
        (np.stack([ct_values()] * 3, axis=-1), "12 x 14 x 10 x 3 voxels"),
        (np.where(organ_values() == 1, np.nan, ct_values()), "36 voxels are NaN"),
        (np.where(organ_values() == 1, np.inf, ct_values()), "36 voxels are NaN or infinite"),
        (ct_values().astype(np.complex64), "complex64"),
        (np.zeros((12, 14, 10), [("R", "u1"), ("G", "u1"), ("B", "u1")]), r"voxels are colours \(R, G, B\)"),
        (organ_values(), "only 3 different values: a mask"),
        (mask_like_pet(), "no air or fat: not a CT in HU"),
        (ct_values() + np.int16(1024), "not a CT in HU"),
        (np.random.default_rng(0).normal(-990, 15, (12, 14, 10)), "only air"),
        (ct_values() / 1000, "a mask"),
    ],
)
def test_an_image_that_is_no_ct_volume_is_refused(tmp_path, array, says):
    image = write(tmp_path / "a.nii.gz", array)
    with pytest.raises(CaseError, match=rf"a\.nii\.gz: .*{says}.*; ."):
        read(nifti_case(image))


def test_masks_among_real_scans_are_refused(ct):
    files = [ct / "sarcoma/STS_001/nifti/mask.nii.gz", ct / "dicom/totalseg_j2k/labels.nii.gz"]
    files += sorted((ct / "torso/labels").iterdir()) + sorted((ct / "openkbp/labelsTr").iterdir())[:5]
    for file in files:
        with pytest.raises(CaseError, match=r"a mask|no air or fat"):
            read(nifti_case(file))


@pytest.mark.parametrize("keep", [0, 200, 400, 0.3, 0.999])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_truncated_file_is_refused(tmp_path, keep, ending):
    whole = write(tmp_path / f"a{ending}", ct_values()).read_bytes()
    (tmp_path / f"a{ending}").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(CaseError, match=r"cannot be read as NIfTI: .*; copy or download it again"):
        read(nifti_case(tmp_path / f"a{ending}"))


def test_a_flipped_bit_in_a_packed_file_is_found(tmp_path):
    """Stored rather than deflated, so that nothing but the checksum at the stream's end can tell."""
    raw = write(tmp_path / "a.nii", ct_values()).read_bytes()
    packed = bytearray(gzip.compress(raw, compresslevel=0))
    packed[len(packed) // 2] ^= 4
    (tmp_path / "a.nii.gz").write_bytes(packed)
    with pytest.raises(CaseError, match="CRC"):
        read(nifti_case(tmp_path / "a.nii.gz"))


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    (tmp_path / "a.nii.gz").write_text("no scan")
    for name in ("a.nii.gz", "b.nii.gz"):
        with pytest.raises(CaseError, match=f"{name}: cannot be read as NIfTI"):
            read(nifti_case(tmp_path / name))


@pytest.mark.parametrize(("unit", "mm"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1.0), ("unknown", 1.0)])
def test_lengths_are_in_the_unit_of_the_header_as_simpleitk_has_it(tmp_path, unit, mm):
    affine = np.diag([-2 / mm, -2 / mm, 3 / mm, 1.0])
    affine[:3, 3] = np.array([40.0, -30, 20]) / mm
    image = nib.Nifti1Image(ct_values(), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    volume, peer = read(nifti_case(tmp_path / "a.nii")), sitk.ReadImage(str(tmp_path / "a.nii"))
    np.testing.assert_allclose(volume.spacing, peer.GetSpacing(), rtol=1e-5)
    np.testing.assert_allclose(volume.affine @ [11, 13, 0, 1], [40, -30, 20, 1], rtol=1e-5)


def test_an_impossible_length_names_the_unit_that_the_header_gives(tmp_path):
    image = nib.Nifti1Image(ct_values(), np.diag([40.0, 40, 40, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    stated = r"0\.04 x 0\.04 x 0\.04 mm is impossible \(the header gives lengths in microns\)"
    with pytest.raises(CaseError, match=stated):
        read(nifti_case(tmp_path / "a.nii"))


def test_a_header_without_orientation_or_with_an_impossible_one_is_refused(tmp_path):
    image = nib.Nifti1Image(ct_values(), np.eye(4))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(CaseError, match="which side is left"):
        read(nifti_case(tmp_path / "a.nii"))
    image = nib.Nifti1Image(ct_values(), np.eye(4))
    image.header["srow_z"] = [0, 0, 80, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = nib.Nifti1Image(ct_values(), None, image.header)
    nib.save(image, tmp_path / "b.nii")
    with pytest.raises(CaseError, match="1 x 1 x 80 mm is impossible"):
        read(nifti_case(tmp_path / "b.nii"))
