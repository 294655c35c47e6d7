"""The probe tells features that know the anatomy from those that do not, and reads nothing that it must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixcl_dist.cli import main
from mixcl_dist.config import ConfigError, replace
from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.errors import RunError
from mixcl_dist.networks.dynunet import Backbone
from mixcl_dist.pretraining.pretrain import pretrain
from mixcl_dist.pretraining.probe import Patches, probe, probe_run, read_patches
from mixcl_dist.records import PretrainRecord, ProbeRecord, ProbeScans, read_metrics
from mixcl_dist.settings import NetworkConfig

WINDOW_HU = (-1000.0, 1000.0)
DEVELOPMENT = ("abdomen_000", "abdomen_001", "renal_000", "renal_001")


class Oracle(torch.nn.Module):
    """A backbone whose finest features are what the image shows, one channel for each of three grey values."""

    level_divisor = (2, 2, 2)

    def __init__(self, informative: bool = True, offset: float = 0.0):
        super().__init__()
        self.offset = offset
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.informative = informative

    def forward(self, image):
        levels = torch.tensor([-0.5, 0.0, 0.5]).view(1, 3, 1, 1, 1)
        features = (
            torch.exp(-((image - levels) ** 2) / 0.01) if self.informative else torch.randn(len(image), 3, 8, 8, 8)
        )
        return [torch.nn.functional.avg_pool3d(image, 2) * self.scale, features + self.offset]


def patches(known=((False, True, True),) * 4):
    """Four scans of one patch; class k has 500 · (k - 1) HU, the background -500."""
    label = np.zeros((4, 8, 8, 8), np.uint8)
    label[:, 2:5, 2:6], label[:, 5:7, 3:6] = 1, 2
    hu = (500 * (label.astype(np.int16) - 1)).astype(np.int16)
    known = np.array(known)
    for drawn, names in zip(label, known, strict=True):
        drawn[~np.append(names, [True])[np.minimum(drawn, 3)] & (drawn > 0)] = 0
    return Patches(hu, label, known, np.arange(4))


def test_features_that_tell_the_classes_apart_score_one_and_noise_does_not():
    torch.manual_seed(0)
    good = probe(Oracle(), patches(), ("a", "b"), WINDOW_HU)
    noise = probe(Oracle(informative=False), patches(), ("a", "b"), WINDOW_HU)
    for kind in ("linear", "knn"):
        assert getattr(good, kind).mean > 0.99 and getattr(good, kind).dice.keys() == {"a", "b"}
        assert getattr(noise, kind).mean < 0.6
    assert good.scans == ProbeScans(fitted=2, judged=2) and len(good.linear.scans) == 2


def test_patches_that_the_network_cannot_halve_are_cut(shards):
    some = patches()
    odd = Patches(*(np.pad(array, [(0, 0)] + [(0, 1)] * 3) for array in (some.hu, some.label)), some.known, some.case)
    assert probe(Oracle(), odd, ("a", "b"), WINDOW_HU) == probe(Oracle(), some, ("a", "b"), WINDOW_HU)


def test_the_classifier_is_computed_in_float32_where_the_network_runs_in_bfloat16(monkeypatch):
    """Features far from 0 differ little: bfloat16 would lose what tells them apart."""
    expected = probe(Oracle(), patches(), ("a", "b"), WINDOW_HU)
    monkeypatch.setattr("mixcl_dist.precision.has_bfloat16", lambda device: True)
    assert probe(Oracle(offset=100.0), patches(), ("a", "b"), WINDOW_HU).linear == expected.linear


def test_scans_that_show_no_class_cannot_be_judged_by():
    known = [[False, True, True], [False, False, False]] * 2
    with pytest.raises(RunError, match="no judged development scan shows a class"):
        probe(Oracle(), patches(known), ("a", "b"), WINDOW_HU)


def test_a_class_that_a_scan_leaves_unknown_is_neither_learnt_as_background_nor_judged():
    """Of scans that never drew "b", background voxels of b's grey value say nothing against it."""
    known = [[False, True, True], [False, True, True], [False, True, False], [False, True, False]]
    found = probe(Oracle(), patches(known), ("a", "b"), WINDOW_HU)
    assert found.linear.dice["b"] > 0.99
    nowhere = [[False, True, True], [False, True, False], [False, True, True], [False, True, False]]
    assert probe(Oracle(), patches(nowhere), ("a", "b"), WINDOW_HU).linear.dice["b"] is None


