"""How a trial learns: helped by coarser levels at first, deeper levels slower, an average of weights kept, a curve."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.finetuning.finetune import _optimizer, coarse_share, finetune
from mixcl_dist.finetuning.segmenter import LearningNetwork, SegmentationNetwork
from mixcl_dist.settings import FinetuneConfig, NetworkConfig

SMALL = {
    "network.filters": [4, 8, 8],
    "finetune.steps": 4,
    "finetune.batch_size": 1,
    "finetune.patch_size": [24, 24, 24],
    "finetune.curve_every": 2,
    "budget.fraction": 0.5,
}
DEVELOPMENT = ["abdomen_001", "renal_001"]


def network() -> LearningNetwork:
    torch.manual_seed(0)
    config = NetworkConfig(filters=(4, 6, 8))
    return LearningNetwork(SegmentationNetwork(config, 2), config)


def rates(settings: FinetuneConfig) -> list[list[float]]:
    """Learning rate of each group of parameters at every step."""
    optimizer, schedule = _optimizer(network(), settings)
    found = []
    for _ in range(settings.steps):
        found.append(list(schedule.get_last_lr()))
        optimizer.step()
        schedule.step()
    return found


def test_every_parameter_learns_in_one_group():
    some = network()
    optimizer, _ = _optimizer(some, FinetuneConfig())
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(some.parameters()))
    classifiers = {id(p) for p in [*some.classifier.parameters(), *some.coarse.parameters()]}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == classifiers


def test_deeper_levels_learn_slower_by_the_factor():
    settings = FinetuneConfig(steps=50, level_decay=0.5, learning_rate=1e-2)
    peak = [max(of_group) for of_group in zip(*rates(settings), strict=True)]
    # classifier; two levels of the decoder, the bottleneck, two levels of the encoder
    assert peak == pytest.approx([1e-2, 1e-2, 5e-3, 2.5e-3, 1.25e-3, 6.25e-4])


def test_coarser_levels_fade_out_and_the_last_steps_do_without_them():
    settings = FinetuneConfig(steps=100, coarse_fraction=0.6)
    shares = [coarse_share(step, settings) for step in range(1, 101)]
    assert shares[0] == 1 and shares[30] == pytest.approx(0.5) and shares == sorted(shares, reverse=True)
    assert shares[59] > 0 and not any(shares[60:])


def test_what_is_kept_is_the_public_network_without_its_helpers(data, tmp_path):
    config = replace(Config(), SMALL)
    finetune(config, data=data, start=None, run=tmp_path / "run")
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert kept.keys() == SegmentationNetwork(config.network, 3).state_dict().keys()


def test_the_curve_is_of_development_scans_at_the_given_steps(data, tmp_path):
    config = replace(Config(), SMALL | {"budget.development": DEVELOPMENT, "finetune.curve_scans": 1})
    finetune(config, data=data, start=None, run=tmp_path / "run")
    points = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [2, 4]
    assert set(points[0]) == {"step", "seconds", "mean", "dice"} and points[0]["seconds"] < points[1]["seconds"]
    drawn = {name for name, dice in points[0]["dice"].items() if dice is not None}
    assert drawn and drawn < set(points[0]["dice"]), "the first development scan is annotated in part"


def test_without_development_scans_there_is_no_curve(data, tmp_path):
    finetune(replace(Config(), SMALL), data=data, start=None, run=tmp_path / "run")
    assert not (tmp_path / "run" / "curve.jsonl").exists()


REFUSED = [("coarse_fraction", 1.0), ("coarse_fraction", 0.0), ("level_decay", 0.0), ("average_decay", 1.0)]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_factors_that_would_stop_learning_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        replace(Config(), {f"finetune.{key}": value})
