"""Segmenting a whole CT and scoring it against the contours, on the grid on which they were drawn."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.metrics import DiceHelper
from scipy import ndimage

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.volume import Volume, resample
from mixcl_dist.intensity import normalise
from mixcl_dist.networks import SegmentationNetwork
from mixcl_dist.precision import autocast

CASES_SHOWN = 4


@torch.inference_mode()
def segment(
    network: SegmentationNetwork,
    volume: Volume,
    *,
    spacing_mm: Sequence[float] | None,
    window_hu: tuple[float, float],
    patch_size: Sequence[int],
    overlap: float,
    device: torch.device,
) -> np.ndarray:
    """Class of every voxel of `volume` (X, Y, Z) uint8.

    The network sees the volume at `spacing_mm` (None: as it is) through a sliding window; its logits are brought
    back to the volume's own grid before the largest is taken.
    """
    seen = dataclasses.replace(volume, label=None)
    if spacing_mm is not None:
        seen = resample(seen, spacing_mm)
    image = normalise(torch.from_numpy(seen.hu), window_hu)[None, None]
    # Windows are computed on `device` and joined in main memory, where a whole CT with many classes fits.
    slide = SlidingWindowInferer(
        patch_size,
        sw_batch_size=2,
        overlap=overlap,
        mode="gaussian",
        cval=-1.0,
        sw_device=device,
        device="cpu",
    )
    network.eval()
    with autocast(device):
        logits = slide(image, network)[0].float().numpy()
    network.train()
    return _largest(logits, np.linalg.inv(seen.affine) @ volume.affine, volume.hu.shape)


def _largest(logits: np.ndarray, to_logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Argmax over classes of `logits` (K+1, x, y, z) interpolated at the voxels of a grid of `shape`.

    `to_logits` (4, 4) maps an index of that grid to one of the logits' grid, which is parallel to it.
    """
    if np.allclose(to_logits, np.eye(4)):
        return logits.argmax(axis=0).astype(np.uint8)
    step, offset = np.diag(to_logits)[:3], to_logits[:3, 3]
    best = np.full(shape, -np.inf, dtype=np.float32)
    label = np.zeros(shape, dtype=np.uint8)
    for number, channel in enumerate(logits):  # one class at a time: all at once would not fit for a large CT
        value = ndimage.affine_transform(channel, step, offset, output_shape=shape, order=1, mode="nearest")
        better = value > best
        label[better] = number
        best[better] = value[better]
    return label


def dice_per_class(
    prediction: np.ndarray, truth: np.ndarray, classes: Sequence[str], reliable: Sequence[str]
) -> dict[str, float | None]:
    """Dice of every class in one case; None where it was not annotated, is doubtful, or has no voxel in the truth.

    `prediction` and `truth` are (X, Y, Z) uint8 with `classes[k - 1]` as k. What the truth ignores (`IGNORED`) is left
    out of both.
    """
    judged = truth != IGNORED
    prediction, truth = prediction * judged, truth * judged
    helper = DiceHelper(include_background=False, num_classes=len(classes) + 1, reduction="none", get_not_nans=False)
    values = helper(y_pred=torch.from_numpy(prediction)[None, None], y=torch.from_numpy(truth)[None, None])[0]
    return {
        name: round(float(value), 5) if name in reliable and not value.isnan() else None
        for name, value in zip(classes, values, strict=True)
    }


def summarise(cases: Mapping[str, Mapping[str, float | None]], classes: Sequence[str]) -> dict:
    """What `dice.json` holds: Dice per case and class, the mean over cases of each class, and the mean of those."""
    class_mean = {}
    for name in classes:
        values = [dice for scores in cases.values() if (dice := scores[name]) is not None]
        class_mean[name] = float(np.mean(values)) if values else None
    scored = [value for value in class_mean.values() if value is not None]
    mean = float(np.mean(scored)) if scored else None
    return {"classes": list(classes), "cases": dict(cases), "class_mean": class_mean, "mean": mean}


class Overlays:
    """Axial slices with most foreground of the first cases, for the report."""

    def __init__(self) -> None:
        self._slices: list[dict[str, np.ndarray]] = []
        self._cases: list[str] = []
        self._spacing: list[tuple[float, float]] = []

    def add(
        self,
        case: str,
        volume: Volume,
        truth: np.ndarray,
        prediction: np.ndarray,
        window_hu: tuple[float, float],
    ) -> None:
        if len(self._cases) == CASES_SHOWN:
            return
        truth = np.where(truth == IGNORED, 0, truth)
        z = int((truth > 0).sum(axis=(0, 1)).argmax())
        image = normalise(torch.from_numpy(volume.hu[:, :, z]), window_hu).numpy()
        self._slices.append({"image": image, "truth": truth[:, :, z], "prediction": prediction[:, :, z]})
        self._cases.append(case)
        self._spacing.append(volume.spacing[:2])

    def encode(self) -> bytes:
        """An .npz with image (n, x, y) float16, truth and prediction (n, x, y) uint8, cases (n,), spacing (n, 2) mm;
        smaller slices are padded with air and background."""
        edge = np.max([each["truth"].shape for each in self._slices], axis=0)
        arrays = {
            name: np.stack([_padded(each[name], edge, outside) for each in self._slices]).astype(dtype)
            for name, outside, dtype in (("image", -1, "f2"), ("truth", 0, "u1"), ("prediction", 0, "u1"))
        }
        file = io.BytesIO()
        np.savez_compressed(
            file, allow_pickle=False, **arrays, cases=np.array(self._cases), spacing=np.array(self._spacing)
        )
        return file.getvalue()


def _padded(array: np.ndarray, edge: np.ndarray, outside: float) -> np.ndarray:
    missing = edge - array.shape
    return np.pad(array, [(n // 2, n - n // 2) for n in missing], constant_values=outside)
