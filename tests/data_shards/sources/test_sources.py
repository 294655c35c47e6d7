"""Lists and folders of NIfTI become cases, cases become volumes, and what is wrong is said in one line."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mixcl_dist.data_shards.catalogue import IGNORED, merged
from mixcl_dist.data_shards.sources import Case, CaseError, open_source, read_case

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
LABELS = {"0": "background", "1": "liver", "2": "spleen"}


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch):
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "key of the tests")


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


# --- Decathlon -------------------------------------------------------------------------------------------------


def test_openkbp_is_found_whole(ct):
    source = open_source(ct / "openkbp")
    assert source.name == "openkbp" and source.problems == ()
    assert [sum(case.split == split for case in source.cases) for split in ("training", "validation")] == [170, 33]
    assert source.classes[:2] == ("brainstem", "spinal_cord") and len(source.classes) == 7
    annotated = [case for case in source.cases if case.split == "training" and "esophagus" in case.annotated]
    assert len(annotated) == 59
    doubtful = next(case for case in source.cases if case.name == "openkbp_215")
    assert "spinal_cord" in doubtful.annotated and "spinal_cord" not in doubtful.reliable


def test_every_openkbp_case_is_ct_with_the_labels_that_it_announces(ct):
    source = open_source(ct / "openkbp" / "dataset.json")
    catalogue = merged([source.classes])
    for case in source.cases[::12]:
        volume = read_case(case, catalogue)
        present = {catalogue.classes[k - 1] for k in np.unique(volume.label) if k}
        assert present == set(case.annotated), case.name


def test_decathlon_splits(tmp_path):
    for name in "abcd":
        write(tmp_path / f"imagesTr/{name}.nii.gz", ct_values())
        write(tmp_path / f"labelsTr/{name}.nii.gz", organ_values())
    entry = {name: {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "abcd"}
    content = {
        "labels": LABELS,
        "modality": {"0": "CT"},
        "training": [entry["a"], entry["b"] | {"annotated": ["spleen"]}, {"image": "imagesTr/c.nii.gz"}],
        "validation": [entry["d"]],
        "test": ["./imagesTs/withheld.nii.gz"],
    }
    source = open_source(write_json(tmp_path / "dataset.json", content))
    assert source.problems == () and source.classes == ("liver", "spleen")
    found = {case.name: (case.split, case.annotated) for case in source.cases}
    assert found == {
        "a": ("training", ("liver", "spleen")),
        "b": ("training", ("spleen",)),
        "c": ("unlabelled", ()),
        "d": ("validation", ("liver", "spleen")),
    }


def test_a_missing_file_names_json_case_and_file(tmp_path):
    write(tmp_path / "a.nii.gz", ct_values())
    entries = [{"image": "a.nii.gz"}, {"image": "gone.nii.gz"}, {"image": "a.nii.gz", "label": "lost.nii.gz"}]
    source = open_source(write_json(tmp_path / "dataset.json", {"labels": LABELS, "training": entries}))
    assert [case.name for case in source.cases] == ["a"]
    image, label = map(str, source.problems)
    assert image.startswith(f"{tmp_path}/dataset.json: image of case gone.nii.gz is missing: {tmp_path}/gone.nii.gz;")
    assert f"label of case a.nii.gz is missing: {tmp_path}/lost.nii.gz" in label


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"labels": LABELS}, "lists no cases"),
        ([], "lists no cases"),
        ("text", "lists no cases"),
        ({"labels": LABELS, "modality": {"0": "MRI"}, "training": [{}]}, "modality is MRI, not one CT"),
        ({"labels": LABELS, "modality": {"0": "CT", "1": "PET"}, "training": [{}]}, "CT, PET, not one CT"),
        ({"labels": {"liver": [1, 2]}, "training": [{}]}, "'liver' is a region"),
        ({"labels": {"one": "liver"}, "training": [{}]}, "labels hold 'one': 'liver'"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_whole(tmp_path, content, says):
    with pytest.raises(CaseError, match=says):
        open_source(write_json(tmp_path / "dataset.json", content))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (7, "training entry 7 has no single image"),
        ({"image": ["a_0.nii", "a_1.nii"]}, "has no single image"),
        ({"image": "a.nii.gz", "label": "l.nii.gz", "annotated": ["livr"]}, "'livr' is unknown; did you mean 'liver'"),
        ({"image": "a.nii.gz", "label": "l.nii.gz", "doubtful": ["gall"]}, "'gall' is unknown"),
        ({"image": "a.nii.bz2"}, "cannot be read by its name"),
    ],
)
def test_a_bad_entry_is_a_problem_and_the_others_stay(tmp_path, entry, says):
    for name in ("a.nii.gz", "b.nii.gz", "l.nii.gz"):
        write(tmp_path / name, ct_values())
    (tmp_path / "a.nii.bz2").touch()
    content = {"labels": LABELS, "training": [entry, {"image": "b.nii.gz"}]}
    source = open_source(write_json(tmp_path / "dataset.json", content))
    assert [case.name for case in source.cases] == ["b"]
    (problem,) = source.problems
    assert says in str(problem) and "\n" not in str(problem)


def test_validation_without_a_label_is_a_problem(tmp_path):
    write(tmp_path / "a.nii.gz", ct_values())
    source = open_source(write_json(tmp_path / "dataset.json", {"validation": [{"image": "a.nii.gz"}]}))
    assert source.cases == () and "validation case a.nii.gz has no label" in str(source.problems[0])


def test_not_json_says_where(tmp_path):
    (tmp_path / "dataset.json").write_text('{"training": [}')
    with pytest.raises(CaseError, match=r"dataset\.json: not valid JSON: .*line 1 column 15"):
        open_source(tmp_path)


# --- case list, nnU-Net, folder --------------------------------------------------------------------------------


def test_a_case_list_has_classes_of_its_own_for_each_case(ct):
    source = open_source(ct / "torso")
    cases = {case.name: case for case in source.cases}
    assert list(cases) == ["totalseg_example", "totalseg_aorta", "ibsi_lung", "crlm_1004"]
    assert cases["ibsi_lung"].annotated == ("lung_tumour",)
    assert cases["crlm_1004"].split == "unlabelled" and cases["crlm_1004"].labels == ()
    catalogue = merged([source.classes])
    volume = read_case(cases["totalseg_aorta"], catalogue)
    aorta = volume.hu[volume.label == catalogue.index("aorta")]
    assert 150 < np.median(aorta) < 600  # with contrast


def nnunet_folder(root: Path, **changes) -> Path:
    for name in ("case.1", "case_2"):
        write(root / f"imagesTr/{name}_0000.nii.gz", ct_values())
        write(root / f"labelsTr/{name}.nii.gz", organ_values())
    write(root / "imagesUn/more_0000.nii.gz", ct_values())
    write(root / "imagesTs/withheld_0000.nii.gz", ct_values())
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    write_json(root / "dataset.json", content | changes)
    return root


def test_nnunet(tmp_path):
    source = open_source(nnunet_folder(tmp_path / "Dataset001_Liver"))
    assert source.name == "Dataset001_Liver" and source.problems == ()
    assert source.classes == ("liver", "spleen")
    found = {case.name: (case.split, case.annotated) for case in source.cases}
    both = ("liver", "spleen")
    assert found == {"case-1": ("training", both), "case_2": ("training", both), "more": ("unlabelled", ())}
    assert read_case(source.cases[0], merged([source.classes])).label.max() == 2


def test_nnunet_of_the_first_version_lists_names_without_channel(tmp_path):
    listed = [{"image": "./imagesTr/case_2.nii.gz", "label": "./labelsTr/case_2.nii.gz"}]
    content = {"labels": LABELS, "modality": {"0": "CT"}, "training": listed}
    root = nnunet_folder(tmp_path)
    write_json(root / "dataset.json", content)
    assert {case.name for case in open_source(root).cases} == {"case-1", "case_2", "more"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "modality is T1, T2, not one CT"),
        ({"file_ending": ".png"}, "file ending .png"),
        ({"labels": {"background": 0, "organ": [1, 2], "tumour": 2}}, "'organ' is a region"),
    ],
)
def test_nnunet_that_cannot_be_used_is_refused(tmp_path, changes, says):
    with pytest.raises(CaseError, match=says):
        open_source(nnunet_folder(tmp_path, **changes))


def test_nnunet_problems_are_of_single_files(tmp_path):
    root = nnunet_folder(tmp_path)
    write(root / "imagesTr/case_2_0001.nii.gz", ct_values())
    (root / "labelsTr/case.1.nii.gz").unlink()
    source = open_source(root)
    assert {case.name for case in source.cases} == {"case_2", "more"}
    unlabelled, channel = source.problems
    assert channel.where.name == "case_2_0001.nii.gz" and "is not channel _0000" in channel.what
    assert unlabelled.where.name == "case.1_0000.nii.gz" and "case.1.nii.gz is missing" in unlabelled.what


def test_ignored_voxels_are_255_and_no_class(tmp_path):
    """nnU-Net's `ignore` label: the highest number there, which says that nobody has looked."""
    root = nnunet_folder(tmp_path, labels={"background": 0, "liver": 1, "ignore": 2})
    source = open_source(root)
    assert source.classes == ("liver",) and source.cases[0].annotated == ("liver",)
    label = read_case(source.cases[0], merged([source.classes])).label
    np.testing.assert_array_equal(label, np.array([0, 1, IGNORED], np.uint8)[organ_values()[::-1, ::-1]])


