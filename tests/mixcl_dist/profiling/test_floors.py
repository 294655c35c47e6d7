"""The least time of a step's parts, held against figures made by hand."""

from __future__ import annotations

import pytest
import torch

from mixcl_dist.config import load
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.profiling import floors


def test_the_floor_of_a_network_grows_with_its_voxels():
    tiny = [("network.filters", "[4,8,16]"), ("rows.per_view_pair", "1")]  # whose own FLOP do not grow
    small, large = (load(overrides=[*tiny, ("views.size", f"[{edge},{edge},{edge}]")]) for edge in (16, 32))
    (forward, _, parameters), (more, more_backward, same) = (floors.network(config, 2) for config in (small, large))
    assert same == parameters
    assert more.flop == pytest.approx(8 * forward.flop, rel=0.05)
    assert more_backward.flop == pytest.approx(2 * more.flop, rel=0.15)  # no gradient of the image is wanted
    assert more.bytes == pytest.approx(8 * forward.bytes, rel=0.05)
    network = PretrainNetwork(load(overrides=tiny).network)
    output = network(torch.zeros(1, 1, 16, 16, 16), torch.zeros(1, 4, dtype=torch.int64))
    assert output.voxel.isfinite().all(), "what only had a shape is not met by the step that is timed next"


def test_one_convolution_has_the_flop_and_bytes_of_its_definition():
    image = torch.zeros(2, 3, 8, 8, 8)
    weight = torch.zeros(5, 3, 3, 3, 3)
    with floors.FlopCounterMode(display=False) as flop, floors._ConvolutionBytes() as traffic:
        torch.nn.functional.conv3d(image, weight, padding=1)
    assert flop.get_total_flops() == 2 * (2 * 8**3) * 5 * (3 * 27)
    assert traffic.bytes == 2 * (2 * 3 * 8**3 + 5 * 3 * 27 + 2 * 5 * 8**3)


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    work = floors.Work(flop=6e12, bytes=1e9)
    assert work.seconds(floors.Rates(flop=1e12, bandwidth=1e9)) == 6
    assert work.seconds(floors.Rates(flop=1e15, bandwidth=1e9)) == 1


@pytest.mark.slow
def test_a_machine_multiplies_and_copies_at_some_rate():
    rates = floors.measured_rates(torch.device("cpu"), seconds=0.05)
    assert 1e8 < rates.flop < 1e15 and 1e8 < rates.bandwidth < 1e13
