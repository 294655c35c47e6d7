"""Messages about data are read by the person who gets them: what is said to be wrong is, and its cure, followed to the
letter, helps."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import open_source, read_case
from mixcl_dist.data_shards.volume import CaseError

from ..conftest import write_scan

Change = Callable[[Path], None]
LABELS = {"0": "background", "1": "core"}


def edited(**changes) -> Change:
    """Change keys of `dataset.json`; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "dataset.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "dataset.json").write_text(json.dumps(kept))

    return change


def entry(**changes) -> Change:
    return edited(training=[{"image": "a.nii.gz", "label": "label.nii.gz"} | changes])


def written(name: str, content: str | bytes) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def scan(
    change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None, name: str = "a.nii.gz"
) -> Change:
    """Change the voxels, and the affine, of a file."""

    def apply(folder: Path) -> None:
        image = nib.load(folder / name)
        voxels = change(np.asarray(image.dataobj))
        nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), folder / name)

    return apply


def as_it_was(name: str = "a.nii.gz") -> Change:
    """Restore, copy again or convert again."""
    return lambda folder: shutil.copy(folder.parent / "whole" / name, folder / name) and None


def label(change: Callable[[np.ndarray], np.ndarray], dtype=np.float32) -> Change:
    return scan(lambda voxels: change(voxels.astype(dtype)), name="label.nii.gz")


def without_geometry(folder: Path) -> None:
    image = nib.load(folder / "a.nii.gz")
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, folder / "a.nii.gz")


def geometry_of_the_image(folder: Path) -> None:
    image = nib.load(folder / "a.nii.gz")
    nib.save(
        nib.Nifti1Image(np.asarray(nib.load(folder / "label.nii.gz").dataobj), image.affine), folder / "label.nii.gz"
    )


def as_nrrd(header: Callable[[str], str]) -> Change:
    def apply(folder: Path) -> None:
        sitk.WriteImage(sitk.ReadImage(folder / "a.nii.gz"), folder / "a.nrrd")
        head, _, voxels = (folder / "a.nrrd").read_bytes().partition(b"\n\n")
        (folder / "a.nrrd").write_bytes(header(head.decode()).encode() + b"\n\n" + voxels)
        entry(image="a.nrrd")(folder)

    return apply


@dataclass(frozen=True)
class Fault:
    made: Change
    said: str
    """A part of the message, its cure among it."""
    cured: Change


