"""The recorder's means, and its pictures' code on a device that the tests do not have."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._functorch import config
from torch._subclasses import FakeTensorMode

from mixcl_dist.config import load
from mixcl_dist.pretraining.recorder import Recorder, _compact, _principal_colours, _slice_index, _view_label
from mixcl_dist.records import PretrainRecord, read_metrics

MANIFEST = SimpleNamespace(cases=(), digest="", patches=0, classes=(), spacing_mm=None, patch_size=(8, 8, 8))


@pytest.fixture
def norms():
    """Of the steps that the recorder's engine has made since it was last asked."""
    return [2.0]


@pytest.fixture
def recorder(tmp_path, norms):
    engine = SimpleNamespace(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        module=torch.nn.Linear(1, 1),
        learning_rate=lambda: 0.1,
        gradient_norms=lambda: norms,
    )
    config = load(overrides=[("pretrain.batch_size", "4")])
    return Recorder(tmp_path / "run", config, MANIFEST, [], ["a"], engine, {})


def add(recorder, loss, label, anchors):
    terms = {"voxel_label": torch.tensor(label), "voxel_label_anchors": torch.tensor(anchors)}
    recorder.add(torch.tensor(loss, requires_grad=True), terms)


def test_the_label_term_is_weighted_by_its_anchors(recorder, tmp_path):
    add(recorder, 1.0, 3.0, 10)
    add(recorder, 2.0, math.nan, 0)  # no labelled voxel, so the term says nothing
    add(recorder, 6.0, 6.0, 20)
    recorder.log(3)
    add(recorder, 8.0, math.nan, 0)
    recorder.log(4)
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["loss"], first["voxel_label"], first["voxel_label_anchors"]) == (3.0, 5.0, 10.0)
    assert second["loss"] == 8.0 and "voxel_label" not in second


def test_a_log_says_how_many_of_its_steps_were_clipped(recorder, norms, tmp_path):
    norms[:] = [0.5, 1.0, 1.5, 4.0]  # the largest that is left as it is: 1
    add(recorder, 1.0, 1.0, 1)
    recorder.log(4)
    norms[:] = [math.nan]
    add(recorder, 1.0, 1.0, 1)
    recorder.log(5)
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["gradient_norm"], first["clipped_share"]) == (1.75, 0.5)
    assert "gradient_norm" not in second and "clipped_share" not in second and second["skipped_steps"] == 1


def test_what_was_measured_is_in_the_next_log_alone(recorder, tmp_path):
    for norm, moment in ((1e-7, [1.0, 0.0]), (3e-7, [0.0, 1.0])):
        recorder.inspect({"gradient_norm_voxel_label": torch.tensor(norm)})
        recorder.inspect({"uniformity": torch.tensor(math.nan), "second_moment": torch.tensor(moment).diag().double()})
    add(recorder, 1.0, 1.0, 1)
    recorder.log(1)
    add(recorder, 1.0, 1.0, 1)
    recorder.log(2)
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["gradient_norm_voxel_label"], first["effective_rank"]) == (2e-7, 2.0)
    assert not {"uniformity", "second_moment"} & set(first)
    assert not {"gradient_norm_voxel_label", "effective_rank"} & set(second)


def test_few_anchors_are_warned_of_once_a_run_and_kept_for_the_page(recorder, tmp_path, capsys):
    for step in (1, 2):
        add(recorder, 1.0, 1.0, 8)
        recorder.log(step)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain: 8 label anchors a step at step 1,")
    resumed = Recorder(tmp_path / "run", recorder._config, MANIFEST, [], ["a"], recorder._engine, {})
    add(resumed, 1.0, 1.0, 8)
    resumed.log(3)
    assert capsys.readouterr().err == ""
    assert f"pretrain: {PretrainRecord.load(tmp_path / 'run').warnings['label_anchors']}" == line


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_in_no_mean_and_is_told_once(recorder, norms, tmp_path, capsys, loss):
    add(recorder, 1.0, 1.0, 1)
    add(recorder, loss, 1.0, 1)
    norms[:] = [2.0, math.inf]
    recorder.log(2)
    assert recorder.skipped == 1
    norms[:] = [math.inf]
    recorder.count_skipped()
    assert recorder.skipped == 2
    (entry,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (entry["loss"], entry["gradient_norm"], entry["skipped_steps"]) == (1.0, 2.0, 1)
    assert capsys.readouterr().err.count("was not finite") == 1
    norms[:] = [2.0]
    recorder.count_skipped()
    assert recorder.skipped == 0


def test_an_embedding_that_is_not_finite_still_makes_a_picture():
    embedding = torch.full((16, 8), math.nan)
    assert _principal_colours(embedding).isfinite().all()


def test_the_run_states_its_arithmetic(recorder):
    assert recorder._run.record.arithmetic in ("float32", "bfloat16 autocast, float32 master weights")


def test_pictures_are_computed_where_the_views_are():
    """Fake tensors refuse to be computed with those of another device; "meta" is one that every build knows."""
    with config.patch(fake_tensor_allow_meta=True), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        device = torch.device("meta")
        label = torch.empty(2, 8, 8, 8, dtype=torch.uint8, device=device)
        index = _slice_index(2, 6, 5, 3, device)
        seen = _view_label(label, torch.empty(2, 4, 4, device=device), index, 2, 6, 5)
        colours = _principal_colours(torch.empty(len(index), 16, device=device, dtype=torch.bfloat16))
    assert index.shape == (60, 4) and seen.shape == (2, 6, 5) and colours.shape == (60, 3)
    assert {tensor.device.type for tensor in (index, seen, colours)} == {"meta"}


class OnGpu(torch.Tensor):
    """Refuses what a tensor in a GPU's memory refuses, until it is copied to main memory."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bool, np.bool_), (torch.uint8, np.uint8), (torch.float32, np.float16), (torch.bfloat16, np.float16)],
)
def test_pictures_are_kept_from_any_device(dtype, kept):
    array = _compact(torch.tensor([0, 1, 1]).to(dtype).as_subclass(OnGpu))
    assert array.dtype == kept
    np.testing.assert_array_equal(array, [0, 1, 1])


def test_the_slowest_rank_is_logged_with_what_it_took(recorder, tmp_path):
    """Of three, the second waits for its data; the others are alike."""
    recorder._engine.world_size = 3
    recorder._engine.gather = lambda own: [[0.0, 1.0], [0.5, 1.0], own]
    with recorder.waiting(), recorder.computing():
        add(recorder, 1.0, 1.0, 1)
    recorder.log(1)
    (entry,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (entry["slowest_rank"], entry["slowest_rank_data_wait_s"], entry["slowest_rank_forward_s"]) == (1, 0.5, 1.0)
    assert entry["slowest_rank_excess"] > 0
