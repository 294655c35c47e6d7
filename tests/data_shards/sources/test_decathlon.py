"""Decathlon's dataset.json and plain lists become cases; what is wrong in them is said in one line."""

from __future__ import annotations

import numpy as np
import pytest

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.sources import CaseError, open_source, read_case

from .small_cases import LABELS, ct_values, organ_values, write, write_json


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
