"""Segmenting a whole CT and scoring it against the contours, on the grid on which they were drawn."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from torch import Tensor

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.volume import Volume, resample
from mixcl_dist.finetuning import sliding
from mixcl_dist.finetuning.segmenter import LearningNetwork, SegmentationNetwork
from mixcl_dist.intensity import normalise
from mixcl_dist.precision import autocast
from mixcl_dist.records import Scores

CASES_SHOWN = 4
JOINED_BYTES = 2 << 30
"""A slab of logits is held on the device up to this size, beyond it in main memory: a table's trials share a GPU."""

Keeper = Callable[[int, int, Tensor], None]
"""See `segment`."""


@torch.inference_mode()
def segment(
    network: SegmentationNetwork | LearningNetwork,
    volume: Volume,
    *,
    spacing_mm: Sequence[float] | None,
    window_hu: tuple[float, float],
    patch_size: Sequence[int],
    overlap: float,
    device: torch.device,
    mirror: bool = False,
    keep: Keeper | None = None,
) -> np.ndarray:
    """Class of every voxel of `volume` (X, Y, Z) uint8.

    The network sees the volume at `spacing_mm` (None: as it is) through a sliding window; its logits are brought
    back to the volume's own grid before the largest is taken. Logits are at hand a slab at a time, never all together.
    `mirror` averages them with those of the volume with left and right exchanged. `keep` is called with an axis of the
    volume, a class, and its probabilities in further planes along that axis, moved to the front, (n, ., .) float32.
    """
    seen = dataclasses.replace(volume, label=None)
    if spacing_mm is not None:
        seen = resample(seen, spacing_mm)
    image = normalise(torch.from_numpy(seen.hu).to(device), window_hu)
    axis = int(np.argmax(image.shape))
    front = [axis, *(other for other in range(3) if other != axis)]
    back = [front.index(n) for n in range(3)]
    predict = _predictor(network, back, front, mirror)
    edge = [patch_size[n] for n in front]
    held = network.classifier.out_channels * image.numel() * edge[0] // image.shape[axis]
    to_logits = np.linalg.inv(seen.affine) @ volume.affine
    network.eval()
    with autocast(device):
        slabs = sliding.slabs(predict, image.permute(front), edge, overlap, _joined_on(device, held))
        label = sliding.classes_on_grid(
            slabs,
            to_logits[[*front, 3]][:, [*front, 3]],
            [volume.hu.shape[n] for n in front],
            [image.shape[n] for n in front],
            device,
            None if keep is None else lambda number, planes: keep(axis, number, planes),
        )
    network.train()
    return np.ascontiguousarray(label.permute(back).cpu().numpy())


def _predictor(network: torch.nn.Module, back: list[int], front: list[int], mirror: bool) -> sliding.Predictor:
    """Logits of windows whose axes are in the order `front`, which `back` undoes."""
    to_ras, from_ras = ([0, 1, *(2 + n for n in order)] for order in (back, front))

    def predict(windows: Tensor) -> Tensor:
        ras = windows.permute(to_ras)
        logits = network(ras)
        if mirror:
            logits = (logits + network(ras.flip(2)).flip(2)) / 2
        return logits.permute(from_ras)

    return predict


def _joined_on(device: torch.device, logits: int) -> torch.device:
    """Where the windows of a slab with so many logits are put together."""
    return device if 4 * logits <= JOINED_BYTES else torch.device("cpu")


def dice_per_class(
    prediction: np.ndarray, truth: np.ndarray, classes: Sequence[str], reliable: Sequence[str]
) -> dict[str, float | None]:
    """Dice of every class in one case; None where it was not annotated, is doubtful, or has no voxel in the truth.

    `prediction` and `truth` are (X, Y, Z) uint8 with `classes[k - 1]` as k. What the truth ignores (`IGNORED`) is left
    out of both.
    """
    judged, count = truth != IGNORED, len(classes) + 1
    pairs = truth[judged].astype(np.intp) * count + prediction[judged]
    confusion = np.bincount(pairs, minlength=count**2).reshape(count, count)
    drawn, total = confusion.sum(axis=1), confusion.sum(axis=0) + confusion.sum(axis=1)
    return {
        name: round(float(2 * confusion[k, k] / total[k]), 5) if name in reliable and drawn[k] else None
        for k, name in enumerate(classes, start=1)
    }


