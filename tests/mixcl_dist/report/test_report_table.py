"""The page and the files of a few-label table: what was found, how much of it there is, and what was barred."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import replace as changed

import numpy as np
import pytest
import yaml

from mixcl_dist.jsonfiles import write_json
from mixcl_dist.report import table_text, write_report
from mixcl_dist.report.folders import open_table
from mixcl_dist.report.page import probe_figures
from mixcl_dist.report.table import _sentence, table_results
from mixcl_dist.studies.statistics import mean_difference

from ..tables import CASES, CLASSES, FINISHED, SECTION, dice_of, write_table


@pytest.fixture
def table(tmp_path):
    """A function that makes the folder of a table, of which the trials that `done` accepts are done."""
    return functools.partial(write_table, tmp_path / "table")


def row(results, arm, scans):
    return next(r for r in results.rows if (r.arm, r.scans) == (arm, scans))


def pair(results, arm, scans, reference="scratch"):
    return next(p for p in results.pairs if (p.arm, p.scans, p.reference) == (arm, scans, reference))


def test_differences_are_those_of_the_same_scans_seed_case_and_class(table):
    results = table_results(open_table(table()))
    for reference in ("scratch", "reconstruction"):
        by_hand = []
        for seed in range(5):
            ours, other = (dice_of(arm, 1, seed)["cases"] for arm in ("mixcl", reference))
            values = [
                [(ours[c][k] or np.nan) - (np.nan if other[c][k] is None else other[c][k]) for k in CLASSES]
                for c in CASES
            ]
            by_hand.append(values)
        found = pair(results, "mixcl", 1, reference).difference
        assert found == mean_difference(np.array(by_hand, dtype=float), 500)
        means = [dice_of("mixcl", 1, seed)["mean"] - dice_of(reference, 1, seed)["mean"] for seed in range(5)]
        assert found.mean == pytest.approx(np.mean(means)) and found.seeds == 5 and found.cases == 12


def test_every_arm_is_compared_with_scratch_and_with_what_is_asked_for(table):
    results = table_results(open_table(table()))
    one = [("mixcl", "scratch"), ("reconstruction", "scratch"), ("mixcl", "reconstruction")]
    assert [(p.arm, p.reference) for p in results.pairs] == 2 * one
    folder = table()
    page = write_report(folder).read_text()
    assert page.count("mixcl − reconstruction") == 2 and "all 6 comparisons" in page
    told = json.loads((folder / "table.json").read_text())["results"]["pairs"][2]
    assert (told["arm"], told["reference"]) == ("mixcl", "reconstruction")
    assert 0 < told["difference"]["p"] <= told["p_holm"] and told["difference"]["low"] < told["difference"]["high"]
    assert "1  mixcl − reconstruction: +" in table_text(folder)


def test_only_seeds_that_both_arms_have_are_compared(table):
    results = table_results(open_table(table(lambda item: item.arm == "scratch" or item.seed < 2)))
    mixcl, compared = row(results, "mixcl", 1), pair(results, "mixcl", 1)
    assert (mixcl.done, mixcl.planned, compared.difference.seeds) == (2, 5, 2)
    assert compared.reference_mean == pytest.approx(np.mean([dice_of("scratch", 1, s)["mean"] for s in (0, 1)]))
    assert results.done == 10 + 2 * 2 * 2 and results.planned == 30
    assert "by 18 of 30 planned trials so far" in results.headline


def test_what_other_settings_made_counts_as_planned(table):
    """Also where its files are still there; a probe or a bar of other settings is not shown."""
    folder = table(status=lambda item: "barred" if item.arm == "reconstruction" else None)
    plan_file = folder / "plan.json"
    content = json.loads(plan_file.read_text())
    for item in content["items"]:
        if item["name"] in ("trial/mixcl-n1-s0", "trial/reconstruction-n1-s0", "probe/random"):
            item["digest"] = "another"
    write_json(plan_file, content)
    found = open_table(folder)
    status = {trial.name: trial.status for trial in found.trials}
    assert status["trial/mixcl-n1-s0"] == status["trial/reconstruction-n1-s0"] == "planned"
    assert status["trial/mixcl-n1-s1"] == "done" and status["trial/reconstruction-n1-s1"] == "barred"
    results = table_results(found)
    assert row(results, "mixcl", 1).done == pair(results, "mixcl", 1).difference.seeds == 4
    names = {probe["name"] for probe in probe_figures(found)}
    assert "random" not in names and "mixcl-n1-s0" in names


def test_of_a_plan_without_digests_every_record_counts(table):
    folder = table()
    content = json.loads((folder / "plan.json").read_text())
    for item in content["items"]:
        del item["digest"]
    write_json(folder / "plan.json", content)
    assert table_results(open_table(folder)).done == 30


def test_it_is_said_what_each_arm_was_shown_before_and_in_fine_tuning(table):
    """Of a stage that goes on from another, the steps of both."""
    stages = SECTION["stages"] | {
        "mixcl": {"start": "identity", "labels": "budget", "settings": {"pretrain.steps": 70}},
        "supervised": {"labels": "budget", "supervised": True},
    }
    arms = SECTION["arms"] | {"supervised": {"stage": "supervised"}, "longer": {"voxels_of": "mixcl"}}
    folder = table(lambda item: False, SECTION | {"stages": stages, "arms": arms})
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    batch = {"pretrain": {"steps": 300, "batch_size": 4}, "finetune": {"steps": 50, "batch_size": 2}}
    for section, changes in batch.items():
        tree[section] |= changes
    tree["views"]["size"], tree["finetune"]["patch_size"] = [8, 8, 8], [16, 16, 16]
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    found = {t.arm: t for t in table_results(open_table(folder)).training}
    step, crops = 4 * 2 * 8**3, 2 * 16**3
    assert (found["mixcl"].pretrain_steps, found["mixcl"].pretrain_voxels) == (370, 370 * step)
    assert (found["supervised"].pretrain_steps, found["supervised"].pretrain_voxels) == (50, 50 * crops)
    assert (found["scratch"].pretrain_steps, found["scratch"].finetune_voxels) == (0, 50 * crops)
    page = write_report(folder).read_text()
    assert "What each arm’s networks were shown" in page and '<td class="n">370</td>' in page
    assert json.loads((folder / "table.json").read_text())["results"]["training"][1]["pretrain_steps"] == 370


def test_classes_that_were_not_learnt_are_counted(table):
    results = table_results(open_table(table()))
    assert row(results, "scratch", 1).zeros == {"brainstem": 0, "larynx": 0, "esophagus": 2}
    assert row(results, "mixcl", 1).zeros["esophagus"] == 0


def test_a_class_that_no_labelled_scan_shows_is_in_no_figure(table):
    folder = table()
    for run in folder.glob("trial/*-n1-s1"):
        write_json(run / "run.json", FINISHED | {"label_cases": ["t0"], "unshown_classes": ["esophagus"]})
    results = table_results(open_table(folder))
    assert row(results, "scratch", 1).zeros["esophagus"] == 1  # that of seed 3; seed 1 could not learn it
    ours, scratch = ([dice_of(arm, 1, 1)["class_mean"][name] for name in CLASSES[:2]] for arm in ("mixcl", "scratch"))
    whole = [np.subtract(*(dice_of(arm, 1, s)["mean"] for arm in ("mixcl", "scratch"))) for s in (0, 2, 3, 4)]
    expected = np.mean([*whole, np.mean(np.subtract(ours, scratch))])
    assert pair(results, "mixcl", 1).difference.mean == pytest.approx(expected)


def test_steps_to_scratchs_plateau_are_a_share_of_its_own(table):
    speed = pair(table_results(open_table(table())), "mixcl", 1).speed
    assert (speed.ratio, speed.reached, speed.pairs) == (pytest.approx(1 / 3), 5, 5)


def test_p_values_are_adjusted_for_all_comparisons_of_the_table(table):
    results = table_results(open_table(table()))
    assert len(results.pairs) == 6 and all(p.p_holm >= p.difference.p for p in results.pairs)
    assert max(p.p_holm / p.difference.p for p in results.pairs) == pytest.approx(6)


def test_the_headline_is_one_sentence_with_its_interval(table):
    results = table_results(open_table(table()))
    assert results.headline.startswith("With 1 labelled scan, mean Dice was ")
    assert "95 % interval" in results.headline and "5 subset seeds and 12 cases" in results.headline
    assert results.headline.count(". ") == 0 and "cannot tell" not in results.headline
    unsure = changed(pair(results, "mixcl", 1), p_holm=0.2)
    assert _sentence(unsure, "", one_start=True).endswith("which cannot tell whether pre-training helps.")


def test_an_interval_is_said_to_be_of_one_pretraining_where_all_seeds_share_it(table):
    folder = table()
    assert "12 cases, given one label-free pre-training)" in table_results(open_table(folder)).headline
    page = write_report(folder).read_text()
    assert "given the pre-training that all seeds of an arm share" in page
    own = SECTION | {"stages": SECTION["stages"] | {"mixcl": {"labels": "budget"}}}
    assert "pre-training)" not in table_results(open_table(table(section=own))).headline


def test_of_few_seeds_the_headline_claims_nothing(table):
    """However far from 0 the interval is."""
    results = table_results(open_table(table(lambda item: item.seed < 4)))
    assert pair(results, "mixcl", 1).p_holm < 0.05
    assert results.headline.endswith("; fewer than 5 seeds cannot tell whether pre-training helps.")


def test_a_barred_arm_is_reported_with_its_figures(table):
    folder = table(status=lambda item: "barred" if item.arm == "mixcl" else None)
    results = table_results(open_table(folder))
    assert "No trial of mixcl was run" in results.headline and "0.210 is not 0.02 above" in results.headline
    assert "0.210 is not 0.02 above" in table_text(folder)
    page = write_report(folder).read_text()
    assert page.count("barred: trial/mixcl") >= 2 and "10 barred" in page


def test_before_any_pair_has_finished_the_page_says_so(table):
    folder = table(lambda item: False)
    page = write_report(folder).read_text()
    assert "No pair of trials of mixcl and scratch has finished yet" in page and "0 of 30 planned trials" in page


def test_the_files_have_a_row_for_every_planned_trial_and_every_figure(table):
    folder = table(lambda item: item.seed < 3)
    index = write_report(folder)
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == 30 and sum(r["status"] == "done" for r in rows) == 18
    done = next(r for r in rows if r["trial"] == "trial/mixcl-n1-s0")
    assert float(done["dice_larynx"]) == dice_of("mixcl", 1, 0)["class_mean"]["larynx"]
    assert done["steps_to_scratch_plateau"] == "100" and done["hd95_mm"] == "12.5" and done["classes_at_zero"] == "0"
    content = json.loads((folder / "table.json").read_text())
    assert content["planned"] == 30 and content["headline"] in index.read_text().replace("&#39;", "'")
    assert {r["arm"] for r in content["results"]["rows"]} == {"scratch", "mixcl", "reconstruction"}
    assert content["probes"][0]["linear"] == 0.2


def test_nothing_of_a_table_overflows_on_a_telephone(table, width_on_a_telephone):
    assert width_on_a_telephone(write_report(table())) <= 420


def test_the_page_fetches_nothing_and_has_its_figures(table):
    page = write_report(table()).read_text()
    assert "http" not in page and page.count("<svg") == 2
    assert "18 of" not in page and "30 of 30 planned trials" in page


def test_other_organs_are_a_block_of_their_own(table):
    others = {
        "folds": {"A": {"known": ["larynx"], "new": ["brainstem"]}},
        "scans": [1],
        "arms": {"scratch": {}, "mixcl": {"stage": "known"}},
    }
    section = SECTION | {"stages": SECTION["stages"] | {"known": {"labels": "all"}}, "other_organs": others}
    folder = table(section=section)
    results = table_results(open_table(folder))
    assert results.blocks == ["", "A"] and [r.arm for r in results.rows if r.fold == "A"] == ["scratch", "mixcl"]
    assert "Other organs, fold A" in write_report(folder).read_text()
