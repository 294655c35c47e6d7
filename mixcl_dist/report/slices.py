"""CT slices as inline PNG: anterior up, the patient's right on the left side of the picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import matplotlib.image
import numpy as np
from scipy import ndimage

DISPLAY_HU = (-250.0, 350.0)
"""Window of every CT picture: soft tissue with some fat and bone."""
HEIGHT_PX = 300

CLASS_COLOURS = (
    *("#ff9900", "#0077ff", "#00ffff", "#dd3399", "#ffff00", "#dd99ff", "#997733", "#55bb99"),
    *("#bbdd77", "#ff0000", "#9977dd", "#ff7777", "#ff00dd", "#dd77bb", "#77ddbb", "#99ffbb"),
)
"""Each the one farthest from those before it, for eyes with and without each of the three colour blindnesses, of the
colours that stand out from soft tissue; the first eight can be told apart by anyone. Beyond 16 they repeat."""


def class_colour(label: int) -> str:
    """The colour of class index `label` (1-based) in every picture."""
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]


def ct_png(image: np.ndarray, window_hu: tuple[float, float], spacing: tuple[float, float] = (1.0, 1.0)) -> str:
    """Data URI of a slice (x, y) whose -1 and 1 stand for `window_hu`; `spacing` in mm gives the pixel aspect."""
    return _data_uri(_grey(image, window_hu, spacing))


def label_png(
    image: np.ndarray,
    label: np.ndarray,
    window_hu: tuple[float, float],
    spacing: tuple[float, float] = (1.0, 1.0),
) -> str:
    """The slice with its label (x, y) uint8 over it: filled softly, outlined in full colour."""
    picture = _grey(image, window_hu, spacing)
    index = enlarged(label, spacing, order=0)
    for k in np.unique(index[index > 0]):
        colour = np.array([int(class_colour(int(k))[i : i + 2], 16) for i in (1, 3, 5)])
        inside = index == k
        edge = inside & ~ndimage.binary_erosion(inside, iterations=2)
        picture[inside] = 0.65 * picture[inside] + 0.35 * colour
        picture[edge] = colour
    return _data_uri(picture)


def colour_png(rgb: np.ndarray) -> str:
    """Data URI of an RGB slice (x, y, 3) in [0, 1] or uint8."""
    scaled = rgb.astype(float) / (255 if rgb.dtype == np.uint8 else 1)
    channels = [enlarged(scaled[..., c], (1.0, 1.0), order=0) for c in range(3)]
    return _data_uri(255 * np.clip(np.stack(channels, axis=-1), 0, 1))


def content_box(image: np.ndarray, *labels: np.ndarray, margin: int = 3) -> tuple[slice, slice]:
    """The part of a slice that holds body (above -0.5) or any label, so that air and padding are not shown."""
    content = np.logical_or.reduce([image > -0.5, *(label > 0 for label in labels)])
    if not content.any():
        return slice(None), slice(None)
    along_x, along_y = (np.flatnonzero(content.any(axis=axis)) for axis in (1, 0))
    return tuple(slice(max(0, hit[0] - margin), hit[-1] + margin + 1) for hit in (along_x, along_y))  # type: ignore[return-value]


def labels_in(*labels: np.ndarray) -> Iterator[int]:
    """Class indices that occur in any of the label arrays, ascending."""
    found = set().union(*(np.unique(label).tolist() for label in labels))
    return (int(k) for k in sorted(found) if k > 0)


def _grey(image: np.ndarray, window_hu: tuple[float, float], spacing: tuple[float, float]) -> np.ndarray:
    low, high = window_hu
    hu = low + (np.nan_to_num(image.astype(float)) + 1) / 2 * (high - low)
    shown = np.clip((hu - DISPLAY_HU[0]) / (DISPLAY_HU[1] - DISPLAY_HU[0]), 0, 1)
    return np.repeat(255 * enlarged(shown, spacing, order=1)[..., None], 3, axis=-1)


def enlarged(values: np.ndarray, spacing: tuple[float, float], order: int) -> np.ndarray:
    """From (x, y) in RAS to picture rows and columns of square pixels, `HEIGHT_PX` high."""
    width_mm, height_mm = (n * mm for n, mm in zip(values.shape, spacing, strict=True))
    width = max(1, round(HEIGHT_PX * width_mm / height_mm))
    columns = (np.arange(width) + 0.5) * values.shape[0] / width - 0.5
    rows = (np.arange(HEIGHT_PX) + 0.5) * values.shape[1] / HEIGHT_PX - 0.5
    grid = np.meshgrid(columns[::-1], rows[::-1], indexing="xy")
    return ndimage.map_coordinates(values, grid, order=order, mode="nearest", prefilter=False)


def _data_uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.round(picture).astype(np.uint8), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
