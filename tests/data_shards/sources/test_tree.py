"""No file of a folder is passed over in silence: links are followed, and each file is one thing, once."""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from mixcl_dist.cli import main
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import CaseError, open_source, read_case
from mixcl_dist.data_shards.sources.tree import HIDDEN, REFUSED, UNUSED

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def ct_values(seed: int = 0) -> np.ndarray:
    hu = np.full((12, 14, 10), -1000.0)
    hu[2:-2, 2:-2] = 40
    return np.rint(hu + np.random.default_rng(seed).normal(0, 15, hu.shape)).astype(np.int16)


def nifti(seed: int = 0) -> bytes:
    return nib.Nifti1Image(ct_values(seed), AFFINE).to_bytes()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_pair(folder: Path, name: str, header: str = ".hdr", data: str = ".img") -> list[Path]:
    image = nib.Nifti1Pair(ct_values(), AFFINE)
    holders = {part: nib.fileholders.FileHolder(fileobj=io.BytesIO()) for part in ("header", "image")}
    image.to_file_map(holders)
    contents = [holders[part].fileobj.getvalue() for part in ("header", "image")]
    return [
        write(folder / f"{name}{ending}", content) for ending, content in zip((header, data), contents, strict=True)
    ]


def dicom(folder: Path, names: list[str], bare: bool = False, implicit: bool = False, **changes) -> list[Path]:
    """A CT series of one slice a name; `bare` leaves out the preamble that announces DICOM."""
    folder.mkdir(parents=True, exist_ok=True)
    series, values = generate_uid(), ct_values()
    for k, name in enumerate(names):
        dataset = FileDataset(None, {}, file_meta=FileMetaDataset())
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = syntax
        fields = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": generate_uid(),
            "Modality": "CT",
            "SeriesInstanceUID": series,
            "Rows": 14,
            "Columns": 12,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [0, 0, 3 * k],
            "PixelSpacing": [2, 2],
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
            "PixelData": values[:, :, k].T.tobytes(),
        }
        for keyword, value in (fields | changes).items():
            if value is not None:
                setattr(dataset, keyword, value)
        if bare:
            with (folder / name).open("wb") as file:
                pydicom.filewriter.write_dataset(pydicom.filebase.DicomFileLike(file), strip(dataset, implicit))
        else:
            dataset.save_as(folder / name, enforce_file_format=True)
    return [folder / name for name in names]


def strip(dataset: FileDataset, implicit: bool) -> pydicom.Dataset:
    plain = pydicom.Dataset(dataset)
    plain.set_original_encoding(implicit, True)
    return plain


# What is put into a folder → what each of its files is: None for the input of a case.
KIT: dict[str, Callable[[Path], dict[Path, str | None]]] = {
    "scan": lambda place: {write(place / "scan.nii.gz", gzip.compress(nifti())): None},
    "capitals": lambda place: {write(place / "OTHER.NII.GZ", gzip.compress(nifti())): None},
    "pair": lambda place: dict.fromkeys(write_pair(place, "pair")),
    "series": lambda place: dict.fromkeys(dicom(place, ["s1.dcm", "s2.dcm"])),
    "bare series": lambda place: dict.fromkeys(dicom(place, ["b1", "b2", "b3"], bare=True)),
    "a single slice": lambda place: dict.fromkeys(dicom(place, ["single"]), REFUSED),
    "PET": lambda place: dict.fromkeys(dicom(place, ["p1", "p2"], Modality="PT"), REFUSED),
    "dose": lambda place: dict.fromkeys(dicom(place, ["dose"], Modality="RTDOSE"), "RTDOSE"),
    "contours": lambda place: dict.fromkeys(
        dicom(place, ["rs"], bare=True, Modality="RTSTRUCT", Rows=None), "RTSTRUCT or SEG, unread"
    ),
    "cut off": lambda place: dict.fromkeys(dicom(place, ["half"], bare=True, Rows=None), REFUSED),
    "no DICOM": lambda place: {write(place / "broken.dcm", b"\0" * 900): REFUSED},
    "header alone": lambda place: {write_pair(place, "alone", ".hdr", ".txt")[0]: REFUSED, place / "alone.txt": ".txt"},
    "voxels alone": lambda place: {write(place / "lost.img", b"\1" * 900): UNUSED},
    "unread": lambda place: {write(place / "brain.mgz", b"\1" * 9): UNUSED},
    "packed": lambda place: {write(place / "series.zip", b"PK\3\4"): UNUSED},
    "without ending": lambda place: {write(place / "scan", gzip.compress(nifti())): UNUSED},
    "text": lambda place: {write(place / "notes.TXT", b"no scan"): ".txt"},
    "nothing": lambda place: {write(place / "empty", b""): "without ending"},
    "double of macOS": lambda place: {write(place / "._scan.nii.gz", b"\0\5\x16\7"): HIDDEN},
    "kept away": lambda place: {write(place / ".trash/scan.nii.gz", gzip.compress(nifti())): HIDDEN},
}
FOLDERS = ("p1", "p2", "p1/deep", "p1/deep/er")


