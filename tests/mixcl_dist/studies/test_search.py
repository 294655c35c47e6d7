"""What may be searched and how the next point is chosen; what cannot be is refused before anything is run."""

from __future__ import annotations

import pytest

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.studies.search import Tpe, check_search, described, heaviest, points

ONE_CELL = {"study.fractions": [1.0], "study.seeds": [0], "budget.development": ["a"]}
RATE = {"finetune.learning_rate": {"loguniform": [1e-4, 1e-2]}}
BASE = {"study.search": RATE} | ONE_CELL


def config(**study):
    return replace(Config(), BASE | {f"study.{key}": value for key, value in study.items()})


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"finetune.learning_rates": {"grid": [1.0]}}, "unknown key .*; did you mean finetune.learning_rate"),
        ({"finetune.learning_rate": {"loguniform": [1e-2, 1e-4]}}, r"\[0.01, 0.0001\] does not rise; give the lower"),
        (
            {"finetune.learning_rate": {"uniform": [0.1, 100]}},
            "finetune.learning_rate = 61.8.*less than or equal to 10",
        ),
        ({"finetune.learning_rate": {"uniform": ["1e-4", 1.0]}}, r"needs two numbers, as 0.001 or 1.0e-3, not"),
        ({"finetune.learning_rate": {"loguniform": [0, 1]}}, "has no logarithm"),
        ({"finetune.batch_size": {"randint": [1.5, 4]}}, "needs two whole numbers"),
        ({"finetune.batch_size": {"uniform": [1, 4]}}, "finetune.batch_size = 2.8.*integer"),
        ({"finetune.batch_size": {"choice": []}}, "choice needs a list of values"),
        ({"finetune.batch_size": {"normal": [0, 1]}}, r"is not one of \{uniform: \[low, high\]\}"),
        ({"pretrain.steps": {"grid": [1]}}, "a trial does not read pretrain.steps"),
        (RATE | {"finetune.batch_size": {"grid": [1], "when": {"finetune.steps": 2}}}, "is not searched before it"),
        (
            {
                "finetune.batch_size": {"grid": [1, 2]},
                "finetune.steps": {"grid": [1], "when": {"finetune.batch_size": 3}},
            },
            r"finetune.batch_size never is 3; its values: \[1, 2\]",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(search, said):
    with pytest.raises(ConfigError, match=said) as refused:
        check_search(config(search=search))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "tpe", "search": {}}, "study.method tpe: there is no study.search"),
        ({"method": "tpe", "seeds": [0, 1]}, "compares points of one cell, but there are 2"),
        ({"stopping": "asha", "grace_steps": 100}, r"Dice is measured every 250 steps \(finetune.curve_every\)"),
        ({"stopping": "asha", "grace_steps": 500}, "a trial ends at step 300"),
        ({"stopping": "asha", "objectives": ["dice", "seconds"]}, "stopping looks at Dice alone"),
        ({"stopping": "median", "search": {"finetune.steps": {"grid": [300, 600]}}}, "cannot be compared on their way"),
        ({"smallest_difference": 0.01}, "compares arms, not draws"),
    ],
)
def test_settings_of_a_search_that_do_not_fit_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        check_search(config(**settings))


def test_settings_of_pre_training_are_searched_where_it_is_run_but_not_by_tpe():
    search = {"objective.voxel_label": {"uniform": [0.0, 1.0]}}
    check_search(config(search=search, samples=4), pretrained_too=True)
    told = "study.method tpe: pre-trainings are run before the first trial, .* search them at random or on a grid"
    with pytest.raises(ConfigError, match=told):
        check_search(config(search=RATE | search, method="tpe"), pretrained_too=True)


@pytest.mark.parametrize("setting", [{"stopping": "pbt"}, {"method": "pbt"}])
def test_population_based_training_is_refused(setting):
    """Its trials would take over each other's checkpoints, so that none could be told by its settings alone."""
    with pytest.raises(ConfigError, match=rf"study.{next(iter(setting))} = 'pbt': Input should be 'none|random'"):
        config(**setting)


def test_objectives_that_nobody_reports_are_refused():
    with pytest.raises(ConfigError, match=r"study.objectives.* = 'accuracy'"):
        config(objectives=["accuracy"])


