"""Is this the same scan? A digest of voxels finds copies, a fingerprint what was made from one scan by other means.

No kept library hashes volumes (those for pictures take slices one by one), so the fingerprint is own: the lowest
spatial frequencies of the tissue in mm. They do not change with voxel size; a shift, as by cropping, only turns their
phases, so comparing searches for the best shift; and what windows and noise change, the narrow window leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash
from scipy import fft

from mixcl_dist.data_shards.volume import Volume

WINDOW_HU = (-150, 150)
"""Fat and soft tissue: a scan that was clipped to more than this keeps its fingerprint."""
PERIOD_MM = 480.0
"""Longest wavelength; the shortest is a sixth of it."""
HIGHEST = 6
NEAR = 0.03
"""Fingerprints closer than this are of one scan, by measurement (`benchmarks/shards/fingerprint.py`)."""
_GRID = 24
"""Shifts along each axis that the search begins with, a quarter of the shortest wavelength apart."""
_BATCH = 256

_FREQUENCIES = np.stack(
    np.meshgrid(np.arange(HIGHEST + 1), *[np.arange(-HIGHEST, HIGHEST + 1)] * 2, indexing="ij"), axis=-1
)
_RADIUS = np.linalg.norm(_FREQUENCIES, axis=-1)
_X, _Y, _Z = np.moveaxis(_FREQUENCIES, -1, 0)
_CHOSEN = (_RADIUS <= HIGHEST + 0.3) & ((_X > 0) | ((_X == 0) & ((_Y > 0) | ((_Y == 0) & (_Z > 0)))))
"""One of each pair of opposite frequencies, whose values are conjugate."""
SIZE = 2 * int(_CHOSEN.sum())
"""Numbers of a fingerprint."""


def voxel_digest(voxels: np.ndarray) -> str:
    """xxh3 of 128 bits over shape and voxels: geometry stays out, so the same scan under another header is found."""
    digest = xxhash.xxh3_128(str(voxels.shape).encode())
    digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()


def fingerprint(volume: Volume) -> np.ndarray:
    """(`SIZE`,) int8 of a volume in RAS: real, then imaginary parts of its lowest frequencies but the mean."""
    low, high = WINDOW_HU
    spectrum = np.clip(volume.hu, low, high).astype(np.float32) - low
    ks = np.arange(HIGHEST + 1), np.arange(-HIGHEST, HIGHEST + 1), np.arange(-HIGHEST, HIGHEST + 1)
    for k, spacing in zip(ks, volume.spacing, strict=True):
        mm = np.arange(spectrum.shape[0]) * spacing
        wave = np.exp(-2j * np.pi / PERIOD_MM * np.outer(mm, k)).astype(np.complex64)
        # The axis goes in front and comes out behind, so after three turns all are in order again.
        flat = spectrum.reshape(len(mm), -1).T
        turned = flat @ wave if np.iscomplexobj(flat) else flat @ wave.real + 1j * (flat @ wave.imag)
        spectrum = turned.reshape(*spectrum.shape[1:], len(k))
    values = (spectrum * _RADIUS**2)[_CHOSEN]  # bodies are smooth: this gives every frequency a say
    parts = np.concatenate([values.real, values.imag])
    return np.rint(parts * (127 / max(np.abs(parts).max(), 1e-9))).astype(np.int8)


def near_pairs(ones: np.ndarray, others: np.ndarray, limit: float = NEAR) -> Iterator[tuple[int, int, float]]:
    """Positions of fingerprints nearer than `limit` in `ones` (M, `SIZE`) and `others` (N, `SIZE`), int8, and how near.

    The distance is 1 - the correlation at the best shift, 0 to 2. Correlation without phases is no smaller than that at
    any shift, and quick to have of all pairs; only those that it does not rule out are compared.
    """
    first, second = _spectra(ones), _spectra(others)
    sizes = np.abs(second).astype(np.float32).T
    for begin in range(0, len(first), _BATCH):
        possible = np.abs(first[begin : begin + _BATCH]).astype(np.float32) @ sizes > 1 - limit
        rows, columns = np.nonzero(possible)
        for part in range(0, len(rows), _BATCH):
            i, j = rows[part : part + _BATCH] + begin, columns[part : part + _BATCH]
            distances = 1 - _best_correlation(first[i] * second[j].conj())
            for row, column, distance in zip(i, j, distances, strict=True):
                if distance < limit:
                    yield int(row), int(column), float(distance)


def _spectra(fingerprints: np.ndarray) -> np.ndarray:
    """(N, `SIZE` / 2) complex, each of length 1."""
    real, imaginary = np.split(fingerprints.astype(np.float32), 2, axis=1)
    spectra = real + 1j * imaginary
    return spectra / np.maximum(np.linalg.norm(spectra, axis=1, keepdims=True), 1e-9)


def _best_correlation(products: np.ndarray) -> np.ndarray:
    """The largest correlation over shifts; `products` (N, `SIZE` / 2) are of one spectrum and the other's conjugate."""
    grid = np.zeros((len(products), _GRID, _GRID, _GRID), np.complex64)
    k = _FREQUENCIES[_CHOSEN]
    grid[:, k[:, 0], k[:, 1], k[:, 2]] = products
    correlation = fft.ifftn(grid, axes=(1, 2, 3)).real.reshape(len(products), -1) * _GRID**3
    best = np.stack(np.unravel_index(correlation.argmax(axis=1), (_GRID,) * 3), axis=1) / _GRID
    highest, step = correlation.max(axis=1), 0.5 / _GRID
    around = np.array(list(np.ndindex(3, 3, 3))) - 1
    while step > 0.5 / PERIOD_MM:
        shifts = best[:, None] + step * around
        there = np.einsum("nf,nsf->ns", products, np.exp(2j * np.pi * shifts @ k.T)).real
        best, highest = shifts[np.arange(len(best)), there.argmax(axis=1)], np.maximum(highest, there.max(axis=1))
        step /= 2
    return highest
