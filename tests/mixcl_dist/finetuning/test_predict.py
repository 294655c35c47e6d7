"""A fine-tuned network applied to scans: the voxels that fine-tuning scored, on the grid of the scans' own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from mixcl_dist import cli
from mixcl_dist.config import Config, replace
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import open_source, read_case
from mixcl_dist.data_shards.volume import to_ras
from mixcl_dist.errors import RunError
from mixcl_dist.export import export
from mixcl_dist.finetuning import finetune as trials
from mixcl_dist.finetuning.predict import _is_sided, predict
from mixcl_dist.phantom import CLASSES
from mixcl_dist.records import CasePrediction, DiceRecord, PredictionRecord

SMALL = {
    "network.filters": [4, 8, 8],
    "finetune.steps": 100,
    "finetune.batch_size": 1,
    "finetune.learning_rate": 0.01,
    "finetune.patch_size": [24, 24, 16],
    "finetune.spacing_mm": [12.0, 11.0, 10.0],
    "finetune.sliding_overlap": 0.4,
    "budget.fraction": 1.0,
}


@pytest.fixture(scope="module")
def trial(data, tmp_path_factory):
    """A fine-tuned run, and what was found in its validation case when it was scored."""
    run, scored = tmp_path_factory.mktemp("runs") / "few", []
    with pytest.MonkeyPatch.context() as patch:
        segment = trials.segment
        patch.setattr(trials, "segment", lambda *a, **k: scored.append(segment(*a, **k)) or scored[-1])
        trials.finetune(replace(Config(), SMALL), data=data, start=None, run=run)
    assert len(np.unique(scored[-1])) > 1
    return run, scored[-1]


@pytest.fixture(scope="module")
def predicted(trial, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "out"
    return out, predict(trial[0], data, out, probabilities=True)


def in_ras(file: Path) -> np.ndarray:
    image = nib.load(file)
    return to_ras(np.asarray(image.dataobj), image.affine)[0]


def test_volumes_are_those_that_fine_tuning_scored_bit_for_bit(trial, predicted):
    out, _ = predicted
    np.testing.assert_array_equal(in_ras(out / "labels/validation_000.nii.gz"), trial[1])


def test_scores_are_those_of_fine_tuning(trial, predicted):
    dice, (_, record) = DiceRecord.load(trial[0]), predicted
    assert record.dice.cases["validation_000"] == dice.cases["validation_000"]
    assert record.hd95_mm.cases["validation_000"] == dice.hd95_mm.cases["validation_000"]
    assert record.surface_dice.cases["validation_000"] == dice.surface_dice.cases["validation_000"]
    assert len(record.cases) == len(record.dice.cases) == 5 and record.refused == ()


def test_probabilities_are_of_each_class_and_say_the_same(predicted):
    out, _ = predicted
    files = [out / f"probabilities/validation_000/{k}_{name}.nii.gz" for k, name in enumerate(CLASSES, start=1)]
    stacked = np.stack([np.asarray(nib.load(file).dataobj) for file in files])
    background = 1 - stacked.sum(axis=0)
    assert background.min() > -1e-4
    label = np.asarray(nib.load(out / "labels/validation_000.nii.gz").dataobj)
    most = np.sort(np.concatenate([background[None], stacked]), axis=0)
    clear = most[-1] - most[-2] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.concatenate([background[None], stacked]).argmax(axis=0)[clear], label[clear])


@pytest.fixture
def scans(data, tmp_path):
    """The validation case as a stranger has it: turned and flipped, in several formats, and a file that is broken."""
    image = nib.load(data / "validation/images/validation_000.nii.gz")
    turned = nib.as_closest_canonical(image).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    folder = tmp_path / "scans"
    (folder / "deeper").mkdir(parents=True)
    header = nib.Nifti1Header()
    header["descrip"] = b"SMITH^JOHN"
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine, header), folder / "turned.nii.gz")
    spaced = sitk.ReadImage(str(folder / "turned.nii.gz"))
    sitk.WriteImage(spaced, str(folder / "deeper/spaced.nrrd"))
    (folder / "broken.nii.gz").write_bytes(b"no NIfTI")
    return folder


def test_scans_of_strangers_are_segmented_on_their_own_grids_and_broken_ones_are_listed(trial, scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["predict", str(trial[0]), "--data", str(scans), "--out", str(out)]) == 1
    record = PredictionRecord.load(out)
    assert [Path(one.where).name for one in record.refused] == ["broken.nii.gz"] and record.dice is None
    assert "broken.nii.gz: cannot be read as NIfTI" in capsys.readouterr().err
    cases = {case.file: case for case in (CasePrediction.read(file) for file in (out / "cases").iterdir())}
    assert set(cases) == {str(scans / name) for name in ("turned.nii.gz", "deeper/spaced.nrrd")}
    for file, case in cases.items():
        label = nib.load(out / "labels" / f"{case.case}.nii.gz")
        source = nib.load(scans / "turned.nii.gz")
        assert label.shape == source.shape and label.get_data_dtype() == np.uint8
        if file.endswith("nii.gz"):
            np.testing.assert_array_equal(label.affine, source.affine)
        np.testing.assert_allclose(label.affine, source.affine, atol=1e-4)
        np.testing.assert_array_equal(in_ras(out / "labels" / f"{case.case}.nii.gz"), trial[1])
        assert b"SMITH" not in label.header.binaryblock
    page = (out / "report/index.html").read_text()
    assert "2 of 3 scans segmented" in page and "cannot be read as NIfTI" in page
    for text in (page, (out / "report/report.json").read_text()):
        assert "broken.nii.gz" not in text and str(tmp_path) not in text  # files may be called after patients


def test_what_is_done_is_kept_and_what_is_missing_or_changed_is_done_again(trial, data, tmp_path):
    source = tmp_path / "data"
    shutil.copytree(data, source)
    out = tmp_path / "out"
    predict(trial[0], source, out)
    before = {file.name: file.stat().st_mtime_ns for file in (out / "labels").iterdir()}
    lost, changed = sorted(before)[:2]
    (out / "labels" / lost).unlink()
    image = next(source.rglob(f"images/{changed}"))
    image.touch()
    predict(trial[0], source, out)
    after = {file.name: file.stat().st_mtime_ns for file in (out / "labels").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {lost, changed}
    with pytest.raises(RunError, match="holds a prediction with another --data; give another --out"):
        predict(trial[0], data, out)


def test_what_cannot_be_predicted_from_is_refused_before_a_folder_is_made(trial, data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="neither a fine-tuning run nor an export of one"):
        predict(tmp_path / "empty", data, tmp_path / "out")
    run = shutil.copytree(trial[0], tmp_path / "run")
    facts = json.loads((run / "network.json").read_text())
    (run / "network.json").write_text(json.dumps(facts | {"classes": ["kidney_left", *CLASSES[1:]]}))
    with pytest.raises(RunError, match="--mirror: kidney_left lies on one side"):
        predict(run, data, tmp_path / "out", mirror=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["left kidney", "kidney_left", "lung-R", "KidneyLeft", "Parotid_L", "Eye_RT"])
def test_a_class_of_one_side_is_known_by_its_name(name):
    assert _is_sided(name)


@pytest.mark.parametrize("name", ["liver", "brightness", "cleft", "rectum", "vertebra_L1", "kidneys"])
def test_other_classes_have_no_side(name):
    assert not _is_sided(name)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["monai", "hf", "bundle"])
def test_an_export_finds_what_its_run_does(trial, predicted, data, tmp_path, to):
    predict(export(trial[0], to, tmp_path / to), data, tmp_path / "out")
    for file in (tmp_path / "out" / "labels").iterdir():
        assert file.read_bytes() == (predicted[0] / "labels" / file.name).read_bytes()


@pytest.mark.slow
def test_processes_beside_each_other_find_the_same(trial, predicted, data, tmp_path):
    record = predict(trial[0], data, tmp_path / "out", workers=2)
    assert record.dice == predicted[1].dice
    for file in (tmp_path / "out" / "labels").iterdir():
        assert file.read_bytes() == (predicted[0] / "labels" / file.name).read_bytes()


@pytest.fixture
def series(data, tmp_path):
    """The validation case as a CT series, its slices from the feet up, columns towards the patient's left."""
    image = nib.load(data / "validation/images/validation_000.nii.gz")
    hu, affine = to_ras(np.asarray(image.dataobj).astype(np.int16), image.affine)
    folder, ids = tmp_path / "series", [generate_uid() for _ in range(3)]
    folder.mkdir()
    for k in range(hu.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        one.SOPClassUID, one.SOPInstanceUID, one.Modality = CTImageStorage, meta.MediaStorageSOPInstanceUID, "CT"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = ids
        one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = "A^B", "1", "", ""
        one.StudyDate = one.StudyTime = one.AccessionNumber = one.StudyID = one.ReferringPhysicianName = ""
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = *hu.T.shape[1:], 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept, one.InstanceNumber, one.SeriesNumber = 1, 0, k + 1, 1
        one.ImageOrientationPatient, one.SliceThickness = [1, 0, 0, 0, 1, 0], 10
        one.PixelSpacing = [abs(affine[1, 1]), abs(affine[0, 0])]
        corner = affine @ [hu.shape[0] - 1, hu.shape[1] - 1, k, 1]  # the rightmost and foremost voxel, in LPS the first
        one.ImagePositionPatient = [-corner[0], -corner[1], corner[2]]
        one.PixelData = np.ascontiguousarray(hu[::-1, ::-1, k].T).tobytes()
        one.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)
    return folder


def test_a_dicom_series_gets_a_dicom_seg_that_shows_the_same(trial, series, tmp_path):
    out = tmp_path / "out"
    record = predict(trial[0], series, out)
    (name,) = record.cases
    np.testing.assert_array_equal(in_ras(out / "labels" / f"{name}.nii.gz"), trial[1])
    seg = pydicom.dcmread(out / "segs" / f"{name}.dcm")
    assert [one.SegmentLabel for one in seg.SegmentSequence] == list(CLASSES)
    assert seg.StudyInstanceUID == pydicom.dcmread(series / "000.dcm").StudyInstanceUID
    shutil.copy(out / "segs" / f"{name}.dcm", series / "seg.dcm")
    (series / "classes.yaml").write_text("\n".join(f"{k}: {{source: {k}}}" for k in CLASSES))
    (case,) = open_source(series).cases
    np.testing.assert_array_equal(read_case(case, Catalogue(CLASSES)).label, trial[1])
