"""Logits by slabs are those of MONAI's sliding window, and come back to a CT's own grid as scipy brings them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from scipy import ndimage

from mixcl_dist.finetuning import sliding

CPU = torch.device("cpu")


def place_matters(windows):
    """Two logits that depend on where in its window a voxel lies, so that blending shows."""
    ramp = torch.linspace(0, 1, windows.shape[2] * windows.shape[3] * windows.shape[4]).view(windows.shape[2:])
    return torch.cat([windows * 2 - ramp, windows.flip(4) + ramp], dim=1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("shape", [(41, 23, 16), (40, 9, 30), (7, 5, 4), (16, 12, 9), (17, 12, 8)])
def test_slabs_are_those_of_monais_sliding_window(shape, overlap):
    image, patch = torch.rand(shape) * 2 - 1, (16, 12, 8)
    slide = SlidingWindowInferer(patch, sw_batch_size=2, overlap=overlap, mode="gaussian", cval=-1.0)
    expected = slide(image[None, None], place_matters)[0]
    found = list(sliding.slabs(place_matters, image, patch, overlap, CPU))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert max(slab.shape[1] for slab in found) <= 16


def grids(shape, seen_shape):
    """(4, 4): index of a grid of `shape` → index of one of `seen_shape` with the same outer edges."""
    matrix = np.eye(4)
    step = np.array(seen_shape) / shape
    matrix[:3, :3], matrix[:3, 3] = np.diag(step), (step - 1) / 2
    return matrix


@pytest.mark.parametrize("planes", [1, 7, 60])
@pytest.mark.parametrize("seen_shape", [(20, 18, 14), (40, 50, 26), (60, 50, 1), (40, 36, 28)])
def test_logits_are_interpolated_as_scipy_does_it_however_many_planes_come_at_once(seen_shape, planes):
    shape = (40, 36, 28)
    to_logits = grids(shape, seen_shape)
    logits = np.random.default_rng(0).standard_normal((4, *seen_shape)).astype(np.float32)
    step, offset = np.diag(to_logits)[:3], to_logits[:3, 3]
    expected = np.stack(
        [ndimage.affine_transform(each, step, offset, output_shape=shape, order=1, mode="nearest") for each in logits]
    )
    kept = [[] for _ in logits]
    slabs = torch.from_numpy(logits).split(planes, dim=1)
    label = sliding.classes_on_grid(slabs, to_logits, shape, seen_shape, CPU, lambda k, p: kept[k].append(p)).numpy()
    second, first = np.sort(expected, axis=0)[-2:]
    differs = label != expected.argmax(axis=0)
    assert label.dtype == np.uint8 and differs.mean() < 1e-4 and (first - second)[differs].max(initial=0) < 1e-5
    softmax = torch.from_numpy(expected).softmax(dim=0)
    torch.testing.assert_close(torch.stack([torch.cat(each) for each in kept]), softmax, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("joined_on", ["cuda:0", "cpu"])
def test_labels_are_found_on_the_gpu_without_waiting(imagined_gpu, joined_on):
    logits = torch.empty(3, 20, 18, 14, device=joined_on)
    to_logits = grids((40, 36, 28), (20, 18, 14))
    label = sliding.classes_on_grid([logits], to_logits, (40, 36, 28), (20, 18, 14), imagined_gpu)
    assert label.device == imagined_gpu and label.shape == (40, 36, 28) and label.dtype == torch.uint8


LARGE = """
import resource
import numpy as np, torch
from mixcl_dist.data_shards.volume import Volume
from mixcl_dist.finetuning.scoring import segment

class Many(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Conv3d(1, 96, kernel_size=1)
    def forward(self, image):
        return self.classifier(image)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def found(shape, spacing_mm):
    volume = Volume(np.zeros(shape, np.int16), np.eye(4))
    settings = dict(window_hu=(-1000, 1000), patch_size=(24, 24, 24), overlap=0.25, device=torch.device("cpu"))
    segment(Many(), volume, spacing_mm=spacing_mm, **settings)

found((48, 56, 120), {spacing_mm})
before = peak()
found((48, 56, 960), {spacing_mm})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("spacing_mm", ["None", "(1.25, 1.25, 1.25)"])
def test_logits_of_all_classes_are_never_whole_in_memory(spacing_mm):
    """A CT eight times as long takes more memory for its own voxels and its label, not for logits of 96 classes.

    Its planes are the same, so is what is held of their logits; the rest is what the allocator makes of it.
    """
    code = LARGE.replace("{spacing_mm}", spacing_mm)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    grown, voxels = int(done.stdout), 48 * 56 * 960
    assert grown < 100 * voxels, f"{grown / voxels:.1f} bytes a voxel, of 384 for all logits"
