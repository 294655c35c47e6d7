"""Label budgets, and the check that a pre-training run kept to a trial's budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from mixcl_dist.budget import budget_cases, leak

ORGANS = ("liver", "spleen", "aorta", "larynx")


@dataclass(frozen=True)
class Case:
    name: str
    split: str
    reliable: tuple[str, ...]


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
    budgets = [budget_cases(cohort(), fraction, seed) for fraction in (0, 0.05, 0.1, 0.5, 1)]
    assert [len(names) for names in budgets] == [0, 3, 6, 30, 60]
    for small, large in pairwise(budgets):
        assert large[: len(small)] == small


def test_only_labelled_training_cases_are_in_a_budget():
    assert set(budget_cases(cohort(), 1.0, 0)) == {f"t{n:03d}" for n in range(60)}


@pytest.mark.parametrize("seed", range(10))
def test_every_class_comes_first(seed):
    reliable = {case.name: case.reliable for case in cohort()}
    first = budget_cases(cohort(), 4 / 60, seed)
    assert {name for case in first for name in reliable[case]} == set(ORGANS)


def test_seeds_differ_and_the_order_of_cases_on_disk_does_not_matter():
    assert budget_cases(cohort(), 0.2, 0) != budget_cases(cohort(), 0.2, 1)
    assert budget_cases(cohort()[::-1], 0.2, 0) == budget_cases(cohort(), 0.2, 0)


def test_a_share_is_not_rounded_up_by_floating_point():
    cases = [Case(f"c{n}", "training", ("liver",)) for n in range(100)]
    assert len(budget_cases(cases, 0.07, 0)) == 7  # 0.07 * 100 > 7 in binary
    assert len(budget_cases(cases, 0.071, 0)) == 8


def facts(label_cases, training_cases=()):
    return {"label_cases": list(label_cases), "training_cases": list(training_cases)}


def test_a_smaller_budget_of_the_same_seed_is_no_leak():
    small, large = (budget_cases(cohort(), fraction, 0) for fraction in (0.05, 0.15))
    assert leak(facts(small), cohort(), large) is None


def test_labels_outside_the_budget_are_named():
    small, large = (budget_cases(cohort(), fraction, 0) for fraction in (0.05, 0.15))
    problem = leak(facts(large), cohort(), small)
    assert min(set(large) - set(small)) in problem and "--budget.seed" in problem and "\n" not in problem


def test_a_validation_image_is_a_leak_even_without_its_label():
    assert "v000" in leak(facts([], ["t001", "v000"]), cohort(), ["t001"])


def test_labels_of_another_data_set_are_no_leak():
    assert leak(facts(["other_001"], ["other_001"]), cohort(), ["t001"]) is None