def test_ignored_voxels_are_not_judged():
    some = patches()
    some.label[:, :2] = IGNORED
    some.hu[:, :2] = 0  # looks like class a
    assert probe(Oracle(), some, ("a", "b"), WINDOW_HU).linear.dice["a"] > 0.99


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_collapsed_network_is_refused(value):
    backbone = Backbone(NetworkConfig(filters=(4, 6, 8)))
    for parameter in backbone.parameters():
        torch.nn.init.constant_(parameter, value)
    with pytest.raises(RunError, match="collapsed"):
        probe(backbone, patches(), ("a", "b"), WINDOW_HU)


def test_a_probe_leaves_the_network_as_it_was():
    backbone = Backbone(NetworkConfig(filters=(4, 6, 8)))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    one = probe(backbone, patches(), ("a", "b"), WINDOW_HU)
    assert backbone.training and all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    assert probe(backbone, patches(), ("a", "b"), WINDOW_HU) == one, "it can be repeated"


def test_patches_are_those_of_the_named_scans_with_what_is_known_of_them(shards):
    found, classes = read_patches(shards, DEVELOPMENT)
    assert set(found.case) == {0, 1, 2, 3} and found.hu.shape == found.label.shape == (len(found.case), 24, 24, 24)
    for row in range(len(found.case)):
        shown = np.setdiff1d(found.label[row], (0, IGNORED))
        assert found.known[row][shown].all() and found.known.shape[1] == len(classes) + 1
    with pytest.raises(RunError, match="holds no case nobody"):
        read_patches(shards, ["nobody"])


def test_the_verb_probes_a_run_a_checkpoint_and_a_random_network(shards, small_config, tmp_path, capsys):
    kept_back = {"budget.development": DEVELOPMENT, "pretrain.steps": 2, "pretrain.probe_every": 2}
    run = tmp_path / "run"
    pretrain(replace(small_config, kept_back), shards=shards, run=run)
    at_the_end = ProbeRecord.load(run)
    assert main(["probe", str(run), "--data", str(shards)]) == 0
    assert "mean" in capsys.readouterr().out
    again = ProbeRecord.load(run)
    assert again.linear == at_the_end.linear and again.cases == DEVELOPMENT
    checkpoint = run / "checkpoints" / "step_00000002"
    out = tmp_path / "probe.json"
    assert main(["probe", str(checkpoint), "--data", str(shards), "--out", str(out)]) == 0
    assert ProbeRecord.read(out).linear == again.linear
    settings = ["--network.filters", "4,6,8", "--budget.development", ",".join(DEVELOPMENT)]
    assert main(["probe", "none", "--data", str(shards), "--out", str(out), *settings]) == 0


def test_a_probe_at_intervals_works_where_parameters_are_scattered(shards, small_config, tmp_path):
    settings = {"budget.development": DEVELOPMENT, "pretrain.steps": 2, "pretrain.probe_every": 1}
    settings |= {"engine.zero_stage": 3, "pretrain.gradient_norms_every": 0}
    pretrain(replace(small_config, settings), shards=shards, run=tmp_path / "run")
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(entry["probe_linear"] >= 0 for entry in metrics)


def test_a_probe_that_cannot_be_made_is_warned_of_and_the_run_goes_on(
    shards, small_config, tmp_path, capsys, monkeypatch
):
    settings = {"budget.development": ("abdomen_000", "renal_000"), "pretrain.steps": 1, "pretrain.probe_every": 1}
    monkeypatch.setattr("mixcl_dist.pretraining.recorder.probe", _collapsed)
    pretrain(replace(small_config, settings), shards=shards, run=tmp_path / "run")
    assert "the network has collapsed" in capsys.readouterr().err
    assert PretrainRecord.load(tmp_path / "run").finished and not (tmp_path / "run" / "probe.json").exists()


def _collapsed(*arguments):
    raise RunError("the network has collapsed")


def test_a_run_that_saw_the_development_scans_is_refused(shards, small_config, tmp_path):
    run, config = tmp_path / "run", replace(small_config, {"pretrain.steps": 1})
    pretrain(config, shards=shards, run=run)
    with pytest.raises(RunError, match=r"was pre-trained on development scan abdomen_000.*; pre-train with"):
        probe_run(run, replace(config, {"budget.development": DEVELOPMENT}), shards=shards)
    with pytest.raises(ConfigError, match="names no two scans"):
        probe_run(run, config, shards=shards)


def test_patches_that_are_too_small_for_the_network_are_refused_before_anything_is_read(shards, small_config, tmp_path):
    deep = replace(small_config, {"network.filters": [4] * 6, "budget.development": DEVELOPMENT})
    with pytest.raises(ConfigError, match=r"patches of 24 x 24 x 24 voxels are too small .*edges of 64 or more"):
        probe_run(None, deep, shards=shards)
