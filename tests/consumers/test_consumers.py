"""Exports in the hands of those they are for: their own programs, in an environment of their own.

`make test-consumers` makes that environment and names it in MIXCL_CONSUMERS.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mixcl_dist.config import Config, replace
from mixcl_dist.export import export
from mixcl_dist.finetuning import scoring
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.predict import predict
from mixcl_dist.phantom import CLASSES, write_cohort

pytestmark = pytest.mark.slow
SMALL = {
    "network.filters": [4, 6, 8],
    "finetune.steps": 150,
    "finetune.learning_rate": 0.02,
    "finetune.patch_size": [24, 24, 24],
    "finetune.spacing_mm": [10.0, 10.0, 10.0],
    "budget.fraction": 1.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_cohort(folder, training=10, validation=1, unlabelled=0, size=(36, 30, 36), spacing_mm=10.0)[0]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "few"
    finetune(replace(Config(), SMALL), data=data, start=None, run=folder)
    return folder


@pytest.fixture(scope="module")
def programs() -> Path:
    folder = Path(os.environ.get("MIXCL_CONSUMERS", ""))
    if not (folder / "nnUNetv2_train").is_file():
        pytest.skip("nnU-Net is in no environment of its own; make test-consumers")
    return folder


TRAIN = """
import sys
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

begin = nnUNetTrainer.initialize

def shortly(self):
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
    self.initial_lr = 0.0  # so that the weights in the end are those that it began with
    self.enable_deep_supervision = True
    begin(self)

nnUNetTrainer.initialize = shortly
run_training.run_training_entry()
"""


def test_nnunet_trains_from_the_export_with_encoder_and_decoder(run, data, programs, tmp_path):
    raw = tmp_path / "raw" / "Dataset901_Phantom"
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "labelsTr").mkdir()
    images = sorted((data / "abdomen" / "images").iterdir())
    for image in images:
        name = image.name.removesuffix(".nii.gz")
        shutil.copy(image, raw / "imagesTr" / f"{name}_0000.nii.gz")
        shutil.copy(data / "abdomen" / "labels" / image.name, raw / "labelsTr" / image.name)
    described = {"channel_names": {"0": "CT"}, "numTraining": len(images), "file_ending": ".nii.gz"}
    described |= {"labels": {"background": 0} | {name: k for k, name in enumerate(CLASSES, start=1)}}
    described |= {"overwrite_image_reader_writer": "NibabelIOWithReorient"}
    (raw / "dataset.json").write_text(json.dumps(described))
    places = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    environment = os.environ | places | {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": "1"}

    def call(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    out = export(run, "nnunet", tmp_path / "export")
    one = ["-np", "1"]
    call(str(programs / "nnUNetv2_plan_and_preprocess"), "-d", "901", "-c", "3d_fullres", "--no_pp", "-npfp", "1")
    card = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON", (out / "README.md").read_text(), re.DOTALL)
    plans = tmp_path / "preprocessed" / raw.name / "nnUNetPlans.json"
    with contextlib.chdir(out):
        call(sys.executable, "-c", card[1], str(plans))
    call(str(programs / "nnUNetv2_preprocess"), "-d", "901", "-c", "3d_fullres", *one)
    where = ["901", "3d_fullres", "0", "-device", "cpu", "-pretrained_weights", str(out / "checkpoint_final.pth")]
    environment["nnUNet_n_proc_DA"] = "0"  # within the process; the planner takes it for a number of threads
    told = call(str(programs / "python"), "-c", TRAIN, *where)
    assert "Loading pretrained weights from file" in told and "Epoch 0" in told
    results = tmp_path / "results" / raw.name / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    trained = torch.load(results / "checkpoint_final.pth", weights_only=False)["network_weights"]
    given = torch.load(out / "checkpoint_final.pth", weights_only=True)["network_weights"]
    compared = [name for name in trained if ".seg_layers." not in name]
    assert any(name.startswith("decoder.stages") for name in compared)
    for name in compared:
        torch.testing.assert_close(trained[name], given[name], msg=name)


def test_a_bundle_run_by_monai_finds_what_mixcl_predict_does(run, data, tmp_path, monkeypatch):
    out = export(run, "bundle", tmp_path / "bundle")
    card = (out / "docs" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    images = data / "validation" / "images"
    code = code.replace('"IMAGES"', repr(str(images))).replace('"SEGMENTATIONS"', repr(str(tmp_path / "segmented")))
    subprocess.run([sys.executable, "-c", code], cwd=out, check=True, timeout=600)
    monkeypatch.setattr(scoring, "autocast", lambda device: contextlib.nullcontext())  # float32, as in a bundle
    predict(run, images, tmp_path / "predicted")
    (label,) = (tmp_path / "predicted" / "labels").iterdir()
    (theirs,) = (tmp_path / "segmented").rglob("*.nii.gz")
    ours, there = (np.asarray(nib.load(file).dataobj).squeeze() for file in (label, theirs))
    np.testing.assert_allclose(nib.load(label).affine, nib.load(theirs).affine, atol=1e-4)
    assert (ours > 0).mean() > 0.01, "the network found next to nothing, so there is nothing to compare"
    assert (ours == there).mean() > 0.999
