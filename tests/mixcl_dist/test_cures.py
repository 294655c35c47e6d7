"""What is refused can be mended as its message says: each cure is followed, to the letter where it gives a value."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from mixcl_dist import cli
from mixcl_dist.arguments import parse
from mixcl_dist.config import from_dict, load
from mixcl_dist.finetuning.task import budgeted, open_task
from mixcl_dist.manual import manual
from mixcl_dist.networks.architectures import check_patches
from mixcl_dist.pretraining.pretrain import check_settings
from mixcl_dist.run import begin, held
from mixcl_dist.studies.search import check_search
from mixcl_dist.studies.table.plan import plan

from .cures import refused


@dataclass(frozen=True)
class Scan:
    name: str
    split: str = "training"
    reliable: tuple[str, ...] = ("liver",)
    dataset: str = "phantom"


MANIFEST: Any = SimpleNamespace(
    patch_size=(24, 24, 24),
    classes=("liver", "aorta"),
    cases=[Scan(name) for name in "abcd"] + [Scan("v", "validation"), Scan("u", "unlabelled", ())],
)
FITS = {"views.size": "16,16,16", "network.filters": "4,6,8", "finetune.patch_size": "24,24,24"}


def pretraining(given):
    check_settings(load(overrides=list((FITS | given).items())), MANIFEST)


def patches(given):
    check_patches(load(overrides=list(given.items())).network, MANIFEST.patch_size)


def searching(given):
    check_search(load(overrides=list((FITS | given).items())))


def table(given):
    recipe = given.get("recipe")
    plan(load(recipe=recipe, overrides=[item for item in given.items() if item[0] != "recipe"]))


def arms(**changed):
    """A sound table of two arms, changed."""
    content = {"arms": {"scratch": {}, "mixcl": {"stage": "one"}}, "stages": {"one": {}}, "baselines": ["random"]}
    return {"table": content | changed}


def of_tree(given):
    plan(from_dict(given))


def folds(**organs):
    return arms(other_organs={"folds": {"A": organs}})


class Fault(NamedTuple):
    check: Callable[[Any], None]
    given: Any
    said: str
    """Pattern of the message; its group is a value that the cure gives."""
    cured: Any
    """The same as the message says; "{}" stands for that value."""


SEARCH = {"budget.development": "a,b", "study.fractions": "0.5", "study.seeds": "0"}
RATE = "{finetune.learning_rate: %s}"
STOPPING = SEARCH | {"study.stopping": "asha", "study.search": RATE % "{grid: [0.1]}"}
STEPS = {"finetune.steps": "1000", "finetune.curve_every": "250", "study.grace_steps": "250"}


def search_of(wrong, said, right):
    return Fault(searching, SEARCH | {"study.search": wrong}, said, SEARCH | {"study.search": right})


FAULTS = {
    "name twice": Fault(
        pretraining, {"budget.classes": "liver,liver"}, "liver comes twice; leave one out", {"budget.classes": "liver"}
    ),
    "window falls": Fault(
        pretraining, {"network.window_hu": "100,-100"}, "give the lower one first", {"network.window_hu": "-100,100"}
    ),
    "window of one value": Fault(
        pretraining, {"network.window_hu": "4,4"}, "give the lower one and a higher one", {"network.window_hu": "4,5"}
    ),
    "nothing to learn": Fault(
        pretraining,
        {"objective.voxel_identity": "0", "objective.voxel_label": "0", "objective.crop_identity": "0",
         "objective.reconstruction": "0"},
        "nothing would be learned; give one term a weight",
        {"objective.voxel_identity": "1", "objective.voxel_label": "0", "objective.crop_identity": "0",
         "objective.reconstruction": "0"},
    ),
    "two budgets": Fault(
        pretraining, {"budget.fraction": "0.5", "budget.scans": "1"}, "are both given; set one of them",
        {"budget.scans": "1"},
    ),
    "nothing restored": Fault(
        pretraining, {"objective.masked_weight": "0", "views.mask_fraction": "1"}, "change one of them",
        {"objective.masked_weight": "0"},
    ),
    "misspelt key": Fault(
        pretraining, {"pretrain.step": "3"}, r"unknown key pretrain.step; did you mean (.*)\?$", {"{}": "3"}
    ),
    "misspelt recipe": Fault(table, {"recipe": "few_lable"}, r"did you mean (.*)\?$", {"recipe": "{}"}),
    "open bracket": Fault(
        pretraining, {"budget.development": "[a"}, "not a YAML value; close what it opens",
        {"budget.development": "[a]"},
    ),
    "view of a wrong size": Fault(
        pretraining, {"views.size": "18,18,18"}, "views.size 18,18,18: .*; try (.*), or change", {"views.size": "{}"}
    ),
    "large view": Fault(
        pretraining, {"views.size": "32,32,32"}, "views.size 32,32,32 .* patches of (.*); give at most that",
        {"views.size": "{}"},
    ),
    "deep network": Fault(
        patches, {"network.filters": "2,2,2,2,2,2"}, "build shards .* or give fewer (network.filters)",
        {"{}": "2,2,2,2"},
    ),
    "network of one depth": Fault(
        patches, {"network.architecture": "swin_unetr", "network.filters": "12,12,24,48,96,192"},
        "build shards .* or change (network.architecture)", {"{}": "segresnet", "network.filters": "8,16,32"},
    ),
    "view for a network of one depth": Fault(
        pretraining, {"network.architecture": "swin_unetr", "network.filters": "12,12,24,48,96,192"},
        "views.size 16,16,16: .*, or change (network.architecture)", {"{}": "segresnet", "network.filters": "8,16,32"},
    ),
    "batch and parts": Fault(
        pretraining, {"pretrain.batch_size": "8", "engine.accumulation_steps": "3"}, r"give e\.g\. (\d+)$",
        {"pretrain.batch_size": "{}", "engine.accumulation_steps": "3"},
    ),
    "probe of nothing": Fault(
        pretraining, {"pretrain.probe_every": "5"}, "no two scans in budget.development to probe on; name some",
        {"pretrain.probe_every": "5", "budget.development": "a,b"},
    ),
    "unknown class": Fault(
        pretraining, {"budget.classes": "livre"}, "choose among (liver), aorta$", {"budget.classes": "{}"}
    ),
    "development case that is not there": Fault(
        pretraining, {"budget.development": "a,x"}, "no case x; leave it out", {"budget.development": "a"}
    ),
    "development case to validate on": Fault(
        pretraining, {"budget.development": "v"}, "keep back training cases only", {"budget.development": "a"}
    ),
    "label term without labels": Fault(
        pretraining, {"objective.voxel_identity": "0", "objective.crop_identity": "0", "objective.reconstruction": "0"},
        "no labels may be read; give (--budget.scans)$",
        {"objective.voxel_identity": "0", "objective.crop_identity": "0", "objective.reconstruction": "0",
         "budget.scans": "1"},
    ),
    "too many scans": Fault(pretraining, {"budget.scans": "9"}, r"give at most (\d+)$", {"budget.scans": "{}"}),
    "unknown data set": Fault(
        pretraining, {"budget.full_datasets": "x"}, "x is not in the shards; choose among (.*)$",
        {"budget.full_datasets": "{}"},
    ),
    "search on validation scans": Fault(
        searching, {"study.search": RATE % "{grid: [0.1]}"}, "name training scans to choose on in (budget.development)",
        {"study.search": RATE % "{grid: [0.1]}", "{}": "a,b"},
    ),
    "method without search": Fault(searching, {"study.method": "tpe"}, "study.method tpe: .* or leave it out$", {}),
    "search over cells": Fault(
        searching, STOPPING | STEPS | {"study.seeds": "0,1"}, "give one of study.fractions and one of study.seeds",
        STOPPING | STEPS | {"study.seeds": "1"},
    ),
    "stopping by seconds": Fault(
        searching, STOPPING | STEPS | {"study.objectives": "dice,seconds"}, "leave seconds or study.stopping out",
        STOPPING | STEPS | {"study.objectives": "dice"},
    ),
    "grace between points": Fault(
        searching, STOPPING | STEPS | {"study.grace_steps": "300"}, r"every (\d+) steps .*; give a multiple of it",
        STOPPING | STEPS | {"study.grace_steps": "{}"},
    ),
    "grace to the end": Fault(
        searching, STOPPING | STEPS | {"study.grace_steps": "1000"}, "ends at step 1000 .*; give fewer",
        STOPPING | STEPS | {"study.grace_steps": "750"},
    ),
    "steps searched and stopped": Fault(
        searching, STOPPING | STEPS | {"study.search": "{finetune.steps: {grid: [500]}}"},
        "other finetune.steps cannot be compared on their way; leave it out",
        STOPPING | STEPS | {"study.search": RATE % "{grid: [0.1]}"},
    ),
    "difference of draws": Fault(
        searching, SEARCH | {"study.search": RATE % "{grid: [0.1]}", "study.smallest_difference": "0.01"},
        "leave it or study.search out", SEARCH | {"study.search": RATE % "{grid: [0.1]}"},
    ),
    "no range": search_of(
        RATE % "{around: [0, 1]}", r"is not one of \{uniform: \[low, high\]\}", RATE % "{uniform: [0.1, 1]}"
    ),
    "no list": search_of(RATE % "{grid: 0.1}", "grid needs a list of values", RATE % "{grid: [0.1]}"),
    "range falls": search_of(RATE % "{uniform: [1, 0.1]}", "give the lower edge first", RATE % "{uniform: [0.1, 1]}"),
    "no logarithm": search_of(RATE % "{loguniform: [0, 1]}", "edge above 0", RATE % "{loguniform: [0.01, 1]}"),
    "number as text": search_of(
        RATE % "{loguniform: [1e-4, 1]}", r"two numbers, as 0\.001 or (1\.0e-3), not", RATE % "{loguniform: [{}, 1]}"
    ),
    "no condition": search_of(
        "{finetune.steps: {grid: [5]}, finetune.coarse_fraction: {grid: [0.1], when: 5}}",
        r"when needs one \{key: value\}",
        "{finetune.steps: {grid: [5]}, finetune.coarse_fraction: {grid: [0.1], when: {finetune.steps: 5}}}",
    ),
    "condition looks ahead": search_of(
        "{finetune.coarse_fraction: {grid: [0.1], when: {finetune.steps: 5}}, finetune.steps: {grid: [5]}}",
        "move it up",
        "{finetune.steps: {grid: [5]}, finetune.coarse_fraction: {grid: [0.1], when: {finetune.steps: 5}}}",
    ),
    "condition that never holds": search_of(
        "{finetune.steps: {grid: [5]}, finetune.coarse_fraction: {grid: [0.1], when: {finetune.steps: 6}}}",
        r"never is 6; its values: \[(5)\]",
        "{finetune.steps: {grid: [5]}, finetune.coarse_fraction: {grid: [0.1], when: {finetune.steps: {}}}}",
    ),
    "search of what is not read": search_of(
        "{table.margin: {grid: [0.1]}}", "search settings of finetune", "{finetune.steps: {grid: [5]}}"
    ),
    "search of a wrong size": search_of(
        "{finetune.patch_size: {grid: [[18, 18, 18]]}}", "; try (.*), or change",
        "{finetune.patch_size: {grid: [[{}]]}}"
    ),
    "no table": Fault(table, {}, "nothing to compare; give --recipe (few_label)$", {"recipe": "{}"}),
    "section without keys": Fault(
        of_tree, {"table": 3}, "a section with keys is needed, not 3; see `mixcl config show table`$", arms()
    ),
    "no scratch": Fault(
        of_tree, arms(arms={"mixcl": {"stage": "one"}}), "add scratch: {}",
        arms(arms={"mixcl": {"stage": "one"}, "scratch": {}}),
    ),
    "arm without its stage": Fault(
        of_tree, arms(arms={"scratch": {}, "mixcl": {"stage": "on"}}), "on is no stage; stages: (one)$",
        arms(arms={"scratch": {}, "mixcl": {"stage": "{}"}}),
    ),
    "arm that reads all labels": Fault(
        of_tree, arms(stages={"one": {"labels": "all"}}), "exceeds its trials' budget; give another stage",
        arms(stages={"one": {"labels": "budget"}}),
    ),
    "first arm is none": Fault(of_tree, arms(first_arms=["x"]), "arms: (scratch), mixcl$", arms(first_arms=["{}"])),
    "baseline is none": Fault(of_tree, arms(baselines=["x"]), "stages: (random), one$", arms(baselines=["{}"])),
    "baseline reads labels": Fault(
        of_tree, arms(stages={"one": {"labels": "budget"}}, baselines=["random", "one"]), "must not: leave it out",
        arms(stages={"one": {"labels": "budget"}}),
    ),
    "stage from nowhere": Fault(
        of_tree, arms(stages={"one": {}, "two": {"start": "x"}}), "x, which is no stage; stages: (one), two$",
        arms(stages={"one": {}, "two": {"start": "{}"}}),
    ),
    "stages in a ring": Fault(
        of_tree, arms(stages={"one": {"start": "two"}, "two": {"start": "one"}}), "leave one of these starts out",
        arms(stages={"one": {}, "two": {"start": "one"}}),
    ),
    "arm against itself": Fault(
        of_tree, arms(compared=[["mixcl", "mixcl"]]), "compared with itself; give another arm",
        arms(compared=[["mixcl", "scratch"]]),
    ),
    "pair of no arm": Fault(
        of_tree, arms(compared=[["mixcl", "x"]]), "x is no arm; arms: (scratch), mixcl",
        arms(compared=[["mixcl", "{}"]])
    ),
    "organ known and new": Fault(
        of_tree, folds(known=["a", "b"], new=["b"]), "b is known and new; leave it out of one",
        folds(known=["a"], new=["b"])
    ),
    "no new organs": Fault(of_tree, folds(known=["a"], new=[]), "name some of both", folds(known=["a"], new=["b"])),
}  # fmt: skip


def filled(cured: Any, value: str) -> Any:
    """`cured` with the value that the message gives."""
    if isinstance(cured, dict):
        return {filled(key, value): filled(content, value) for key, content in cured.items()}
    if isinstance(cured, list):
        return [filled(content, value) for content in cured]
    return cured.replace("{}", value) if isinstance(cured, str) else cured


@pytest.mark.parametrize("name", FAULTS)
def test_the_cure_that_is_said_helps(name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    fault = FAULTS[name]
    value = refused(fault.said, fault.check, fault.given)
    fault.check(filled(fault.cured, value) if value else fault.cured)


FINETUNE = ["finetune", "--data", "d", "--from", "none", "--run", "r"]
WORDS = {
    "misspelt option": ([*FINETUNE, "--scan", "4"], r"did you mean (--scans)\?", [*FINETUNE, "{}", "4"]),
    "one setting twice": (
        [*FINETUNE, "--seed", "1", "--budget.seed", "2"], "give one of them", [*FINETUNE, "--seed", "1"]
    ),
    "no value": ([*FINETUNE, "--budget.seed"], "--budget.seed needs a value", [*FINETUNE, "--budget.seed", "2"]),
    "no count": (
        ["table", "--data", "d", "--shards", "s", "--out", "o", "--workers", "0"], "give 1 or more",
        ["table", "--data", "d", "--shards", "s", "--out", "o", "--workers", "1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_that_are_not_understood_can_be_said_so_that_they_are(name, capsys):
    words, said, cured = WORDS[name]
    with pytest.raises(SystemExit):
        parse(cli._parser(), words)
    found = re.search(said, capsys.readouterr().err.strip().splitlines()[-1])
    assert found
    assert parse(cli._parser(), filled(cured, found[1] if found.groups() else "")).verb


def test_a_file_of_settings_is_mended_as_it_is_said(tmp_path):
    file = tmp_path / "own.yaml"
    refused("give the path of a YAML file", load, file)
    file.write_text("budget: {scans: 1")
    refused("not valid YAML: .* line 1, column 18: .*; mend it there", load, file)
    file.write_text("[budget]")
    refused("holds list, not sections; see `mixcl config show`", load, file)
    file.write_text(manual(load(), []))
    assert load(file) == load()
    refused("sections: .*budget.*", manual, load(), [], "budgets")


def test_a_trial_s_budget_and_classes_are_mended_as_it_is_said(data):
    def asked(given):
        config = load(overrides=list(given.items()))
        return budgeted(open_task(data, config), config.budget)

    refused("nothing to learn from; give --scans or --labels", asked, {})
    assert parse(cli._parser(), [*FINETUNE, "--scans", "1"]).overrides == [("budget.scans", "1")]
    assert len(asked({"budget.scans": "1"})) == 1
    organ = refused(r"choose among (\w+)", asked, {"budget.scans": "1", "finetune.classes": "x"})
    assert asked({"budget.scans": "1", "finetune.classes": organ})


def test_a_folder_that_is_refused_is_free_by_what_is_said(tmp_path):
    (tmp_path / "note.txt").touch()
    refused("holds other files; give an empty or new folder", begin, tmp_path)
    begin(tmp_path / "new")
    lock = tmp_path / "new" / ".lock"
    lock.write_text("elsewhere 17")

    def work(folder):
        with held(folder, "--run"):
            pass

    path = refused("if it runs no more, delete (.*), or give another --run$", work, tmp_path / "new")
    assert path == str(lock)
    lock.unlink()
    work(tmp_path / "new")