@settings(max_examples=40, deadline=None)
@given(
    content=st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(sorted(KIT))), min_size=1, max_size=12),
    links=st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from([*FOLDERS, ".", "..", "nowhere"])), max_size=4),
)
def test_each_file_of_a_tree_is_accounted_for_exactly_once(content, links):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "root"
        for place in FOLDERS:
            (root / place).mkdir(parents=True, exist_ok=True)
        expected = {}
        for place, kind in sorted(content):
            expected |= KIT[kind](root / place)
        for number, (place, target) in enumerate(sorted(links)):
            link = root / place / f"link{number}"
            link.symlink_to(root / target)
            expected[link] = UNUSED if target == "nowhere" else "links to folders that are read elsewhere"
        there = {Path(where) / name for where, folders, files in os.walk(root) for name in files} | {
            link for link in expected if link.is_symlink()
        }
        assert set(expected) == there, "the kit itself"
        try:
            source = open_source(root)
        except CaseError as nothing:
            assert "holds no CT" in str(nothing) and not {None, UNUSED, REFUSED} & set(expected.values())
            return
        inputs = [file for case in source.cases for file in case.inputs]
        assert len(inputs) == len(set(inputs)) and not set(inputs) & source.others.keys()
        assert dict.fromkeys(inputs) | source.others == expected
        accused = {problem.where for problem in source.problems + source.strays}
        assert {what for file, what in expected.items() if file in accused} <= {REFUSED, UNUSED}
        told = {(what, file.parent) for file, what in expected.items() if what in (REFUSED, UNUSED)}
        assert told == {(expected[file], file.parent) for file in accused}, "each is named, those alike in one line"


def test_folders_and_files_that_are_links_are_read_as_what_they_lead_to(tmp_path):
    for number in range(4):
        write(tmp_path / f"store/p{number}/ct.nii.gz", gzip.compress(nifti(number)))
    write(tmp_path / "scans/p0/ct.nii.gz", gzip.compress(nifti()))
    for number in (1, 2):
        (tmp_path / f"scans/p{number}").symlink_to(f"../store/p{number}")
    (tmp_path / "scans/three.nii.gz").symlink_to("../store/p3/ct.nii.gz")
    before = open_source(tmp_path / "scans/p0").cases
    for loop in ("scans/p0/loop", "store/p1/loop"):
        (tmp_path / loop).symlink_to(tmp_path / "scans")
    (tmp_path / "scans/again.nii.gz").symlink_to("p0/ct.nii.gz")
    source = open_source(tmp_path / "scans")
    assert source.problems == source.strays == ()
    found = sorted(str(case.files[0].relative_to(tmp_path / "scans")) for case in source.cases)
    assert found == ["p0/ct.nii.gz", "p1/ct.nii.gz", "p2/ct.nii.gz", "three.nii.gz"]
    assert sorted(source.others.values()) == ["links to folders that are read elsewhere"] * 2 + ["other names of files"]
    assert [case.name for case in open_source(tmp_path / "scans/p0").cases] == [case.name for case in before]


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    write(tmp_path / "scan.nii.gz", gzip.compress(nifti()))
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(tmp_path)
    assert len(source.cases) == 1 and "locked: cannot be entered: Permission denied" in str(source.strays[0])


