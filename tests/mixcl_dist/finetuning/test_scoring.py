"""Segmenting whole CTs and scoring them in their own voxels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from monai.metrics import DiceHelper, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.volume import Volume, resample
from mixcl_dist.finetuning.scoring import (
    JOINED_BYTES,
    Overlays,
    _joined_on,
    dice_per_class,
    segment,
    summarise,
    summarise_surfaces,
    surfaces_per_class,
)

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


class BrightIsOne(torch.nn.Module):
    """Says class 1 above 0 HU by a margin that grows with HU."""

    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Conv3d(1, 2, kernel_size=1)
        for parameter, values in zip(self.parameters(), ([0.0, 1.0], [0.0, 0.0]), strict=True):
            parameter.data.view(2).copy_(torch.tensor(values))

    def forward(self, image):
        return self.classifier(image)


@pytest.fixture
def volume():
    hu = np.full((40, 36, 28), -500, dtype=np.int16)
    hu[11:29, 7:20, 6:21] = 500
    return Volume(hu, AFFINE, (hu > 0).astype(np.uint8))


def segmented(volume, spacing_mm):
    return segment(
        BrightIsOne(),
        volume,
        spacing_mm=spacing_mm,
        window_hu=(-1000.0, 1000.0),
        patch_size=(16, 16, 16),
        overlap=0.25,
        device=torch.device("cpu"),
    )


def test_at_its_own_spacing_every_voxel_is_as_the_network_says(volume):
    np.testing.assert_array_equal(segmented(volume, None), volume.label)


@pytest.mark.parametrize("spacing_mm", [(3.0, 3.0, 3.0), (2.5, 1.5, 4.0)])
def test_a_prediction_on_another_grid_comes_back_in_place(volume, spacing_mm):
    prediction = segmented(volume, spacing_mm)
    assert prediction.shape == volume.hu.shape
    assert dice_per_class(prediction, volume.label, ["box"], ["box"])["box"] > 0.9
    centres = [np.argwhere(label).mean(axis=0) for label in (prediction, volume.label)]
    np.testing.assert_allclose(*centres, atol=0.35)  # voxels; half a voxel of the coarse grid would be 0.5 or more


def test_mirroring_averages_with_left_and_right_exchanged(volume):
    class RightIsOne(BrightIsOne):
        """Says class 1 in the right half of a window, or where it is bright, by half as much."""

        def forward(self, image):
            right = torch.linspace(-1, 1, image.shape[2]).sign().view(1, 1, -1, 1, 1).expand_as(image)
            return torch.cat([torch.zeros_like(image), right + image], dim=1)

    settings = {"spacing_mm": None, "window_hu": (-1000.0, 1000.0), "patch_size": (40, 36, 28), "overlap": 0.25}
    settings |= {"device": torch.device("cpu")}
    alone = segment(RightIsOne(), volume, **settings)
    assert alone[20:].all() and not alone[:20].any()
    np.testing.assert_array_equal(segment(RightIsOne(), volume, **settings, mirror=True), volume.label)


def test_nearest_voxels_of_the_coarse_grid_would_be_worse(volume):
    """That logits are interpolated before the decision is what makes borders finer than the network's grid."""
    coarse = resample(volume, (5.0, 5.0, 5.0))
    back = np.linalg.inv(coarse.affine) @ volume.affine
    index = np.rint(np.indices(volume.hu.shape).reshape(3, -1).T * np.diag(back)[:3] + back[:3, 3]).astype(int)
    index = np.clip(index, 0, np.array(coarse.hu.shape) - 1)
    nearest = (coarse.hu[tuple(index.T)] > 0).reshape(volume.hu.shape).astype(np.uint8)
    ours = segmented(volume, (5.0, 5.0, 5.0))
    dice = [dice_per_class(each, volume.label, ["box"], ["box"])["box"] for each in (ours, nearest)]
    assert dice[0] > dice[1]


