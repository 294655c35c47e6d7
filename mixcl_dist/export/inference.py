"""What a bundle brings along, as MONAI does not have it: the source of these definitions goes into its scripts/."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, SpatialResample

from mixcl_dist.data_shards.volume import AIR_HU, antialiased, resampled_grid


class TrainingSpacingd(MapTransform, InvertibleTransform):
    """Bring a CT (1, X, Y, Z) to `pixdim` (mm) as in training: cut off below air, blurred where an axis loses
    resolution, on a grid that begins at the CT's edge. MONAI's Spacingd does not blur and begins elsewhere."""

    def __init__(self, keys, pixdim) -> None:
        super().__init__(keys)
        self.pixdim = np.asarray(pixdim, dtype=float)
        self.resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)

    def __call__(self, data):
        data = dict(data)
        for key in self.key_iterator(data):
            image = data[key].clone()
            step = self.pixdim / np.asarray(image.pixdim, dtype=float)
            image[0] = torch.as_tensor(antialiased(np.maximum(np.asarray(image[0]), AIR_HU), step))
            size, to_old = resampled_grid(image.shape[1:], step)
            data[key] = self.resample(image, dst_affine=np.asarray(image.affine) @ to_old, spatial_size=size)
        return data

    def inverse(self, data):
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = self.resample.inverse(data[key])
        return data


@torch.inference_mode()
def segment(dataset, network, inferer, postprocessing, device) -> None:
    """Segment every CT of `dataset` through a sliding window; `postprocessing` brings the logits to its grid and writes
    the classes."""
    network.eval()
    for sample in dataset:
        image = sample["image"]
        logits = inferer(image.as_tensor()[None].to(device), network)[0]
        postprocessing(sample | {"pred": MetaTensor(logits.cpu(), meta=image.meta)})
