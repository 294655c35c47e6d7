"""The table of tiles."""

from __future__ import annotations

import torch

from mixcl_dist.kernels import tuning


def test_every_width_and_dtype_has_a_tile():
    architectures = {architecture for architecture, *_ in tuning.TILES}
    for architecture in architectures:
        for kernel in ("forward", "backward"):
            for dtype in (torch.float16, torch.float32):
                by_width = tuning.TILES[architecture, kernel, dtype.itemsize]
                assert max(by_width) == 1024 and list(by_width) == sorted(by_width)
                for width, tile in by_width.items():
                    launch = tuning.fit(tile, width, dtype, architecture)
                    assert (
                        launch.width >= width
                        and launch.width % launch.out == 0
                        and launch.width % launch.head in (0, launch.tail)
                    )
