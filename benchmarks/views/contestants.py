"""What is compared: two random views of each patch of a batch, by our code and by what others would write for the same.

Each is set up by its own documentation, at the settings of `ViewsConfig`, and may be asked for some of the degradations
alone. What a library has no transform for is named in `lacks`, and is not asked of it: the library has less to do then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mixcl_dist.intensity import rescale
from mixcl_dist.pretraining import views as ours
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.settings import ViewsConfig

DEGRADATIONS = ("blur", "low_resolution", "noise", "shift", "mask")
WINDOW_HU = (-1000.0, 1000.0)
PER_HU = 2 / (WINDOW_HU[1] - WINDOW_HU[0])
OFF = {
    "blur": {"blur_sigma": 0.0},
    "low_resolution": {"low_resolution": 1.0},
    "noise": {"noise_hu": 0.0},
    "shift": {"shift_hu": 0.0},
    "mask": {"mask_fraction": 0.0},
}


class Contestant:
    """Two views of each patch: turned, scaled and moved at random, then degraded.

    `patch` and `view` are edges in voxels; a call takes patches (B, 1, X, Y, Z) int16 in HU and gives a pair of
    (2·B, 1, x, y, z) float32 in [-1, 1], as they are and degraded.
    """

    lacks: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, patch: int, view: int, device: torch.device, degradations: Collection[str]) -> None:
        self.degradations, self.device = [one for one in DEGRADATIONS if one in degradations], device
        self.config = ViewsConfig(size=(view, view, view))
        self.patch, self.view = patch, view
        self.set_up()

    def set_up(self) -> None:
        """Make what the library asks for."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)

    def __call__(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        pairs = list(self._pairs(patches))
        return torch.cat([clean for clean, _ in pairs]), torch.cat([degraded for _, degraded in pairs])

    def _pairs(self, patches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """One view after the other, as all but ours take one image at a time."""
        for patch in patches:
            scaled = self.scale(patch)
            for _ in range(2):
                clean = self.crop(scaled)
                degraded = self.degrade(clean.clone()).clamp_(-1, 1) if self.degradations else clean
                yield clean[None], degraded[None]

    def scale(self, patch: Tensor) -> Tensor:
        """(1, X, Y, Z) in HU → in the network's range, clipped."""
        raise NotImplementedError

    def crop(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def degrade(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        """Masked blocks that lie anywhere and may overlap, so that `mask_fraction` of the voxels is masked."""
        share = (self.config.mask_block / self.view) ** 3
        return round(math.log(1 - self.config.mask_fraction) / math.log(1 - share))


class Ours(Contestant):
    """`mixcl_dist.pretraining.views`, the batch at once."""

    devices = ("cpu", "cuda")

    def set_up(self) -> None:
        off = {name: value for one, of in OFF.items() if one not in self.degradations for name, value in of.items()}
        self.config = replace(self.config, **off)
        self._seed = 0

    def seed(self, seed: int) -> None:
        self._seed = seed << 32

    def __call__(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        self._seed += 1
        draws = Draws(self._seed, range(len(patches)), self.device)
        spacing = torch.ones(len(patches), 3, device=self.device)
        if self.degradations:
            made = ours.make_views(patches, spacing, self.config, WINDOW_HU, draws)
            return made.clean, made.image
        geometry = ours._draw_geometry(tuple(patches.shape[2:]), spacing, self.config, draws)
        clean = ours._resample(rescale(patches, WINDOW_HU), geometry, self.config.size).clamp_(-1, 1)
        return clean, clean


class Monai(Contestant):
    """Dictionary transforms, without metadata, which cost time and are not used here."""

    devices = ("cpu", "cuda")

    def set_up(self) -> None:
        from monai import transforms
        from monai.data import set_track_meta

        set_track_meta(False)
        config, key = self.config, "image"
        radians, room = math.radians(config.rotation_deg), (self.patch - self.view) / 2
        least, most = (scale - 1 for scale in config.scale)
        self._scale = transforms.ScaleIntensityRanged(key, *WINDOW_HU, -1, 1, clip=True)
        self._crop = transforms.RandAffined(
            key,
            prob=1,
            rotate_range=(radians,) * 3,
            translate_range=(room,) * 3,
            scale_range=((least, most),) * 3,
            spatial_size=config.size,
            padding_mode="border",
            cache_grid=True,
            device=self.device,
        )
        sigmas = {f"sigma_{axis}": (0.0, config.blur_sigma) for axis in "xyz"}
        made = {
            "blur": lambda: transforms.RandGaussianSmoothd(key, **sigmas, prob=1),
            "low_resolution": lambda: transforms.RandSimulateLowResolutiond(
                key, prob=1, zoom_range=(1 / config.low_resolution, 1.0)
            ),
            "noise": lambda: transforms.RandGaussianNoised(key, prob=1, std=config.noise_hu * PER_HU),
            "shift": lambda: transforms.RandShiftIntensityd(key, config.shift_hu * PER_HU, prob=1),
            "mask": lambda: transforms.RandCoarseDropoutd(
                key, holes=self.blocks, spatial_size=config.mask_block, fill_value=-1.0, prob=1
            ),
        }
        self._degrade = transforms.Compose([made[one]() for one in self.degradations])

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self._crop.set_random_state(seed)
        self._degrade.set_random_state(seed)

    def scale(self, patch: Tensor) -> Tensor:
        return self._scale({"image": patch})["image"]

    def crop(self, image: Tensor) -> Tensor:
        return self._crop({"image": image})["image"]

    def degrade(self, image: Tensor) -> Tensor:
        return self._degrade({"image": image})["image"]


class TorchIO(Contestant):
    """SimpleITK's resampling of the whole patch, and its middle; a shift is the mean of its noise."""

    lacks = ("mask",)

    def set_up(self) -> None:
        import torchio

        config, room = self.config, (self.patch - self.view) / 2
        self._image = torchio.ScalarImage
        to_range = torchio.RescaleIntensity(out_min_max=(-1, 1), in_min_max=WINDOW_HU)
        self._scale = torchio.Compose([torchio.Clamp(*WINDOW_HU), to_range])
        affine = torchio.RandomAffine(
            scales=config.scale, degrees=config.rotation_deg, translation=room, isotropic=True
        )
        self._crop = torchio.Compose([affine, torchio.CropOrPad(self.view)])
        steps = []
        if "blur" in self.degradations:
            steps.append(torchio.RandomBlur(std=(0, config.blur_sigma)))
        if "low_resolution" in self.degradations:  # of one axis, which is drawn
            steps.append(torchio.RandomAnisotropy(downsampling=(1, config.low_resolution)))
        noise = (0, config.noise_hu * PER_HU * ("noise" in self.degradations))
        shift = config.shift_hu * PER_HU * ("shift" in self.degradations)
        if noise[1] or shift:
            steps.append(torchio.RandomNoise(mean=(-shift, shift), std=noise))
        self._degrade = torchio.Compose(steps)

    def scale(self, patch: Tensor) -> Tensor:
        return self._scale(self._image(tensor=patch.float())).data

    def crop(self, image: Tensor) -> Tensor:
        return self._crop(self._image(tensor=image)).data

    def degrade(self, image: Tensor) -> Tensor:
        return self._degrade(self._image(tensor=image)).data


class BatchgeneratorsV2(Contestant):
    """nnU-Net's transforms; a patch is scaled to the network's range as nnU-Net's preprocessing would."""

    def set_up(self) -> None:
        from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
        from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
        from batchgeneratorsv2.transforms.noise.blank_rectangle import BlankRectangleTransform
        from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
        from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

        config, radians, shift = self.config, math.radians(self.config.rotation_deg), self.config.shift_hu * PER_HU
        self._crop = SpatialTransform(
            config.size,
            patch_center_dist_from_border=self.view / 2,
            random_crop=True,
            p_rotation=1,
            rotation=(-radians, radians),
            p_scaling=1,
            scaling=config.scale,
            p_synchronize_scaling_across_axes=1,
            padding_mode_image="border",
        )
        made = {
            "blur": lambda: GaussianBlurTransform((0.0, config.blur_sigma)),
            "low_resolution": lambda: SimulateLowResolutionTransform(
                (1 / config.low_resolution, 1.0), synchronize_channels=False, synchronize_axes=False, ignore_axes=None
            ),
            "noise": lambda: GaussianNoiseTransform((0, config.noise_hu * PER_HU)),
            "shift": lambda: BrightnessAdditiveTransform(-shift, shift),  # its two numbers are ends of a range
            "mask": lambda: BlankRectangleTransform(config.mask_block, -1.0, self.blocks),
        }
        self._degrade = ComposeTransforms([made[one]() for one in self.degradations])

    def scale(self, patch: Tensor) -> Tensor:
        return rescale(patch, WINDOW_HU).clamp_(-1, 1)

    def crop(self, image: Tensor) -> Tensor:
        return self._crop(image=image)["image"]

    def degrade(self, image: Tensor) -> Tensor:
        return self._degrade(image=image)["image"]


CONTESTANTS = {"mixcl_dist": Ours, "MONAI": Monai, "TorchIO": TorchIO, "batchgeneratorsv2": BatchgeneratorsV2}
