"""`classes.yaml` brings values, names of masks and lists to the catalogue's classes; mistakes in it are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcl_dist.data_shards.catalogue import IGNORED, Catalogue, merged
from mixcl_dist.data_shards.sources import CaseError, Source, open_source, read_case
from mixcl_dist.data_shards.sources.classes import read_class_map

README = Path(__file__).parents[3] / "README.md"
LABELS = {"0": "background", "1": "kidney_left", "2": "kidney_right", "3": "Liver", "4": "couch"}


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), path)


def stored(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5, (12, 14, 10)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set of two labelled cases; of "b" only the left kidney and the liver were looked for."""
    hu = np.random.default_rng(0).normal(-100, 300, (12, 14, 10)).astype(np.int16)
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.nii.gz", hu)
        write(tmp_path / f"{name}_label.nii.gz", stored(number))
    entries = [{"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz"} for name in "ab"]
    entries[1]["annotated"] = ["kidney_left", "Liver"]
    entries[1]["doubtful"] = ["Liver"]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS, "training": entries}))
    return tmp_path


def opened(folder: Path, text: str) -> Source:
    (folder / "classes.yaml").write_text(text)
    return open_source(folder)


def label_of(source: Source, number: int = 0) -> np.ndarray:
    return read_case(source.cases[number], Catalogue(source.classes)).label


def test_a_class_of_several_parts_and_one_of_a_value(folder):
    source = opened(folder, "liver: {source: 3}\nkidney: {source: [kidney_left, 2]}\n")
    assert source.classes == ("liver", "kidney")
    np.testing.assert_array_equal(label_of(source), np.array([0, 2, 2, 1, 0], np.uint8)[stored()])


def test_a_class_is_annotated_where_all_its_parts_are(folder):
    source = opened(folder, "kidney: {source: [1, 2]}\nleft: {source: [[3, liver]]}")
    assert [case.annotated for case in source.cases] == [("kidney", "left"), ("left",)]
    assert [case.reliable for case in source.cases] == [("kidney", "left"), ()]


def test_ignored_voxels_may_be_anything(folder):
    source = opened(folder, "liver: {source: liver}\nignore: [couch, kidney_left]\n")
    assert source.classes == ("liver",) and source.cases[0].annotated == ("liver",)
    label = label_of(source)
    np.testing.assert_array_equal(label, np.array([0, IGNORED, 0, 1, IGNORED], np.uint8)[stored()])
    bits = Catalogue(source.classes).candidate_bits(("liver",))
    assert bits[min(IGNORED, len(bits) - 1)].tolist() == [0b111]


def test_what_the_data_set_ignores_stays_ignored_and_what_it_names_otherwise_is_background(folder):
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"labels": LABELS | {"4": "ignore"}}))
    label = label_of(opened(folder, "liver: {source: liver}"))
    np.testing.assert_array_equal(label, np.array([0, 0, 0, 1, IGNORED], np.uint8)[stored()])


