"""The few-label table: what there is to run, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixcl_dist.config import ConfigError, load, replace
from mixcl_dist.studies.table.plan import plan

from .small_table import ARMS, STAGES, table

OTHERS = {
    "folds": {"A": {"known": ["liver"], "new": ["spleen"]}, "B": {"known": ["spleen"], "new": ["liver"]}},
    "scans": [1],
    "arms": {"scratch": {}, "transfer": {"stage": "known"}},
}


def trials(items, **place):
    return [i for i in items.values() if i.kind == "trial" and all(getattr(i, k) == v for k, v in place.items())]


def test_every_cell_has_a_trial_and_every_item_comes_after_what_it_needs():
    items = plan(table(other_organs=OTHERS))
    assert len(trials(items, fold="")) == len(ARMS) * 2 * 2
    assert len(trials(items, fold="A")) == len(trials(items, fold="B")) == 2 * 1 * 2
    names = list(items)
    assert all(names.index(need) < names.index(item.name) for item in items.values() for need in item.needs)


def test_label_free_stages_are_run_once_and_others_for_each_budget_or_fold():
    names = [name for name in plan(table(other_organs=OTHERS)) if name.startswith("pretrain/")]
    assert sorted(names) == sorted(
        ["pretrain/reconstruction", "pretrain/identity", "pretrain/known-A", "pretrain/known-B"]
        + [f"pretrain/{stage}-n{n}-s{s}" for stage in ("mixcl", "supervised") for n in (1, 4) for s in (0, 1)]
    )


def test_a_trial_and_its_label_stage_have_one_budget_and_a_label_free_stage_has_none():
    items = plan(table())
    trial = items["trial/mixcl-n4-s1"]
    budget = {"budget.scans": 4, "budget.seed": 1, "budget.fraction": 0.0}
    assert trial.start == "pretrain/mixcl-n4-s1"
    assert budget.items() <= trial.settings.items() and budget.items() <= items[trial.start].settings.items()
    assert items[trial.start].start == "pretrain/identity"
    assert {"budget.scans": None, "budget.fraction": 0.0}.items() <= items["pretrain/identity"].settings.items()


def test_a_label_stage_orders_scans_by_the_classes_that_its_trials_learn():
    items = plan(replace(table(), {"finetune.classes": ["liver"]}))
    assert items["pretrain/mixcl-n1-s0"].settings["budget.classes"] == ["liver"]
    assert "budget.classes" not in items["pretrain/identity"].settings
    assert "budget.classes" not in plan(table())["pretrain/mixcl-n1-s0"].settings


def test_of_other_organs_pretraining_knows_some_and_fine_tuning_learns_the_rest():
    items = plan(table(other_organs=OTHERS))
    trial = items["trial/A/transfer-n1-s0"]
    assert trial.settings["finetune.classes"] == ["spleen"]
    before = items[trial.start].settings
    assert before["budget.classes"] == ["liver"] and before["budget.fraction"] == 1.0
    assert items["trial/A/scratch-n1-s0"].settings["finetune.classes"] == ["spleen"]


def test_what_tells_most_comes_first_seed_by_seed():
    cells = [(i.arm, i.scans, i.seed) for i in plan(table(other_organs=OTHERS)).values() if i.kind == "trial"]
    assert cells[:4] == [("scratch", 1, 0), ("mixcl", 1, 0), ("scratch", 1, 1), ("mixcl", 1, 1)]
    assert {scans for _, scans, _ in cells[:16]} == {1} and {scans for _, scans, _ in cells[-10:]} == {4}


def test_scratch_may_see_as_many_voxels_as_pretraining_and_fine_tuning_together():
    config = replace(
        table(),
        {"pretrain.steps": 100, "pretrain.batch_size": 8, "views.size": [16, 16, 16]}
        | {"finetune.steps": 50, "finetune.batch_size": 1, "finetune.patch_size": [32, 32, 32]},
    )
    steps = plan(config)["trial/longer-n1-s0"].settings["finetune.steps"]
    assert steps == 50 + 2 * (100 * 8 * 2 * 16**3) // 32**3  # both stages: identity and mixcl


def test_a_pretraining_has_to_pass_the_gate_unless_it_is_the_measure_or_supervised():
    items = plan(table())
    assert items["probe/random"].needs == ()
    assert items["trial/mixcl-n1-s1"].gate == ("probe/mixcl-n1-s0", "probe/random", "probe/reconstruction")
    for arm in ("scratch", "reconstruction", "supervised"):
        assert items[f"trial/{arm}-n1-s1"].gate == ()
    assert not [name for name in plan(table(baselines=[])) if name.startswith("probe/")]


def test_the_recipe_has_the_arms_of_the_question():
    config = load(recipe="few_label")
    items = plan(config)
    arms = {"scratch", "scratch_total", "reconstruction", "identity", "label", "mixcl", "supervised"}
    assert set(config.table.arms) == arms
    assert len(trials(items, fold="")) == 7 * 4 * 10
    for fold in ("A", "B"):
        assert len(trials(items, fold=fold)) == 3 * 2 * 10
    assert config.finetune.steps >= 20 * config.finetune.curve_every  # a third of them can be told from a half
    pairs = {(arm, reference) for arm, reference in config.table.compared}
    assert pairs == {("mixcl", each) for each in arms - {"mixcl", "scratch"}}
    assert config.table.other_organs.compared == (("mixcl", "supervised"),)
    for item in items.values():
        replace(config, {k: v for k, v in item.settings.items() if not k.endswith(".classes")})  # no unknown key


@pytest.mark.parametrize("smaller", [None, Path(__file__).parents[4] / "benchmarks" / "few_label" / "cpu.yaml"])
def test_the_recipe_gives_a_single_term_as_many_steps_as_all_terms_have(smaller):
    """Also with the settings for a CPU, which leave all else of the stages as it is, but for a shorter reconstruction:
    the gate's baseline alone, as no trial starts from it there."""
    config = load(*filter(None, [smaller]), recipe="few_label")
    items = plan(config)
    steps = {
        name: replace(config, items[name].settings).pretrain.steps
        for name in ("pretrain/identity", "pretrain/mixcl-n1-s0", "pretrain/label-n1-s0")
    }
    assert items["pretrain/mixcl-n1-s0"].start == "pretrain/identity" and items["pretrain/label-n1-s0"].start is None
    assert steps["pretrain/label-n1-s0"] == steps["pretrain/identity"] + steps["pretrain/mixcl-n1-s0"]
    whole = load(recipe="few_label").table.stages
    shorter = {"reconstruction": {"pretrain.steps"}} if smaller else {}
    assert {name: stage.settings.keys() for name, stage in config.table.stages.items()} == {
        name: stage.settings.keys() | shorter.get(name, set()) for name, stage in whole.items()
    }


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"arms": {}}, "table.arms is empty.*--recipe few_label"),
        ({"arms": {"mixcl": {"stage": "mixcl"}}}, "arm scratch is missing"),
        ({"arms": ARMS | {"x": {"stage": "nothing"}}}, "table.arms.x: nothing is no stage; stages: reconstruction"),
        ({"arms": ARMS | {"x": {"stage": "known"}}}, "table.arms.x: stage known reads .*exceeds its trials' budget"),
        ({"first_arms": ["scratch", "mixxcl"]}, "table.first_arms: mixxcl is no arm; arms: scratch"),
        ({"compared": [["mixcl", "nobody"]]}, "table.compared: nobody is no arm; arms: scratch, mixcl"),
        ({"compared": [["mixcl", "mixcl"]]}, "table.compared: mixcl cannot be compared with itself"),
        ({"other_organs": OTHERS | {"compared": [["mixcl", "scratch"]]}}, "other_organs.compared: mixcl is no arm"),
        ({"baselines": ["supervised"]}, "table.baselines: supervised reads labels"),
        ({"stages": STAGES | {"mixcl": {"start": "nowhere"}}}, "stages.mixcl: starts from nowhere"),
        ({"stages": STAGES | {"identity": {"start": "mixcl"}}}, "starts from itself, by"),
        ({"other_organs": OTHERS | {"folds": {"A": {"known": ["liver"], "new": ["liver"]}}}}, "liver is known and new"),
        ({"other_organs": OTHERS | {"arms": ARMS}}, "other_organs.arms.mixcl: stage mixcl reads labels of new organs"),
    ],
)
def test_arms_that_make_no_table_are_refused_in_one_line(changes, line):
    with pytest.raises(ConfigError, match=line) as refusal:
        plan(table(**changes))
    assert "\n" not in str(refusal.value)


def test_a_misspelt_key_of_an_arm_is_refused():
    with pytest.raises(ConfigError, match=r"table\.arms\.mixcl\.stagee"):
        table(arms={"scratch": {}, "mixcl": {"stagee": "mixcl"}})