FAULTS = {
    "no file": Fault(lambda f: (f / "a.nii.gz").unlink(), "restore the file or remove the entry", as_it_was()),
    "JSON": Fault(written("dataset.json", "{"), "correct it at that place", as_it_was("dataset.json")),
    "no cases": Fault(edited(training=[], unlabelled=[]), "list cases under 'training', 'validation' or 'un", entry()),
    "two images": Fault(entry(image=["a", "b"]), "name one file of voxels as its 'image'", entry()),
    "no class names": Fault(edited(labels={}), "under 'labels', as in", edited(labels={"1": "liver"})),
    "class names in a file": Fault(
        edited(labels={}), "or in classes.yaml", written("classes.yaml", "liver: {source: 1}\n")
    ),
    "labels": Fault(edited(labels={"x": "y"}), 'write {"1": "liver"} or {"liver": 1}', edited(labels={"liver": 1})),
    "value 0": Fault(edited(labels={"0": "liver", "1": "core"}), "or call it background", edited(labels=LABELS)),
    "region": Fault(edited(labels={"a": [1, 2]}), "give each class one value", edited(labels={"a": 1})),
    "modality": Fault(edited(modality={"0": "MR"}), "give CT alone, called so", edited(modality={"0": "CT"})),
    "annotated": Fault(entry(annotated=["cor"]), "name it under 'labels' or correct it", entry(annotated=["core"])),
    "validation without label": Fault(
        edited(training=None, validation=[{"image": "a.nii.gz"}]), "give it a label, or move it to 'unlabelled'",
        edited(validation=[{"image": "a.nii.gz", "label": "label.nii.gz"}]),
    ),
    "moved to unlabelled": Fault(
        edited(training=None, validation=[{"image": "a.nii.gz"}]), "or move it to 'unlabelled'",
        edited(validation=None, unlabelled=[{"image": "a.nii.gz"}]),
    ),
    "cut": Fault(
        lambda f: written("a.nii.gz", (f / "a.nii.gz").read_bytes()[:-99])(f), "copy or download it again", as_it_was()
    ),
    "header cut": Fault(written("a.nii.gz", gzip.compress(b"x" * 99)), "copy or download it again", as_it_was()),
    "no orientation": Fault(without_geometry, "convert the scan again from DICOM", as_it_was()),
    "metres": Fault(
        scan(lambda v: v, np.diag([0.002, 0.002, 0.003, 1])), "correct the header or convert", as_it_was()
    ),
    "sheared": Fault(
        scan(lambda v: v, np.array([[2, 0, 1, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])), "or leave it out",
        edited(training=None, unlabelled=[{"image": "other.nii.gz"}]),
    ),
    "four axes": Fault(
        scan(lambda v: np.stack([v, v], -1)), "write a file for each time, phase or channel", scan(lambda v: v[..., 0])
    ),
    "NaN": Fault(
        scan(lambda v: np.where(v > -500, v, np.nan).astype(np.float32)), "replace them, outside the scan by -1024",
        scan(lambda v: np.nan_to_num(v, nan=-1024)),
    ),
    "raw values": Fault(
        scan(lambda v: v + 1024), "with slope and intercept applied once", scan(lambda v: v - 1024)
    ),
    "ten times": Fault(scan(lambda v: v * 10), "with slope and intercept applied once", scan(lambda v: v // 10)),
    "mask": Fault(scan(lambda v: (v > 0).astype(np.int16)), "leave it out, or convert it again", as_it_was()),
    "label off whole": Fault(label(lambda v: v * 0.5), "write class numbers", label(np.ceil)),
    "unnamed value": Fault(label(lambda v: v * 2), "name it under 'labels'", edited(labels=LABELS | {"2": "shell"})),
    "corrected value": Fault(label(lambda v: v * 2), "or correct the file (named: 1)", label(lambda v: v // 2)),
    "label's place": Fault(
        scan(lambda v: v, np.diag([2.0, 2, 3, 1]), "label.nii.gz"), "copy the image's geometry to the label",
        geometry_of_the_image,
    ),
    "label's size": Fault(label(lambda v: v[1:]), "resample the label to the image's grid", as_it_was("label.nii.gz")),
    "classes.yaml": Fault(
        written("classes.yaml", "liver: 5\n"), "write lines as in `liver: {source: 5}`",
        written("classes.yaml", "liver: {source: 1}\n"),
    ),
    "no such structure": Fault(
        written("classes.yaml", "liver: {source: cores}\n"), "correct what liver is read from; there are core (1)",
        written("classes.yaml", "liver: {source: core}\n"),
    ),
    "twice in classes.yaml": Fault(
        written("classes.yaml", "a: {source: 1}\nb: {source: 1}\n"), "give it to one class",
        written("classes.yaml", "a: {source: 1}\n"),
    ),
    "splits.json": Fault(
        written("splits.json", '{"val": 3}'), 'write {"training": ["CASE", …], "validation": ["CASE", …]}',
        written("splits.json", '{"training": ["other"], "validation": ["a"]}'),
    ),
    "unknown in splits.json": Fault(
        written("splits.json", '{"validation": ["b"]}'), "name cases as in a or a.nii.gz",
        written("splits.json", '{"validation": ["a.nii.gz"]}'),
    ),
    "both splits": Fault(
        written("splits.json", '{"training": ["a"], "validation": ["a"]}'), "leave it in one of them",
        written("splits.json", '{"training": ["other"], "validation": ["a"]}'),
    ),
    "NRRD units": Fault(
        as_nrrd(lambda head: head + '\nspace units: "furlong" "mm" "mm"'), 'write `space units: "mm" "mm" "mm"`',
        as_nrrd(lambda head: head + '\nspace units: "mm" "mm" "mm"'),
    ),
    "NRRD without place": Fault(
        as_nrrd(lambda head: "\n".join(line for line in head.splitlines() if not line.startswith("space origin"))),
        "convert the scan again from DICOM", as_nrrd(lambda head: head),
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set of one labelled case "a" and an image "other"."""
    whole = tmp_path / "whole"
    whole.mkdir()
    core = write_scan(whole / "a.nii.gz", seed=1)
    write_scan(whole / "other.nii.gz", seed=2)
    nib.save(nib.Nifti1Image(core, nib.load(whole / "a.nii.gz").affine), whole / "label.nii.gz")
    content = {"modality": {"0": "CT"}, "labels": LABELS, "unlabelled": ["other.nii.gz"]}
    content["training"] = [{"image": "a.nii.gz", "label": "label.nii.gz"}]
    (whole / "dataset.json").write_text(json.dumps(content))
    return shutil.copytree(whole, tmp_path / "set")


def problems(folder: Path) -> list[str]:
    """All that is said of a data set and its cases."""
    try:
        source = open_source(folder)
    except CaseError as problem:
        return [str(problem)]
    said = list(map(str, source.problems))
    for case in source.cases:
        try:
            read_case(case, Catalogue(source.classes))
        except CaseError as problem:
            said.append(str(problem))
    return said


def test_without_a_fault_nothing_is_said(folder):
    assert problems(folder) == []


@pytest.mark.parametrize("name", FAULTS)
def test_the_cure_that_is_said_helps(folder, name):
    fault = FAULTS[name]
    fault.made(folder)
    (said,) = problems(folder)
    assert fault.said in said and "\n" not in said and said.startswith(str(folder))
    fault.cured(folder)
    assert problems(folder) == []