def test_a_setting_is_drawn_only_where_its_condition_holds():
    search = {
        "finetune.batch_size": {"grid": [1, 2]},
        "finetune.coarse_fraction": {"grid": [0.1, 0.2], "when": {"finetune.batch_size": 2}},
    }
    assert points(config(search=search)) == [
        {"finetune.batch_size": 1},
        {"finetune.batch_size": 2, "finetune.coarse_fraction": 0.1},
        {"finetune.batch_size": 2, "finetune.coarse_fraction": 0.2},
    ]


def test_the_heaviest_points_are_those_of_the_settings_that_memory_depends_on():
    search = RATE | {
        "finetune.batch_size": {"randint": [1, 5]},
        "network.architecture": {"choice": ["unet", "segresnet"]},
        "finetune.spacing_mm": {"grid": [[2.0, 2.0, 2.0]], "when": {"network.architecture": "unet"}},
        "finetune.patch_size": {"grid": [[32] * 3, [64] * 3], "when": {"finetune.learning_rate": 1e-4}},
    }
    found = heaviest(config(search=search, samples=50))
    assert {point["finetune.batch_size"] for point in found} == {4} and len(found) == 4
    assert all("finetune.learning_rate" not in point for point in found)
    assert all(("finetune.spacing_mm" in point) == (point["network.architecture"] == "unet") for point in found)
    assert heaviest(config(search=RATE)) == [{}]


def test_of_many_draws_none_is_left_out_and_of_a_grid_each_point_is_there_once():
    assert len(points(config(search=RATE, samples=2000))) == 2000
    search = {"finetune.batch_size": {"choice": [1, 2]}}
    assert sorted(point["finetune.batch_size"] for point in points(config(search=search, samples=50))) == [1, 2]


def test_the_space_is_printed():
    text = described(config(method="tpe", samples=40, stopping="asha"))
    assert text.splitlines() == [
        "search: 40 draws by tpe, on 1 development scans, for dice",
        "  stopped early by asha, from step 250 of 300",
        "  finetune.learning_rate: loguniform 0.0001 to 0.01",
    ]


def test_it_is_said_where_trials_would_be_judged_while_their_learning_rates_rise():
    search = {"finetune.warmup_fraction": {"uniform": [0.0, 0.5]}}
    often = {"study.stopping": "asha", "finetune.curve_every": 5}
    told = "from step {} of 300, though learning rates rise up to step 150"
    early, late = (replace(config(search=search), often | {"study.grace_steps": steps}) for steps in (145, 150))
    assert told.format(145) in described(early) and "though" not in described(late)


SPACE = {
    "x": {"uniform": [-2.0, 2.0]},
    "kind": {"choice": [[1, 1], [2, 2]]},
    "n": {"randint": [1, 4], "when": {"kind": [2, 2]}},
}


def dice_of(params):
    return max(0.0, 1 - (params["x"] - 1) ** 2 / 9 - (0.1 if params["kind"] == [1, 1] else 0.0))


def run(search, numbers, found):
    for number in numbers:
        params = search.propose(f"p{number}", number)
        found.append((params, dice_of(params)))
        search.tell(f"p{number}", params, {"dice": found[-1][1], "seconds": 1.0}, stopped=False, reports=[])


def test_tpe_goes_on_after_an_interruption_as_it_would_have():
    whole, parts = [], []
    run(Tpe(SPACE, ["dice"]), range(24), whole)
    run(Tpe(SPACE, ["dice"]), range(15), parts)
    again = Tpe(SPACE, ["dice"])
    for number, (params, dice) in enumerate(parts):
        again.tell(f"p{number}", params, {"dice": dice}, stopped=False, reports=[])
    run(again, range(15, 24), parts)
    assert parts == whole
    assert all(("n" in params) == (params["kind"] == [2, 2]) for params, _ in whole)
    assert max(dice for _, dice in whole[10:]) > 0.97, "it comes close to the best by what it has seen"


def test_tpe_learns_from_stopped_trials_and_takes_failed_and_several_objectives():
    search = Tpe(SPACE, ["dice"])
    for number, (stopped, figures) in enumerate([(True, {"dice": 0.1}), (False, {}), (False, {"dice": None})]):
        params = search.propose(f"p{number}", number)
        search.tell(f"p{number}", params, figures, stopped, reports=[(1, 0.1)] if stopped else [])
    several = Tpe(SPACE, ["dice", "seconds"])
    for number in range(12):
        params = several.propose(f"p{number}", number)
        several.tell(f"p{number}", params, {"dice": 0.5, "seconds": 2.0}, stopped=False, reports=[(1, 0.5)])
