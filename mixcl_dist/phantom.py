"""The demo's cohort: torso-like CT volumes with known organs, drawn on the spot from one seed.

Everything is defined in millimetres in the patient's frame (x to the Right, y Anterior, z Superior; the origin lies
amid the abdomen), bent by a smooth random deformation and then sampled on the voxel grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

CLASSES = ("liver", "spleen", "kidneys", "aorta", "vertebrae")
SITES = {
    "abdomen": ("liver", "spleen", "kidneys", "vertebrae"),
    "renal": ("kidneys", "aorta", "vertebrae"),
    "archive": (),
}
"""Each site annotates what it needed; the archive annotates nothing."""

PHASES = {
    "arterial": {"liver": 90, "spleen": 140, "kidney": 190, "medulla": 120, "blood": 260},
    "portal": {"liver": 115, "spleen": 155, "kidney": 200, "medulla": 170, "blood": 170},
}
"""HU of what takes up contrast agent, in the two phases in which the abdomen is mostly scanned."""

AIR, LUNG, FAT, MUSCLE, SKIN, BOWEL, SPONGY_BONE, CORTICAL_BONE = -1000, -850, -100, 50, 20, 25, 300, 700


def write_cohort(
    folder: Path,
    *,
    training: int,
    validation: int,
    unlabelled: int,
    size: tuple[int, int, int] = (72, 60, 72),
    spacing_mm: float = 5.0,
    seed: int = 0,
) -> list[Path]:
    """Write a cohort of three sites that annotate different classes; returns the sources to build shards from.

    The first source is `folder` itself, the data set to fine-tune on: its `dataset.json` joins the `training` cases
    of the sites "abdomen" and "renal", each annotated in its site's classes only, and `validation` cases annotated
    completely. The second is the site "archive" with `unlabelled` cases. Each site is also a data set by itself.
    Volumes are int16 HU in NIfTI files, RAS, of `size` voxels; the same arguments give the same voxels.
    """
    rng = np.random.default_rng(seed)
    labelled_sites = [name for name, classes in SITES.items() if classes]
    entries: dict[str, list[dict]] = {name: [] for name in (*SITES, "validation")}
    sites = [labelled_sites[number % len(labelled_sites)] for number in range(training)]
    for site in sites + ["archive"] * unlabelled + ["validation"] * validation:
        name = f"{site}_{len(entries[site]):03d}"
        hu, label = draw_torso(size, spacing_mm, np.random.default_rng(rng.integers(2**63)))
        entry = _write_case(folder / site, name, hu, label, SITES.get(site, CLASSES), spacing_mm, rng)
        entries[site].append(entry)
    for site in SITES:
        _write_dataset(folder / site, f"phantom {site}", training=entries[site])
    _write_dataset(
        folder,
        "phantom",
        training=[_below(site, entry) for site in labelled_sites for entry in entries[site]],
        validation=[_below("validation", entry) for entry in entries["validation"]],
    )
    return [folder, folder / "archive"]


def draw_torso(size: Sequence[int], spacing_mm: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One patient: HU (X, Y, Z) int16 and label (X, Y, Z) uint8, where k > 0 is `CLASSES[k-1]`; RAS."""
    phase = {tissue: value * rng.normal(1, 0.07) for tissue, value in PHASES[rng.choice(list(PHASES))].items()}
    scene = _Scene(size, spacing_mm, rng)
    scene.paint_body()
    scene.paint_chest(phase)
    scene.paint_bowel()
    scene.paint_spine()
    scene.paint_organs(phase)
    return scene.scan(), scene.label