@pytest.mark.parametrize(("header", "data"), [(".hdr", ".img"), (".HDR", ".IMG"), (".hdr.gz", ".img.gz")])
def test_a_pair_is_its_single_file_voxel_for_voxel(tmp_path, header, data):
    for file in write_pair(tmp_path / "pair", "a", header, data):
        if data.endswith(".gz"):
            file.write_bytes(gzip.compress(file.read_bytes()))
    write(tmp_path / "single/a.NII", nifti())
    (pair,), (single,) = (open_source(tmp_path / part).cases for part in ("pair", "single"))
    one, other = read_case(pair, Catalogue(())), read_case(single, Catalogue(()))
    np.testing.assert_array_equal(one.hu, other.hu)
    np.testing.assert_allclose(one.affine, other.affine)


@pytest.mark.parametrize("implicit", [False, True])
def test_dicom_without_preamble_and_ending_is_read(tmp_path, implicit):
    dicom(tmp_path / "whole", ["1.dcm", "2.dcm", "3.dcm"])
    dicom(tmp_path / "bare", ["1", "2", "3"], bare=True, implicit=implicit)
    (whole,), (bare,) = (open_source(tmp_path / part).cases for part in ("whole", "bare"))
    np.testing.assert_array_equal(read_case(whole, Catalogue(())).hu, read_case(bare, Catalogue(())).hu)


def test_text_is_no_dicom_whatever_it_begins_with(tmp_path):
    write(tmp_path / "scan.nii.gz", gzip.compress(nifti()))
    for number, content in enumerate(
        (b"\x08\0\x05\0", b"\x08\0\x05\0CS\x0a\0ISO", b"\x02\0\0\0" + b"x" * 99, b"\0\x08\0\x05CS")
    ):
        write(tmp_path / f"odd{number}", content)
    source = open_source(tmp_path)
    assert len(source.cases) == 1 and source.problems == source.strays == ()
    assert list(source.others.values()) == ["without ending"] * 4


def test_scans_of_an_nnunet_folder_that_have_no_place_are_named(tmp_path):
    for name in ("imagesTr/a_0000.nii.gz", "imagesTs/t_0000.nii.gz", "imagesTr/B_0000.NRRD", "labelsTr/a.nii.gz"):
        write(tmp_path / name, gzip.compress(nifti()))
    write(
        tmp_path / "dataset.json", b'{"channel_names": {"0": "CT"}, "labels": {"liver": 1}, "file_ending": ".nii.gz"}'
    )
    source = open_source(tmp_path)
    (stray,) = source.strays
    assert len(source.cases) == 1 and source.problems == ()
    assert "B_0000.NRRD: could be a scan and is not used: no case here has it" in str(stray)
    assert sorted(source.others.values()) == [".json", UNUSED, "withheld for tests"]


def test_a_build_ends_with_a_count_of_every_file_and_fails_when_a_scan_may_be_lost(
    cohort, small_config, tmp_path, capsys
):
    folder, out = tmp_path / "scans", tmp_path / "out"
    listed = cohort("a", "b", labelled=1)
    for name in "ab":
        write(folder / f"{name}.nii.gz", (listed / f"{name}.nii.gz").read_bytes())
    write(folder / "copy.nii.gz", (listed / "a.nii.gz").read_bytes())
    write(folder / "notes.txt", b"no scan")
    result = build([folder, listed], out, small_config, run=in_this_process)
    assert result.files == {"quarantined": 4, "scans in the shards": 2, ".txt": 1}, "listed copies and their label"
    (folder / "copy.nii.gz").unlink()
    assert build([folder], out, small_config, run=in_this_process).quarantined == []
    write(folder / "brain.mgz", b"\1")
    settings = [
        "--build.patch_size=16,16,16",
        "--build.samples_per_shard=10",
        "--build.min_body_fraction=0.2",
        f"--out={out}",
    ]
    assert main(["shards", "build", str(folder), *settings]) == 1
    said = capsys.readouterr()
    assert "brain.mgz: could be a scan and is not used: .mgz files are not read; convert it to .nii.gz" in said.err
    assert said.out.splitlines()[-1] == "4 files seen: 2 scans in the shards, 1 could be scans, not used, 1 .txt"


def test_a_listed_source_counts_images_labels_and_what_is_kept_out(cohort, small_config, tmp_path):
    source = cohort("a", "b", "c", labelled=2)
    content = json.loads((source / "dataset.json").read_text())
    content["validation"] = [content["training"].pop(1)]
    (source / "dataset.json").write_text(json.dumps(content))
    result = build([source], tmp_path / "out", small_config, run=in_this_process)
    assert result.files == {"scans in the shards": 2, "of validation cases, kept out": 2, "labels": 1}
