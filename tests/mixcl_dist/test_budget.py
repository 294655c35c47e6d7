"""Label budgets: whose labels may be used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from mixcl_dist.budget import budget_cases, check_development
from mixcl_dist.config import ConfigError, load
from mixcl_dist.data_shards.sources import open_source
from mixcl_dist.settings import BudgetConfig

ORGANS = ("liver", "spleen", "aorta", "larynx")


@dataclass(frozen=True)
class Case:
    name: str
    split: str
    reliable: tuple[str, ...]
    dataset: str = "phantom"


def drawn(cases, fraction, seed):
    return budget_cases(cases, BudgetConfig(fraction, seed))


def cohort():
    training = [Case(f"t{n:03d}", "training", (ORGANS[n % 3],)) for n in range(60)]
    training[41] = Case("t041", "training", ("larynx",))
    others = [
        Case("v000", "validation", ORGANS),
        Case("u000", "unlabelled", ()),
        Case("t900", "training", ()),
    ]
    return training + others


@pytest.mark.parametrize("seed", range(5))
def test_budgets_of_one_seed_are_nested(seed):
    budgets = [drawn(cohort(), fraction, seed) for fraction in (0, 0.05, 0.1, 0.5, 1)]
    assert [len(names) for names in budgets] == [0, 3, 6, 30, 60]
    for small, large in pairwise(budgets):
        assert large[: len(small)] == small


def test_only_labelled_training_cases_are_in_a_budget():
    assert set(drawn(cohort(), 1.0, 0)) == {f"t{n:03d}" for n in range(60)}


@pytest.mark.parametrize("seed", range(10))
def test_every_class_comes_first(seed):
    reliable = {case.name: case.reliable for case in cohort()}
    first = drawn(cohort(), 4 / 60, seed)
    assert {name for case in first for name in reliable[case]} == set(ORGANS)


def test_seeds_differ_and_the_order_of_cases_on_disk_does_not_matter():
    assert drawn(cohort(), 0.2, 0) != drawn(cohort(), 0.2, 1)
    assert drawn(cohort()[::-1], 0.2, 0) == drawn(cohort(), 0.2, 0)


def test_a_share_is_not_rounded_up_by_floating_point():
    cases = [Case(f"c{n}", "training", ("liver",)) for n in range(100)]
    assert len(drawn(cases, 0.07, 0)) == 7  # 0.07 * 100 > 7 in binary
    assert len(drawn(cases, 0.071, 0)) == 8


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_fractions_of_one_seed_are_nested(seed):
    of_counts = [budget_cases(cohort(), BudgetConfig(scans=count, seed=seed)) for count in (1, 2, 4, 9, 60)]
    assert [len(names) for names in of_counts] == [1, 2, 4, 9, 60]
    assert all(large[: len(small)] == small for small, large in pairwise(of_counts))
    assert of_counts[-1] == drawn(cohort(), 1.0, seed)


def test_more_scans_than_are_labelled_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"budget.scans 61: phantom has 60 labelled .*at most 60"):
        budget_cases(cohort(), BudgetConfig(scans=61))
    development = tuple(drawn(cohort(), 1.0, 0)[:2])
    with pytest.raises(ConfigError, match=r"budget.scans 59: phantom has 58"):
        budget_cases(cohort(), BudgetConfig(scans=59, development=development))
    archive = [Case("a0", "training", ())]
    assert budget_cases(archive, BudgetConfig(scans=4)) == []  # a site that annotates nothing has no budget to exceed


def test_development_cases_are_in_no_budget_and_leave_the_draw_to_the_others():
    development = tuple(drawn(cohort(), 1.0, 0)[:20])
    others = [case for case in cohort() if case.name not in development]
    budget = BudgetConfig(fraction=0.5, development=development)
    assert budget_cases(cohort(), budget) == drawn(others, 0.5, 0)
    assert len(budget_cases(cohort(), replace(budget, fraction=1.0))) == 40


def test_a_budget_of_classes_is_drawn_from_the_cases_that_annotate_them():
    names = budget_cases(cohort(), BudgetConfig(fraction=1.0, classes=("liver", "larynx")))
    annotating = {case.name for case in cohort()[:60] if {"liver", "larynx"} & set(case.reliable)}
    assert set(names) == annotating
    assert "t041" in names[:2]  # the only larynx comes early, as every class does
    assert budget_cases(cohort(), BudgetConfig(scans=9)) == budget_cases(
        cohort(), BudgetConfig(scans=9, classes=ORGANS)
    )


@pytest.mark.parametrize(("name", "said"), [("t061", "no case t061"), ("v000", "v000 is in the validation split")])
def test_only_training_cases_are_kept_back_for_development(name, said):
    check_development(cohort(), ["t001", "t900"])
    with pytest.raises(ConfigError, match=said):
        check_development(cohort(), ["t001", name])


def test_the_development_list_of_openkbp_is_the_rule_s_outcome(ct):
    training = [case.name for case in open_source(ct / "openkbp").cases if case.split == "training"]
    order = sorted(training, key=lambda name: hashlib.sha256(f"development:{name}".encode()).digest())
    budget = load(recipe="few_label").budget
    assert budget.development == tuple(order[:24])
    check_development(open_source(ct / "openkbp").cases, budget.development)
