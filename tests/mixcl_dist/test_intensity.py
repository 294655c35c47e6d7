"""HU to network range."""

from __future__ import annotations

import torch

from mixcl_dist.intensity import normalise


def test_the_window_becomes_minus_one_to_one_and_the_rest_is_clipped():
    hu = torch.tensor([-2000, -160, 40, 240, 3000], dtype=torch.int16)
    value = normalise(hu, (-160.0, 240.0))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