def test_a_folder_of_scans_is_unlabelled_and_names_nobody(tmp_path, monkeypatch):
    """Neither file nor folder names, which are those of patients in many an archive."""
    root = tmp_path / "SMITH_JOHN"
    for path in ("p1/DOE_JANE.nii.gz", "p2/DOE_JANE.nii", "p2/MILLER.nii.gz", "p2/.hidden.nii.gz"):
        write(root / path, ct_values())
    source = open_source(root)
    said = [source.name, *(text for case in source.cases for text in (case.name, case.dataset))]
    assert not [text for text in said for name in ("SMITH", "DOE", "MILLER", "p1", "p2") if name in text]
    assert len({case.name for case in source.cases}) == 3 and {case.split for case in source.cases} == {"unlabelled"}
    assert [case.name for case in open_source(root).cases] == [case.name for case in source.cases]
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "another key")
    assert not {case.name for case in open_source(root).cases} & {case.name for case in source.cases}


def test_cases_that_share_a_file_name_are_told_apart_by_folder(tmp_path):
    paths = ("p1/ct.nii.gz", "p2/ct.nii", "p2/other.nii.gz")
    entries = [{"image": str(write(tmp_path / path, ct_values()).relative_to(tmp_path))} for path in paths]
    source = open_source(write_json(tmp_path / "cases.json", entries))
    assert [case.name for case in source.cases] == ["p1-ct", "p2-ct", "other"]


