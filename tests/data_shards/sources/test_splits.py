"""Which cases are trained on and which are scored: said by nnU-Net's files or by a `splits.json` of any source."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcl_dist.data_shards.sources import CaseError, open_source
from mixcl_dist.finetuning.task import open_task

VOXELS = np.zeros((2, 2, 2), np.int16)


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), path)


def nnunet(root: Path, *names: str, **more) -> Path:
    for name in names:
        write(root / f"imagesTr/{name}_0000.nii.gz")
        write(root / f"labelsTr/{name}.nii.gz")
    write(root / "imagesTs/later_0000.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content | more))
    return root


def masks(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name / "ct.nii.gz")
        write(root / name / "segmentations/liver.nii.gz")
    return root


def listed(root: Path, *names: str) -> Path:
    for name in names:
        write(root / f"{name}.nii.gz")
        write(root / f"labels/{name}.nii.gz")
    entries = [{"image": f"{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in names]
    (root / "dataset.json").write_text(json.dumps({"labels": {"1": "liver"}, "training": entries}))
    return root


def splits_of(root: Path) -> dict[str, str]:
    source = open_source(root)
    assert source.problems == ()
    return {case.name: case.split for case in source.cases}


def test_nnunet_s_own_splits_give_fold_0(tmp_path):
    root = nnunet(tmp_path, "a", "b.1", "c")
    folds = [{"train": ["a", "c"], "val": ["b.1"]}, {"train": ["a", "b.1"], "val": ["c"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    assert splits_of(root) == {"a": "training", "b-1": "validation", "c": "training"}
    (root / "splits.json").write_text(json.dumps(folds[1]))  # another fold
    assert splits_of(root) == {"a": "training", "b-1": "training", "c": "validation"}


def test_a_validation_list_in_nnunet_s_dataset_is_read_and_comes_before_the_folds(tmp_path):
    root = nnunet(
        tmp_path, "a", "b", "c", validation=[{"image": "imagesTr/c_0000.nii.gz", "label": "labelsTr/c.nii.gz"}]
    )
    (root / "splits_final.json").write_text(json.dumps([{"train": ["b", "c"], "val": ["a"]}]))
    assert splits_of(root) == {"a": "training", "b": "training", "c": "validation"}


def test_what_is_withheld_for_the_test_is_no_case(tmp_path):
    root = nnunet(tmp_path, "a", "b")
    (root / "splits.json").write_text(json.dumps({"validation": ["b"]}))
    assert "later" not in splits_of(root)


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (nnunet, "imagesTr/s0002_0000.nii.gz"),
        (nnunet, "s0002"),
        (listed, "./s0002.nii.gz"),
        (listed, {"image": "s0002.nii.gz"}),
        (masks, "s0002"),
        (masks, "s0002/ct.nii.gz"),
    ],
)
def test_any_source_takes_its_split_from_a_list_of_names_or_paths(tmp_path, make, entry):
    root = make(tmp_path, "s0001", "s0002", "s0003")
    (root / "splits.json").write_text(json.dumps({"validation": [entry]}))
    assert splits_of(root) == {"s0001": "training", "s0002": "validation", "s0003": "training"}
    assert [case.name for case in open_task(root).validation] == ["s0002"]


def test_mask_folders_named_after_patients_go_by_their_folders(tmp_path):
    root = masks(tmp_path, "DOE_JANE", "ROE_RICHARD")
    (root / "splits.json").write_text(json.dumps({"validation": ["ROE_RICHARD"]}))
    by_folder = {case.files[0].parent.name: case.split for case in open_source(root).cases}
    assert by_folder == {"DOE_JANE": "training", "ROE_RICHARD": "validation"}


def test_rtstruct_and_seg_sources_are_split_alike(ct, tmp_path):
    root = ct / "sarcoma"
    folder = tmp_path / "copied"
    for file in (file for file in root.rglob("dicom/**/*") if file.is_file()):
        copied = folder / file.relative_to(root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    (folder / "classes.yaml").write_text("tumour: {source: GTV_Mass_CT}\n")
    with pytest.raises(CaseError, match=r"no validation case has labels; write .*splits.json, e.g. .*STS_00"):
        open_task(folder)
    (folder / "splits.json").write_text(json.dumps({"validation": ["STS_002"]}))
    task = open_task(folder)
    assert [case.files[0].relative_to(folder).parts[0] for case in task.validation] == ["STS_002"]


@pytest.mark.parametrize("make", [nnunet, masks, listed])
def test_what_to_write_is_said_and_helps(tmp_path, make):
    """The cure in the message, followed to the letter."""
    root = make(tmp_path, "s0001", "s0002")
    with pytest.raises(CaseError) as caught:
        open_task(root)
    file, example = caught.value.cure.removeprefix("write ").split(", e.g. ")
    assert Path(file) == root / "splits.json"
    Path(file).write_text(example[: example.rindex("}") + 1])
    assert len(open_task(root).validation) == 1


def test_how_such_a_source_gets_labels_is_said(tmp_path):
    write(tmp_path / "scans/a.nii.gz")
    with pytest.raises(CaseError, match="no training case has labels; list the scans"):
        open_task(tmp_path / "scans")
    root = listed(tmp_path / "listed", "a")
    (root / "dataset.json").write_text(json.dumps({"labels": {"1": "liver"}, "training": ["a.nii.gz"]}))
    with pytest.raises(CaseError, match="no training case has labels; give entries under 'training' a 'label'"):
        open_task(root)
    (root / "splits.json").write_text(json.dumps({"validation": ["a"]}))
    listed(root, "a")
    with pytest.raises(CaseError, match="leave some labelled cases out of 'validation'"):
        open_task(root)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds no lists of cases"),
        ("3", "holds no lists of cases"),
        ('{"training": ["s0001"]}', "lists no validation cases"),
        ('{"validation": ["s0009"]}', "'s0009' is unknown; did you mean"),
        ('{"validation": ["s0009", "s0008"]}', r"\(and 1 more\)"),
        ('{"validation": [7]}', "validation holds 7, which names no case"),
        ('{"validaton": ["s0001"]}', "'validaton' is unknown; did you mean 'validation'"),
        ('{"training": ["s0001"], "validation": ["s0001"]}', "s0001 in both lists"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused_in_one_line(tmp_path, content, says):
    root = masks(tmp_path, "s0001", "s0002")
    (root / "splits.json").write_text(content)
    with pytest.raises(CaseError, match=says) as caught:
        open_source(root)
    assert caught.value.where == root / "splits.json" and "\n" not in str(caught.value)


def test_an_unlabelled_case_cannot_be_scored_and_stays_out(tmp_path):
    root = masks(tmp_path, "s0001", "s0002")
    (root / "s0002/segmentations/liver.nii.gz").unlink()
    (root / "splits.json").write_text(json.dumps({"validation": ["s0002"]}))
    (problem,) = open_source(root).problems
    assert "validation case s0002 has no label" in str(problem)


NAMES = [f"s000{n}" for n in range(4)]


@settings(max_examples=40)
@given(
    roles=st.lists(st.sampled_from(["training", "validation", "neither"]), min_size=4, max_size=4),
    with_training=st.booleans(),
)
def test_every_labelled_case_has_the_role_that_the_lists_give_it(roles, with_training):
    """Whatever the lists: nothing is scored that is trained on, and nothing is trained on that they leave out."""
    with tempfile.TemporaryDirectory() as folder:
        root = masks(Path(folder), *NAMES)
        by_role = {role: [name for name, of in zip(NAMES, roles, strict=True) if of == role] for role in set(roles)}
        content = {"validation": by_role.get("validation", [])}
        if with_training:
            content["training"] = by_role.get("training", [])
        (root / "splits.json").write_text(json.dumps(content))
        if not content["validation"]:
            with pytest.raises(CaseError, match="lists no validation cases"):
                open_source(root)
            return
        expected = {
            name: role if role != "neither" else "training"
            for name, role in zip(NAMES, roles, strict=True)
            if role != "neither" or not with_training
        }
        assert splits_of(root) == expected