def test_two_data_sets_meet_in_one_catalogue(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("a.nii.gz", "a_label.nii.gz"):
        (other / name).write_bytes((folder / name).read_bytes())
    entries = [{"image": "a.nii.gz", "label": "a_label.nii.gz", "labels": {"1": "x", "2": "y", "3": "z", "4": "w"}}]
    (other / "cases.json").write_text(json.dumps(entries))
    one, two = opened(folder, "liver: {source: 3}"), opened(other, "kidney: {source: [x, y]}\nliver: {source: z}")
    catalogue = merged([one.classes, two.classes])
    assert catalogue.classes == ("liver", "kidney")
    np.testing.assert_array_equal(
        read_case(two.cases[0], catalogue).label == 1, read_case(one.cases[0], catalogue).label == 1
    )


def test_values_without_names_are_named_here_and_every_one_must_be(folder):
    entries = [{"image": "a.nii.gz", "label": "a_label.nii.gz"}]
    (folder / "dataset.json").write_text(json.dumps(entries))
    source = opened(folder, "liver: {source: 3}\nkidney: {source: [1, 2]}\nbackground: 4")
    np.testing.assert_array_equal(label_of(source), np.array([0, 2, 2, 1, 0], np.uint8)[stored()])
    with pytest.raises(CaseError, match="label holds 4, which has no class name"):
        label_of(opened(folder, "liver: {source: 3}\nkidney: {source: [1, 2]}"))
    (folder / "classes.yaml").unlink()
    assert "has no class names" in str(open_source(folder).problems[0])


def test_values_to_ignore_or_of_no_class_need_no_name_and_need_not_come(folder):
    """As in the README, though the data set's own names know nothing of 255."""
    label = stored()
    label[0, 0, :2] = 255, 7
    write(folder / "a_label.nii.gz", label)
    found = label_of(opened(folder, "liver: {source: Liver}\nignore: 255\nbackground: [7, 8]\n"))
    meant = np.zeros(256, np.uint8)
    meant[[3, 255]] = 1, IGNORED
    np.testing.assert_array_equal(found, meant[label])


def test_the_readme_s_example_is_taken(folder):
    text = re.search(r"`(kidney: \{.*?\})`, `(ignore: 255)`", README.read_text())
    assert opened(folder, "\n".join(text.groups())).classes == ("kidney",)


@given(st.text("liver: {}[],\n\t-?!&*#|>'\"%@`5\\\0é", max_size=30) | st.binary(max_size=20))
def test_whatever_a_class_map_holds_it_is_read_or_refused_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "classes.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        assert read_class_map(folder).parts
    except CaseError as refused:
        assert str(refused).startswith(f"{folder / 'classes.yaml'}: ") and "\n" not in str(refused)
        assert len(str(refused)) < len(str(folder)) + 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "liver: {source: livr}",
            r"structure 'livr' is unknown; did you mean 'Liver'.*; .*there are couch \(4\), kidney",
        ),
        ("liver: {source: 55}", r"value '55' is unknown; .*there are couch \(4\), kidney"),
        ("liver: {source: 2022-13-45}", "not valid YAML: month must be"),
        (
            "liver: {source: 3}\nspleen: {source: 1\n",
            "not valid YAML: expected ',' or '}', but got .*, in line 3 at column 1",
        ),
        ("\t- liver", "not valid YAML: found character .* in line 1 at column 1"),
        ("[" * 400, "not valid YAML"),
        ("liver: {sorce: 3}", "setting 'sorce' is unknown; did you mean 'source'"),
        ("liver: 3", "liver: has no 'source'"),
        ("liver: {source: }", "None is neither a value nor a name"),
        ("liver: {source: []}", "None is neither"),
        ("liver: {source: 3.5}", "3.5 is neither"),
        ("liver: {source: on}", "True is neither"),
        ("3: {source: 3}", "3 is no name of a class"),
        ("liver: {source: 3}\nliver: {source: 1}", "'liver' stands there twice"),
        ("liver: {source: 3}\nkidney: {source: [3, 1]}", "3 stands there twice"),
        ("liver: {source: Liver}\nkidney: {source: ' liver'}", "'liver' stands there twice"),
        ("ignore: 255", "names no classes"),
        ("- liver", "names no classes"),
        ("", "names no classes"),
        ("liver: {source: [3", "not valid YAML"),
        ("? [liver]\n: 3", "not valid YAML|no name of a class"),
        ("!!python/object/apply:os.system ['false']", "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_with_the_file(folder, text, says):
    with pytest.raises(CaseError, match=rf"classes\.yaml: .*({says})") as refused:
        opened(folder, text)
    assert "\n" not in str(refused.value)


# --- one mask for each class -----------------------------------------------------------------------------------


def box(*bounds: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((12, 14, 10), np.uint8)
    mask[tuple(slice(*one) for one in bounds)] = 1
    return mask


LIVER, TUMOUR, EMPTY = box((2, 8), (2, 10), (2, 8)), box((4, 6), (4, 6), (4, 6)), box((0, 0), (0, 0), (0, 0))


def mask_case(folder: Path, **masks: np.ndarray) -> None:
    write(folder / "ct.nii.gz", np.random.default_rng(0).normal(-100, 300, (12, 14, 10)).astype(np.int16))
    for name, mask in masks.items():
        write(folder / "segmentations" / f"{name}.nii.gz", mask)


def test_a_missing_mask_is_unknown_and_an_empty_one_is_absent(tmp_path):
    mask_case(tmp_path / "s0001", liver=LIVER, spleen=EMPTY)
    mask_case(tmp_path / "s0002", liver=LIVER)
    mask_case(tmp_path / "s0003")
    source = open_source(tmp_path)
    assert source.problems == () and source.classes == ("liver", "spleen")
    found = [(case.name, case.split, case.annotated) for case in source.cases]
    both = ("liver", "spleen")
    assert found == [("s0001", "training", both), ("s0002", "training", ("liver",)), ("s0003", "unlabelled", ())]
    np.testing.assert_array_equal(label_of(source), LIVER)
    assert source.cases[0].inputs[1:] == tuple(
        tmp_path / "s0001/segmentations" / f"{name}.nii.gz" for name in ("liver", "spleen")
    )


def test_of_overlapping_masks_the_smallest_counts_whatever_they_are_called(tmp_path):
    for case, (large, small) in {"s0001": ("a", "b"), "s0002": ("b", "a")}.items():
        mask_case(tmp_path / case, **{large: LIVER, small: TUMOUR})
    source = open_source(tmp_path)
    np.testing.assert_array_equal(label_of(source, 0), LIVER + TUMOUR)
    np.testing.assert_array_equal(label_of(source, 1), 2 * LIVER - TUMOUR)


def test_masks_are_merged_to_classes_and_what_is_not_listed_is_not_read(tmp_path):
    mask_case(tmp_path / "s0001", liver=LIVER, tumour=TUMOUR, unsure=box((4, 8), (2, 10), (2, 8)))
    write(tmp_path / "s0001/segmentations/couch.nii.gz", LIVER * 3 + TUMOUR)
    mask_case(tmp_path / "s0002", liver=LIVER)
    mask_case(tmp_path / "s0003", unsure=LIVER)
    source = opened(tmp_path, "organ: {source: [liver, tumour]}\nignore: unsure")
    assert [case.annotated for case in source.cases] == [("organ",), (), ()]
    expected = LIVER.copy()
    expected[4:8, 2:10, 2:8] = IGNORED
    np.testing.assert_array_equal(label_of(source), expected)
    with pytest.raises(CaseError, match=r"couch\.nii\.gz: holds several values"):
        label_of(opened(tmp_path, "couch: {source: couch}"))
    with pytest.raises(CaseError, match="'livr' is unknown; did you mean 'liver'"):
        opened(tmp_path, "liver: {source: livr}")
    with pytest.raises(CaseError, match="value '1' is unknown"):
        opened(tmp_path, "liver: {source: 1}")


def test_abdomenatlas_with_images_and_masks_apart(tmp_path):
    root = tmp_path / "AbdomenAtlas"
    mask_case(root / "image_only/BDMAP_00000001")
    mask_case(root / "mask_only/BDMAP_00000001", liver=LIVER)
    (root / "mask_only/BDMAP_00000001/ct.nii.gz").unlink()
    mask_case(root / "mask_only/BDMAP_00000002", liver=LIVER)
    source = open_source(root)
    (case,) = source.cases
    assert (case.name, case.dataset) == ("BDMAP_00000001", "AbdomenAtlas")
    np.testing.assert_array_equal(label_of(source), LIVER)
    assert "has masks but no ct.nii.gz" in str(source.problems[0])


def test_case_folders_that_no_data_set_has_named_get_pseudonyms(tmp_path):
    root = tmp_path / "SMITH"
    mask_case(root / "DOE_JANE", liver=LIVER)
    (case,) = open_source(root).cases
    assert case.name.startswith("ct-") and not {"DOE", "SMITH"} & {*case.name.split("_"), case.dataset}


def test_a_mask_off_the_image_is_refused(tmp_path):
    mask_case(tmp_path / "s0001", liver=LIVER[:-1])
    with pytest.raises(CaseError, match=r"liver\.nii\.gz: label and image differ in size"):
        label_of(open_source(tmp_path))


def test_real_masks_are_the_label_map_they_were_merged_to(ct, tmp_path):
    """The aorta case of TotalSegmentator, its label map taken apart again."""
    source = open_source(ct / "torso")
    case = next(case for case in source.cases if case.name == "totalseg_aorta")
    label = nib.load(case.labels[0])
    values = np.asanyarray(label.dataobj)
    (tmp_path / "s0001").mkdir()
    (tmp_path / "s0001/ct.nii.gz").write_bytes(case.files[0].read_bytes())
    (tmp_path / "s0001/segmentations").mkdir()
    for value, name in case.label_values:
        mask = nib.Nifti1Image((values == value).astype(np.uint8), label.affine)
        nib.save(mask, tmp_path / "s0001/segmentations" / f"{name}.nii.gz")
    (apart,) = open_source(tmp_path).cases
    catalogue = Catalogue(source.classes)
    np.testing.assert_array_equal(read_case(apart, catalogue).label, read_case(case, catalogue).label)
