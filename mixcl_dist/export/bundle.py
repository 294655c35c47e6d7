"""A MONAI bundle that segments CT files with a fine-tuned network."""

from __future__ import annotations

import inspect
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixcl_dist import __version__
from mixcl_dist.data_shards import volume
from mixcl_dist.export import inference
from mixcl_dist.export.card import card
from mixcl_dist.export.trained import ExportError, Trained

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_LICENSE = """\
models/: the weights inherit the terms of the data that they were trained on, which the training run does not record.

scripts/ and configs/: copyright the authors of mixcl-dist, licensed under the Apache License, Version 2.0 (the
"License"); you may not use these files except in compliance with the License. You may obtain a copy of the License at
http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either
express or implied. See the License for the specific language governing permissions and limitations under the License.
"""
_USE = """\
Put CT files (NIfTI) into a folder IMAGES, install `monai`, `nibabel` and `scipy`, and run in this bundle's folder:

```python
from monai.bundle import run

run(
    config_file="configs/inference.json",
    meta_file="configs/metadata.json",
    bundle_root=".",
    dataset_dir="IMAGES",
    output_dir="SEGMENTATIONS",
)
```

Where `fire` is installed, `python -m monai.bundle run --config_file configs/inference.json …` does the same. Each
segmentation is written on the grid of its CT. `scripts/inference.py` resamples a CT as in training:
blurred where the grid becomes coarser, which MONAI's own transforms do not do."""
_SCRIPT = """\
\"\"\"The part of preprocessing and inference that MONAI does not have; written by mixcl-dist.\"\"\"

import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, SpatialResample
from scipy import ndimage

"""


def write(trained: Trained, folder: Path) -> None:
    """Write configs/, models/, scripts/, docs/ and LICENSE; raises `ExportError` for a run without classes."""
    if not trained.is_segmentation:
        raise ExportError(
            f"{trained.run}: a bundle segments, and this run is a pre-training; fine-tune it first "
            "(mixcl finetune --from), or export it to monai"
        )
    for name in ("configs", "models", "scripts", "docs"):
        (folder / name).mkdir()
    (folder / "scripts" / "__init__.py").touch()
    (folder / "scripts" / "inference.py").write_text(_script())
    torch.save(trained.state_dict(), folder / "models" / "model.pt")
    trained.description.save(folder / "models")
    for name, content in (("metadata", _metadata(trained)), ("inference", _inference(trained))):
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")
    (folder / "docs" / "README.md").write_text(card(trained, trained.facts["name"], _USE))
    (folder / "LICENSE").write_text(_LICENSE)


def _script() -> str:
    """One definition of preprocessing: the source that training itself runs."""
    parts: tuple[Any, ...] = (volume.antialiased, volume.resampled_grid, inference.TrainingSpacingd, inference.segment)
    return "\n\n".join([f"{_SCRIPT}AIR_HU = {volume.AIR_HU}\n", *map(inspect.getsource, parts)])


def _inert(name: object) -> str:
    """A name from the run's folder, for MONAI's parser, which evaluates strings with $, reads the files that % names
    and follows @: only letters, digits, spaces and a few marks are kept."""
    return re.sub(r"[^\w .,()+-]", "_", str(name))


def _metadata(trained: Trained) -> dict[str, Any]:
    """Everything of the run's folder in it is a number, or a name made `_inert`."""
    classes = [_inert(name) for name in trained.classes]
    channels, public = dict(enumerate(("background", *classes))), trained.architecture
    name = public.CLASS.rpartition(".")[2]
    image = {"type": "image", "modality": "CT", "spatial_shape": trained.patch_size, "dtype": "float32"}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by mixcl-dist {__version__}"},
        "monai_version": metadata.version("monai"),
        "pytorch_version": metadata.version("torch").split("+")[0],
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {
            "nibabel": metadata.version("nibabel"),
            "scipy": metadata.version("scipy"),
            **{name: metadata.version(name) for name in public.REQUIRES},
        },
        "name": _inert(trained.facts["name"]),
        "task": "Segmentation of CT",
        "description": f"{name} that segments {', '.join(classes)} in CT, fine-tuned with mixcl-dist",
        "authors": "see the training run",
        "copyright": "see LICENSE",
        "data_type": "nifti",
        "image_classes": "one channel, Hounsfield units",
        "label_classes": "one channel, class index",
        "pred_classes": f"{len(channels)} channels, logits of background and classes",
        "eval_metrics": {"mean_dice": float(trained.dice["mean"])} if trained.dice and trained.dice["mean"] else {},
        "intended_use": "Research; not a medical device",
        "network_data_format": {
            "inputs": {
                "image": image
                | {
                    "format": "hounsfield",
                    "num_channels": 1,
                    "value_range": [-1, 1],
                    "is_patch_data": True,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": image
                | {
                    "format": "segmentation",
                    "num_channels": len(channels),
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(k): name for k, name in channels.items()},
                }
            },
        },
    }


def _inference(trained: Trained) -> dict[str, Any]:
    """MONAI evaluates the strings of this file: all are written here, and only numbers come from the run's folder."""
    return {
        "imports": [
            "$import glob",
            "$import os",
            "$import numpy",
            "$import torch",
            "$from scripts.inference import segment",
        ],
        "bundle_root": ".",
        "dataset_dir": "images",
        "output_dir": "$@bundle_root + '/eval'",
        "image_files": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "data": "$[{'image': file} for file in @image_files]",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": _network(trained),
        "network": "$@network_def.to(@device)",
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(trained)},
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": trained.patch_size,
            "sw_batch_size": 2,
            "overlap": trained.config.finetune.sliding_overlap,
            "mode": "gaussian",
            "cval": -1.0,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing()},
        "load": "$@network.load_state_dict(torch.load(@checkpoint, map_location=@device, weights_only=True))",
        "initialize": ["$@load"],
        "run": ["$segment(@dataset, @network, @inferer, @postprocessing, @device)"],
    }


def _network(trained: Trained) -> dict[str, Any]:
    public = trained.architecture
    name = public.CLASS.rpartition(".")[2] if public.CLASS.startswith("monai.") else public.CLASS
    arguments = trained.network_arguments
    return {"_target_": name} | arguments | {key: f"${arguments[key]}" for key in public.IMPORTED}


def _preprocessing(trained: Trained) -> list[dict[str, Any]]:
    low, high = trained.network.window_hu
    resampling = {"_target_": "scripts.inference.TrainingSpacingd", "keys": "image", "pixdim": trained.spacing_mm}
    return [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
        *([resampling] if trained.spacing_mm else []),
        {
            "_target_": "ScaleIntensityRanged",
            "keys": "image",
            "a_min": low,
            "a_max": high,
            "b_min": -1.0,
            "b_max": 1.0,
            "clip": True,
        },
        {"_target_": "EnsureTyped", "keys": "image"},
    ]


def _postprocessing() -> list[dict[str, Any]]:
    return [
        {
            "_target_": "Invertd",
            "keys": "pred",
            "orig_keys": "image",
            "transform": "@preprocessing",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "seg",
            "output_dtype": "$numpy.uint8",
        },
    ]