@dataclass(frozen=True)
class _Frame:
    """Bent coordinates in mm of every voxel, and how large this patient is."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    def ellipsoid(self, centre: Sequence[float] | np.ndarray, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """Squared radius relative to the ellipsoid's surface: below 1 is inside."""
        axes = (self.x, self.y, self.z)
        return np.sum([((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)], axis=0)


class _Scene:
    """A patient that is being drawn: HU before noise, labels, and the tissues' places."""

    def __init__(self, size: Sequence[int], spacing_mm: float, rng: np.random.Generator) -> None:
        self.rng = rng
        self.spacing_mm = spacing_mm
        self.hu = np.full(size, AIR, dtype=np.float32)
        self.label = np.zeros(size, dtype=np.uint8)
        axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * spacing_mm for n in size]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        scale = rng.uniform(0.9, 1.1, size=(3, 1, 1, 1)).astype(np.float32)
        shift = rng.normal(0, (5, 5, 12)).astype(np.float32)[:, None, None, None]
        bend = np.stack([self.smooth_noise(110.0) for _ in range(3)]) * 8.0
        self.frame = _Frame(*(_turn(grid, rng.normal(0, 3)) / scale + shift + bend))
        self.unevenness = 0.06 * self.smooth_noise(30.0)

    def smooth_noise(self, length_mm: float) -> np.ndarray:
        """Gaussian field of zero mean and unit variance that varies over about `length_mm`."""
        step = max(1.0, length_mm / self.spacing_mm / 2)
        knots = [int(n / step) + 4 for n in self.hu.shape]
        field = self.rng.standard_normal(knots).astype(np.float32)
        for n, count in zip(self.hu.shape, knots, strict=True):
            distance = np.arange(n)[:, None] / step + 1 - np.arange(count)
            bumps = np.exp(-0.5 * (distance / 0.7) ** 2).astype(np.float32)
            field = np.tensordot(field, bumps, axes=(0, 1))  # the next axis comes to the front
        return (field - field.mean()) / field.std()

    def paint(self, where: np.ndarray, hu: float | np.ndarray, name: str | None = None) -> None:
        """Fill `where` with HU; what is painted later lies on top, and only a named class has a label."""
        self.hu[where] = hu[where] if isinstance(hu, np.ndarray) else hu
        self.label[where] = CLASSES.index(name) + 1 if name else 0

    def place(self, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """An ellipsoid whose position and size differ from patient to patient, with an uneven surface."""
        moved = centre + self.rng.normal(0, 4, size=3)
        scaled = radii * self.rng.uniform(0.87, 1.13, size=3)
        return self.frame.ellipsoid(moved, scaled) + self.unevenness

    def paint_body(self) -> None:
        """Skin, fat of varying thickness, the muscle wall, and fat within it."""
        f = self.frame
        waist = 1 - 0.06 * np.exp(-(((f.z + 40) / 70) ** 2))
        radius = np.sqrt(f.ellipsoid((0, 0, 0), (160, 112, np.inf))) / waist
        fat = self.rng.uniform(0.05, 0.16)
        back = np.clip(-f.y / 100, 0, 1)
        wall = 1 - fat * (1 - 0.5 * back)
        self.paint(radius < 1, SKIN)
        self.paint(radius < 1 - 3 / 130, FAT)
        self.paint(radius < wall, MUSCLE)
        self.inner = radius / (wall - 0.1 - 0.12 * back)
        self.paint(self.inner < 1, FAT)
        for side in (-1, 1):
            self.paint(self.place((side * 38, -62, -90), (20, 22, 90)) < 1, MUSCLE)

    def paint_chest(self, phase: dict[str, float]) -> None:
        """Lungs with vessels, heart and ribs."""
        f = self.frame
        vessels = np.abs(self.smooth_noise(18.0)) + np.abs(self.smooth_noise(18.0))
        lung = np.where(vessels < 0.3, 20.0, LUNG + 25 * self.smooth_noise(60.0))
        base = 45 + self.rng.normal(0, 8)
        inside = self.inner < 1
        self.paint(inside & (f.z > base + 25), MUSCLE)
        dome = f.z - base > 45 * (1 - (np.abs(np.abs(f.x) - 70) / 75) ** 2)
        for side in (-1, 1):
            self.paint(inside & dome & (self.place((side * 76, -5, 130), (58, 95, 150)) < 1), lung)
        self.paint(self.place((-22, 30, 112), (48, 40, 45)) < 1, phase["blood"])
        rib = (np.abs(self.inner - 1.04) < 0.045) & (f.z > -30 + 0.3 * f.y)
        self.paint(rib & (np.mod(f.z - 0.45 * f.y, 30) < 10) & (np.abs(f.x) > 25), CORTICAL_BONE * 0.7)

    def paint_bowel(self) -> None:
        """Loops with gas and fluid among the fat of the belly, and a stomach."""
        f = self.frame
        belly = (self.inner < 0.97) & (f.z < 30) & (f.y > -30)
        loops = self.smooth_noise(32.0)
        self.paint(belly & (loops > -0.1), BOWEL)
        self.paint(belly & (loops > 1.6) & (f.y > 10), AIR * 0.9)
        stomach = self.place((-55, 28, 25), (45, 32, 40))
        self.paint((self.inner < 0.97) & (stomach < 1), MUSCLE)
        self.paint(stomach < 0.7, 10)
        self.paint((stomach < 0.6) & (f.y > 38), AIR * 0.9)

    def paint_spine(self) -> None:
        """Vertebral bodies with discs between them, processes, and the canal."""
        f = self.frame
        sway = 5 * np.sin(f.z / 90 + self.rng.uniform(0, 6))
        y = -66 + 8 * np.cos(f.z / 70) + self.rng.normal(0, 2)
        body = ((f.x - sway) / 22) ** 2 + ((f.y - y) / 17) ** 2
        behind = (np.abs(f.x - sway) / 30) ** 2 + ((f.y - y + 33) / 13) ** 2
        spinous = (np.abs(f.x - sway) < 5) & (np.abs(f.y - y + 42) < 18)
        rhythm = np.mod(f.z + self.rng.uniform(0, 32), 32)
        bone = SPONGY_BONE - 80 + 40 * self.smooth_noise(12.0)
        self.paint(body < 1, 80)
        vertebra = rhythm < 25
        self.paint(vertebra & (body < 1), bone, "vertebrae")
        shell = vertebra & (body < 1) & ((body > 0.72) | (rhythm < 3) | (rhythm > 22))
        self.paint(shell, CORTICAL_BONE * 0.75, "vertebrae")
        self.paint((rhythm > 4) & (rhythm < 20) & ((behind < 1) | spinous), CORTICAL_BONE * 0.6, "vertebrae")
        canal = ((f.x - sway) / 10) ** 2 + ((f.y - y + 24) / 9) ** 2 < 1
        self.paint(canal, 35)

    def paint_organs(self, phase: dict[str, float]) -> None:
        """Aorta and vena cava, kidneys with cortex, medulla and hilum, spleen, liver: the patient's right is +x."""
        f = self.frame
        inside = self.inner < 0.99
        bend = 4 * np.sin(f.z / 60 + self.rng.uniform(0, 6))
        aorta = np.hypot(f.x + 14 - bend, f.y + 34) < 15 * self.rng.uniform(0.85, 1.15)
        self.paint(aorta, phase["blood"], "aorta")
        self.paint((np.hypot(f.x - 20 - bend, f.y + 32) < 11) & (f.z < 90), 0.3 * phase["blood"] + 60)
        for side, height in ((-1, -42), (1, -55)):
            x, y = side * 66, -42
            kidney = self.place((x, y, height), (27, 25, 54))
            hilum = f.ellipsoid((x - side * 30, y + 12, height), (17, 14, 16)) < 1
            self.paint(inside & (kidney < 1) & ~hilum, phase["kidney"], "kidneys")
            self.paint(inside & (kidney < 0.42) & ~hilum, phase["medulla"], "kidneys")
        texture = self.smooth_noise(25.0)
        spleen = inside & (self.place((-92, -42, 30), (32, 42, 50)) < 1)
        self.paint(spleen, phase["spleen"] + 4 * texture, "spleen")
        lobes = np.minimum(self.place((72, 0, 28), (75, 80, 68)), self.place((10, 38, 40), (72, 42, 38)) + 0.05)
        vessels = np.abs(texture) + np.abs(self.smooth_noise(25.0)) < 0.25
        liver_hu = phase["liver"] + 5 * texture + np.where(vessels, 0.25 * (phase["blood"] - 40), 0)
        self.paint(inside & (lobes < 1), liver_hu, "liver")
        self.paint(self.place((55, 40, -12), (15, 18, 22)) < 1, 12)

    def scan(self) -> np.ndarray:
        """HU as a scanner shows them: partial volume at borders, and correlated noise; int16."""
        blurred = ndimage.gaussian_filter(self.hu, 0.45)
        grain = ndimage.gaussian_filter(self.rng.standard_normal(self.hu.shape).astype(np.float32), 0.6)
        noise_hu = self.rng.uniform(6, 16)
        return np.clip(blurred + noise_hu * grain / grain.std(), -1024, 3071).round().astype(np.int16)


def _turn(grid: np.ndarray, angle_deg: float) -> np.ndarray:
    """Coordinates of a patient who lies turned about the long axis."""
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    x, y, z = grid
    return np.stack([cos * x - sin * y, sin * x + cos * y, z])


def _write_case(
    folder: Path,
    name: str,
    hu: np.ndarray,
    label: np.ndarray,
    annotated: Sequence[str],
    spacing_mm: float,
    rng: np.random.Generator,
) -> dict:
    """Write image and, where any class is annotated, label; returns the entry of `dataset.json`."""
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = rng.uniform(-200, 0, size=3).round(1)
    image = folder / "images" / f"{name}.nii.gz"
    _write_nifti(image, hu, affine)
    entry: dict = {"image": f"./images/{image.name}"}
    if annotated:
        keep = np.isin(label, [CLASSES.index(each) + 1 for each in annotated])
        _write_nifti(folder / "labels" / image.name, np.where(keep, label, 0).astype(np.uint8), affine)
        entry |= {"label": f"./labels/{image.name}", "annotated": list(annotated)}
    return entry


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _write_dataset(folder: Path, name: str, **splits: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    head = {"name": name, "modality": {"0": "CT"}, "labels": dict(enumerate(("background", *CLASSES)))}
    (folder / "dataset.json").write_text(json.dumps(head | splits, indent=1) + "\n")


def _below(site: str, entry: dict) -> dict:
    """A site's entry as seen from the folder above it."""
    paths = {key: f"./{site}/{entry[key].removeprefix('./')}" for key in ("image", "label") if key in entry}
    return entry | paths
