"""nnU-Net's raw folders become cases of both its versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixcl_dist.data_shards.catalogue import IGNORED, merged
from mixcl_dist.data_shards.sources import CaseError, open_source, read_case

from .small_cases import LABELS, ct_values, organ_values, write, write_json


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
