"""A bundle segments a CT of any grid as we do, with MONAI and the bundle's own files alone."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

from mixcl_dist.config import Config, replace, to_yaml
from mixcl_dist.data_shards.volume import Volume, to_ras
from mixcl_dist.export import export
from mixcl_dist.finetuning import scoring
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.settings import NetworkConfig

SPACING_MM = (3.0, 3.0, 4.0)
PATCH = (24, 24, 16)
WINDOW_HU = (-900.0, 700.0)
CLASSES = ["liver", "left_kidney"]
GRIDS = {
    "finer": np.diag([1.25, 1.25, 1.5, 1]),
    "finer in plane, coarser along": np.diag([1.0, 1.0, 6.0, 1]),
    "coarser": np.diag([4.0, 5.0, 6.0, 1]),
    "equal": np.diag([*SPACING_MM, 1]),
    "flipped": np.diag([-1.5, -2.0, 3.0, 1]),
    "permuted and flipped": np.array([[0, 0, 2.0, -30], [-1.2, 0, 0, 40], [0, -1.5, 0, 10], [0, 0, 0, 1.0]]),
}


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    torch.manual_seed(1)
    network = SegmentationNetwork(NetworkConfig(filters=(4, 6, 8)), len(CLASSES))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture(scope="module")
def bundle(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    run = folder / "run"
    run.mkdir()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, run / "model.safetensors")
    (run / "config.yaml").write_text(to_yaml(replace(Config(), {"finetune.patch_size": PATCH})))
    described = {"architecture": "dynunet", "filters": [4, 6, 8], "window_hu": WINDOW_HU, "spacing_mm": SPACING_MM}
    (run / "network.json").write_text(json.dumps(described | {"classes": CLASSES}))
    (run / "run.json").write_text(json.dumps({"kind": "finetune", "name": "few", "label_cases": ["a"]}))
    return export(run, "bundle", folder / "bundle")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A noisy CT of each grid, with padding far below air as scanners write it."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, affine in GRIDS.items():
        shape = [round(100 / s) for s in np.linalg.norm(affine[:3, :3], axis=0)]
        organs = ndimage.gaussian_filter(rng.normal(0, 1, shape), 0.12 * np.array(shape))
        hu = 300 * organs / organs.std() + rng.normal(0, 150, shape)
        hu[:3] = -3024
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def segmented(bundle, images, tmp_path_factory) -> Path:
    """What the card's Python writes, in a process that knows nothing of this project."""
    out = tmp_path_factory.mktemp("segmented")
    snippet = re.search(r"```python\n(.*?)```", (bundle / "docs" / "README.md").read_text(), re.DOTALL)
    assert snippet
    code = snippet[1].replace("IMAGES", str(images)).replace("SEGMENTATIONS", str(out))
    code = "import sys; sys.modules['mixcl_dist'] = None\n" + code
    result = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_it_segments_a_ct_as_we_do(segmented, images, network, grid):
    image = nib.load(images / f"{grid}.nii.gz")
    array, affine = to_ras(np.asarray(image.dataobj), image.affine)
    volume = Volume(np.maximum(array, -1024).astype(np.int16), affine)
    settings = {"spacing_mm": SPACING_MM, "window_hu": WINDOW_HU, "patch_size": PATCH, "overlap": 0.25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "autocast", lambda device: contextlib.nullcontext())  # float32, as in a bundle
        ours = scoring.segment(network, volume, **settings, device=torch.device("cpu"))
    written = nib.load(segmented / grid / f"{grid}_seg.nii.gz")
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)
    theirs, _ = to_ras(np.asarray(written.dataobj), written.affine)
    for k in range(len(CLASSES) + 1):
        there, here = theirs == k, ours == k
        assert here.mean() > 0.01, "a class that says something"
        assert 2 * (there & here).sum() / (there.sum() + here.sum()) > 0.99