def test_names_that_are_the_same_without_dots_are_refused(tmp_path):
    for name in ("a.b.nii.gz", "a-b.nii.gz"):
        write(tmp_path / name, ct_values())
    source = open_source(write_json(tmp_path / "cases.json", ["a-b.nii.gz", "a.b.nii.gz"]))
    assert len(source.cases) == 1
    (problem,) = source.problems
    assert "a.b.nii.gz: is named a-b as is" in str(problem) and "a-b.nii.gz" in str(problem)


def test_a_scan_in_two_splits_is_kept_once(tmp_path):
    write(tmp_path / "a.nii.gz", ct_values())
    write(tmp_path / "l.nii.gz", organ_values())
    entry = {"image": "a.nii.gz", "label": "l.nii.gz"}
    content = {"labels": LABELS, "training": [entry], "validation": [entry]}
    source = open_source(write_json(tmp_path / "dataset.json", content))
    assert [case.split for case in source.cases] == ["training"] and len(source.problems) == 1


@pytest.mark.parametrize(
    ("path", "says"),
    [("empty", "holds no CT"), ("missing", "No such file"), ("scan.nii.gz", "is no data set")],
)
def test_what_is_no_source_is_refused(tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "scan.nii.gz", ct_values())
    with pytest.raises(CaseError, match=f"{path}: .*{says}"):
        open_source(tmp_path / path)


# --- reading ---------------------------------------------------------------------------------------------------


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


def test_labels_take_the_catalogues_numbers_whatever_their_orientation(tmp_path):
    image = write(tmp_path / "a.nii.gz", ct_values(), AFFINE)
    flipped = AFFINE @ np.array([[-1, 0, 0, 11], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    label = write(tmp_path / "l.nii.gz", organ_values()[::-1].astype(np.float32), flipped)
    volume = read(nifti_case(image, label))  # catalogue: spleen 1, liver 2; both axes flip on the way to RAS
    np.testing.assert_array_equal(volume.label, np.array([0, 2, 1], np.uint8)[organ_values()[::-1, ::-1]])


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


def test_read_case_resamples(tmp_path):
    case = nifti_case(write(tmp_path / "a.nii.gz", ct_values()), write(tmp_path / "l.nii.gz", organ_values()))
    volume = read_case(case, merged([("liver", "spleen")]), spacing_mm=(3.0, 3.0, 3.0))
    assert volume.hu.shape == volume.label.shape == (8, 9, 10)
    np.testing.assert_allclose(volume.spacing, 3.0)
