"""How a trial learns: the classifier first, deeper levels slower, an average of weights kept, a curve beside it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.finetuning.finetune import _optimizer, finetune
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
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


def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    return SegmentationNetwork(NetworkConfig(filters=(4, 6, 8)), 2)


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
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in some.classifier.parameters()}


def test_deeper_levels_learn_slower_by_the_factor():
    settings = FinetuneConfig(steps=50, level_decay=0.5, head_fraction=0.0, learning_rate=1e-2)
    peak = [max(of_group) for of_group in zip(*rates(settings), strict=True)]
    # classifier; two levels of the decoder, the bottleneck, two levels of the encoder
    assert peak == pytest.approx([1e-2, 1e-2, 5e-3, 2.5e-3, 1.25e-3, 6.25e-4])


def test_the_backbone_warms_up_after_the_classifier_and_both_end_together():
    settings = FinetuneConfig(steps=100, head_fraction=0.2, warmup_fraction=0.1, learning_rate=1e-2)
    head, backbone, *_ = zip(*rates(settings), strict=True)
    assert max(head) == head[9] == pytest.approx(1e-2)
    assert backbone.index(max(backbone)) == 20 + 8 - 1 and max(backbone) == pytest.approx(1e-2)
    assert head[-1] < 1e-4 and backbone[-1] < 1e-4


def test_while_the_classifier_learns_alone_the_backbone_stays(data, tmp_path):
    config = replace(Config(), SMALL | {"finetune.head_fraction": 0.75})
    finetune(replace(config, {"finetune.steps": 4}), data=data, start=None, run=tmp_path / "run")
    torch.manual_seed(config.budget.seed)
    begun = SegmentationNetwork(config.network, 3).backbone.state_dict()
    # Three of four steps leave the backbone alone, and of the fourth the average takes a share.
    ended = load_file(tmp_path / "run" / "model.safetensors")
    frozen = replace(config, {"finetune.steps": 4, "finetune.head_fraction": 0.99})
    finetune(frozen, data=data, start=None, run=tmp_path / "frozen")
    never = load_file(tmp_path / "frozen" / "model.safetensors")
    for name, weight in begun.items():
        torch.testing.assert_close(never[f"backbone.{name}"], weight)
    assert any(not torch.equal(ended[f"backbone.{name}"], weight) for name, weight in begun.items())
    assert not torch.equal(never["classifier.weight"], SegmentationNetwork(config.network, 3).classifier.weight)


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


@pytest.mark.parametrize(("key", "value"), [("head_fraction", 1.0), ("level_decay", 0.0), ("average_decay", 1.0)])
def test_factors_that_would_stop_learning_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        replace(Config(), {f"finetune.{key}": value})