def test_logits_of_a_ct_too_large_for_the_gpu_are_joined_in_main_memory():
    gpu = torch.device("cuda:0")
    assert _joined_on(gpu, JOINED_BYTES // 4) == gpu
    assert _joined_on(gpu, JOINED_BYTES // 4 + 1) == torch.device("cpu")


def test_dice_is_twice_the_overlap_over_the_sum():
    truth = np.zeros((8, 8, 8), dtype=np.uint8)
    truth[:4] = 1
    truth[6:] = 2
    prediction = np.zeros_like(truth)
    prediction[1:5] = 1
    scores = dice_per_class(prediction, truth, ["a", "b", "absent", "unknown"], ["a", "b", "absent"])
    assert scores == {"a": 0.75, "b": 0.0, "absent": None, "unknown": None}


def test_dice_is_that_of_monai():
    rng = np.random.default_rng(0)
    truth, prediction = rng.choice(5, (2, 12, 10, 8), p=(0.5, 0.3, 0.1, 0.1, 0)).astype(np.uint8)
    names = ["a", "b", "c", "absent"]
    helper = DiceHelper(include_background=False, num_classes=5, reduction="none", get_not_nans=False)
    expected = helper(y_pred=torch.from_numpy(prediction)[None, None], y=torch.from_numpy(truth)[None, None])[0]
    scores = dice_per_class(prediction, truth, names, names)
    assert scores.pop("absent") is None and expected[3].isnan()
    assert list(scores.values()) == pytest.approx(expected[:3].tolist(), abs=1e-5)


def test_what_the_truth_ignores_is_not_scored():
    truth, prediction = np.zeros((2, 4, 4, 4), np.uint8)
    truth[:2], prediction[:2] = 1, 1
    prediction[3], truth[3] = 1, IGNORED
    assert dice_per_class(prediction, truth, ("liver",), ("liver",)) == {"liver": 1.0}


SPACING_MM = (1.0, 2.0, 3.0)


def surfaces(prediction, truth, classes=("a", "b"), tolerance_mm=3.0):
    return surfaces_per_class(prediction, truth, classes, classes, spacing_mm=SPACING_MM, tolerance_mm=tolerance_mm)


def blobs(seed: int) -> np.ndarray:
    """Two smooth organs of random shape, (32, 24, 20) uint8."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((2, 32, 24, 20)), (0, 3, 3, 3))
    return np.where(field[0] > 0.02, 1, np.where(field[1] > 0.03, 2, 0)).astype(np.uint8)


def test_surfaces_a_shift_apart_are_that_far_apart():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[4:10, 4:10, 4:10] = 1
    found = surfaces(np.roll(truth, 2, axis=2), truth)["a"]  # by 6 mm
    assert found.hd95_mm == 6.0
    sides = 1 - 2 * 36 / (6**3 - 4**3)  # the four sides along the shift are as near as 0 mm, but for the ends
    assert surfaces(np.roll(truth, 2, axis=2), truth, tolerance_mm=6.0)["a"].dice == 1.0
    assert 0.5 * sides < found.dice < 1.0


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_surface_scores_are_those_of_monai_on_the_whole_ct():
    prediction, truth = blobs(0), blobs(1)
    one_hot = [
        torch.nn.functional.one_hot(torch.from_numpy(x).long(), 3).movedim(-1, 0)[None] for x in (prediction, truth)
    ]
    hd95 = compute_hausdorff_distance(*one_hot, percentile=95, spacing=SPACING_MM)[0]
    dice = compute_surface_dice(*one_hot, class_thresholds=[3.0, 3.0], spacing=SPACING_MM)[0]
    found = surfaces(prediction, truth)
    assert [found[name].hd95_mm for name in "ab"] == pytest.approx(hd95.tolist(), abs=1e-3)
    assert [found[name].dice for name in "ab"] == pytest.approx(dice.tolist(), abs=1e-5)


def test_surface_distances_are_those_to_the_nearest_voxel():
    """An independent computation: dense distance transforms of the whole CT."""
    prediction, truth = blobs(2) == 1, blobs(3) == 1
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, truth)]
    to = [ndimage.distance_transform_edt(~edge, sampling=SPACING_MM) for edge in edges]
    there, back = to[1][edges[0]], to[0][edges[1]]
    found = surfaces(prediction.astype(np.uint8), truth.astype(np.uint8))["a"]
    assert found.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-3)
    assert found.dice == pytest.approx(np.mean(np.concatenate([there, back]) <= 3.0), abs=1e-5)


def test_equal_surfaces_are_no_distance_apart():
    truth = blobs(4)
    assert {(s.hd95_mm, s.dice) for s in surfaces(truth, truth, tolerance_mm=0.0).values()} == {(0.0, 1.0)}


def test_a_class_that_was_not_found_has_the_diagonal_and_one_that_is_not_in_the_truth_has_none():
    truth = np.zeros((10, 20, 30), np.uint8)
    truth[2:4, 2:4, 2:4] = 1
    found = surfaces(np.where(truth == 1, 2, truth).astype(np.uint8), truth)
    assert found["a"].dice == 0.0 and found["a"].hd95_mm == pytest.approx((10**2 + 40**2 + 90**2) ** 0.5, abs=1e-3)
    assert found["b"] is None
    unknown = surfaces_per_class(truth, truth, ["a"], [], spacing_mm=SPACING_MM, tolerance_mm=3.0)
    assert unknown == {"a": None}


def test_what_the_truth_ignores_has_no_surface():
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[2:5, 2:5, 2:5] = 1
    prediction = truth.copy()
    truth[8:], prediction[9:11, 2:5, 2:5] = IGNORED, 1
    found = surfaces(prediction, truth)["a"]
    assert (found.hd95_mm, found.dice) == (0.0, 1.0)


def test_surface_scores_are_summarised_as_dice_is():
    truth = blobs(5)
    cases = {"x": surfaces(truth, truth), "y": surfaces(truth, truth) | {"b": None}}
    summary = summarise_surfaces(cases, ["a", "b"])
    assert summary["surface_dice"].mean == 1.0 and summary["hd95_mm"].class_mean == {"a": 0.0, "b": 0.0}
    assert summary["hd95_mm"].cases["y"] == {"a": 0.0, "b": None}


def test_the_mean_is_over_classes_and_leaves_out_what_was_not_scored():
    cases = {"x": {"a": 0.8, "b": 0.2, "c": None}, "y": {"a": 0.6, "b": None, "c": None}}
    summary = summarise(cases, ["a", "b", "c"])
    assert summary.class_mean == {"a": pytest.approx(0.7), "b": 0.2, "c": None}
    assert summary.mean == pytest.approx(0.45)


def test_overlays_show_the_slice_with_most_foreground(volume):
    overlays = Overlays()
    truth = volume.label.copy()
    truth[:, :, 9] = 1
    small = Volume(volume.hu[:20], AFFINE, None)
    overlays.add("large", volume, truth, volume.label, (-1000.0, 1000.0))
    overlays.add("small", small, truth[:20], truth[:20], (-1000.0, 1000.0))
    arrays = np.load(io.BytesIO(overlays.encode()))
    assert arrays["image"].shape == arrays["truth"].shape == (2, 40, 36)
    np.testing.assert_array_equal(arrays["truth"][0], truth[:, :, 9])
    assert arrays["image"].dtype == np.float16 and arrays["cases"].tolist() == ["large", "small"]
    np.testing.assert_array_equal(arrays["spacing"], [[2, 2], [2, 2]])