@dataclasses.dataclass(frozen=True)
class SurfaceScore:
    """How far apart two surfaces lie."""

    hd95_mm: float
    """The larger of both directions' 95th percentile of the distance from a surface voxel to the other surface."""
    dice: float
    """Share of both surfaces' voxels that lie within the tolerance of the other surface."""


def surfaces_per_class(
    prediction: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    reliable: Sequence[str],
    *,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> dict[str, SurfaceScore | None]:
    """Surface scores of every class in one case; None where Dice is None.

    `prediction` and `truth` are (X, Y, Z) uint8 as for `dice_per_class`; what the truth ignores belongs to neither. A
    class of which nothing was predicted has no surface: its surface Dice is 0 and its HD95 the diagonal of the CT, as
    far as two of its voxels can lie apart.
    """
    prediction = np.where(truth == IGNORED, 0, prediction)
    scores: dict[str, SurfaceScore | None] = dict.fromkeys(classes)
    for k, name in enumerate(classes, start=1):
        drawn = truth == k
        if name in reliable and drawn.any():
            scores[name] = _surface_score(prediction == k, drawn, spacing_mm, tolerance_mm)
    return scores


def _surface_score(
    predicted: np.ndarray, drawn: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> SurfaceScore:
    if not predicted.any():
        return SurfaceScore(round(float(np.linalg.norm(np.multiply(drawn.shape, spacing_mm))), 3), 0.0)
    box = _bounding_box(predicted | drawn)
    edges = get_mask_edges(predicted[box], drawn[box])
    distances = [get_surface_distance(a, b, spacing=tuple(spacing_mm)) for a, b in (edges, edges[::-1])]
    hd95_mm = max(float(np.percentile(each, 95)) for each in distances)
    near = float(np.mean(np.concatenate(distances) <= tolerance_mm))
    return SurfaceScore(round(hd95_mm, 3), round(near, 5))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Around all voxels that are set, one wider, so that a surface at its border is one."""
    sides = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        sides.append(slice(max(0, hit[0] - 1), hit[-1] + 2))
    return tuple(sides)


def summarise(cases: Mapping[str, Mapping[str, float | None]], classes: Sequence[str]) -> Scores:
    """Of scores per case and class (None: not scored) the mean over cases of each class, and the mean of those."""
    class_mean = {}
    for name in classes:
        values = [dice for scores in cases.values() if (dice := scores[name]) is not None]
        class_mean[name] = float(np.mean(values)) if values else None
    scored = [value for value in class_mean.values() if value is not None]
    return Scores(
        classes=tuple(classes),
        cases={name: dict(scores) for name, scores in cases.items()},
        class_mean=class_mean,
        mean=float(np.mean(scored)) if scored else None,
    )


def summarise_surfaces(
    cases: Mapping[str, Mapping[str, SurfaceScore | None]], classes: Sequence[str]
) -> dict[str, Scores]:
    """What `dice.json` holds beside Dice: `hd95_mm` and `surface_dice`."""
    hd95_mm = {case: {k: None if s is None else s.hd95_mm for k, s in of.items()} for case, of in cases.items()}
    dice = {case: {k: None if s is None else s.dice for k, s in of.items()} for case, of in cases.items()}
    return {"hd95_mm": summarise(hd95_mm, classes), "surface_dice": summarise(dice, classes)}


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
        shown = truth if truth.any() else prediction
        z = int((shown > 0).sum(axis=(0, 1)).argmax())
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
