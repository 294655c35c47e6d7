"""When a log warns, and when not."""

from __future__ import annotations

import pytest

from mixcl_dist.config import Config, replace
from mixcl_dist.pretraining.alarms import alarms

GOOD = {"voxel_label_anchors": 400.0, "effective_rank": 20.0, "uniformity": -2.5}
LATE = 500  # of 1,000 steps, 50 of them warm-up


def warned(step=LATE, labels=True, settings=None, **figures) -> list[str]:
    return sorted(alarms(step, GOOD | figures, replace(Config(), settings or {}), labels=labels))


def test_good_figures_and_missing_ones_are_not_warned_of():
    assert warned() == []
    assert alarms(LATE, {}, Config(), labels=True) == {}


def test_few_label_anchors_are_told_with_the_cure():
    (text,) = alarms(20, GOOD | {"voxel_label_anchors": 8.4}, Config(), labels=True).values()
    assert text.startswith("8 label anchors a step at step 20") and "\n" not in text
    for cure in ("data.labelled_fraction", "rows.min_spacing", "rows.per_view_pair", "pretrain.batch_size"):
        assert cure in text


def test_label_anchors_matter_only_where_labels_are_to_be_used():
    assert warned(voxel_label_anchors=0.0) == ["label_anchors"]
    assert warned(voxel_label_anchors=0.0, labels=False) == ["label_term"]
    assert "budget.scans" in alarms(LATE, GOOD, Config(), labels=False)["label_term"]
    assert warned(voxel_label_anchors=0.0, settings={"objective.voxel_label": 0}) == []


@pytest.mark.parametrize("collapsed", [{"uniformity": -0.05}, {"effective_rank": 3.0}])
def test_collapse_is_told_once_the_warm_up_is_over(collapsed):
    assert warned(**collapsed) == ["collapse"]
    assert warned(step=50, **collapsed) == []


def test_rows_that_nothing_trains_are_not_called_collapsed():
    settings = {"objective.voxel_identity": 0, "objective.voxel_label": 0}
    assert warned(uniformity=0.0, settings=settings) == []


def test_a_rank_that_all_others_wait_for_is_named_with_its_stage():
    slow = {"slowest_rank": 3, "slowest_rank_data_wait_s": 0.9, "slowest_rank_forward_s": 0.2}
    assert warned(**slow, slowest_rank_excess=0.1) == []
    (text,) = alarms(LATE, GOOD | slow | {"slowest_rank_excess": 0.41}, Config(), labels=True).values()
    assert text.startswith("rank 3 takes 41 % of a step longer") and "mostly in its wait for data" in text
