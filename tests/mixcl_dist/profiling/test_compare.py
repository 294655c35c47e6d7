"""One form of result, and when two of them differ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mixcl_dist.errors import RunError
from mixcl_dist.profiling import compare, result


@pytest.fixture
def made():
    def make(samples, better="more", exact=False):
        figure = result.Figure(unit="a unit", better=better, samples=tuple(map(float, samples)), exact=exact)
        here = result.Environment(
            machine="m", python="3", versions={}, commit="c", load_before=0.5, begun="2026-01-01T00:00:00+00:00"
        )
        return result.Result(benchmark="b", command=("b",), environment=here, figures={"f": figure})

    return make


@pytest.mark.parametrize(
    ("before", "after", "better", "verdict"),
    [
        ([100, 101, 99, 100, 102], [150, 151, 149, 150, 152], "more", "better"),
        ([100, 101, 99, 100, 102], [150, 151, 149, 150, 152], "less", "worse"),
        ([100, 101, 99, 100, 102], [50, 51, 49, 50, 52], "more", "worse"),
        ([100.0, 100.1, 99.9, 100, 100.2], [102, 102.1, 101.9, 102, 102.2], "more", "the same"),  # real, and too small
        ([100, 140, 60, 100, 130], [120, 160, 80, 120, 150], "more", "not told apart"),  # large, and within the spread
        ([100, 101, 99, 100, 1], [100, 101, 99, 100, 900], "more", "the same"),  # one sample beyond says nothing
        ([100, 101], [150, 151], "more", "too few samples"),
    ],
)
def test_a_difference_is_beyond_the_spread_and_large_enough_to_matter(made, before, after, better, verdict):
    one, other = made(before, better).figures["f"], made(after, better).figures["f"]
    assert compare.compare(one, other, smallest=0.05).verdict == verdict


def test_equal_distributions_are_hardly_ever_told_apart(made):
    rng = np.random.default_rng(0)
    pairs = [(made(rng.normal(100, 8, 7)).figures["f"], made(rng.normal(100, 8, 7)).figures["f"]) for _ in range(300)]
    verdicts = [compare.compare(one, other, smallest=0.05).verdict for one, other in pairs]
    assert np.mean([verdict in ("better", "worse") for verdict in verdicts]) < 0.02


def test_any_more_of_a_count_is_worse(made):
    one, other = made([1000], "less", exact=True), made([1001], "less", exact=True)
    assert compare.worse(one, other, smallest=0.05) == ["f"] and compare.worse(other, one, smallest=0.05) == []
    assert compare.worse(one, one, smallest=0.05) == []


def test_a_result_is_read_as_it_was_written_and_damage_is_refused_in_one_line(made, tmp_path):
    one = made([1.5, 2, 3])
    one.save(tmp_path)
    assert result.Result.load(tmp_path) == one
    file = tmp_path / "result.json"
    file.write_text(file.read_text().replace('"more"', '"most"'))
    with pytest.raises(RunError, match=r"result\.json.*measure again") as refused:
        result.Result.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_page_says_what_else_differs(made, tmp_path):
    one, other = made([1, 2, 3]), made([10, 20, 30])
    other = dataclasses.replace(other, environment=dataclasses.replace(other.environment, machine="<another>"))
    compare.write_page([one, other], ["a.json", "b.json"], 0.05, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "machine: m | &lt;another&gt;" in page and "20 (10 to 30) a unit, 3" in page and "+900.0%" in page
    assert "b.json against a.json: worse: none; better: f." in page


def test_settings_and_shards_that_differ_are_said_first(made, tmp_path):
    one, other = (
        dataclasses.replace(
            made([1, 2, 3]), conditions={"pretrain.batch_size": size, "shards": "9f", "views.size": "8"}
        )
        for size in ("4", "8")
    )
    assert compare.differing(one, other) == ["pretrain.batch_size: 4 | 8"]
    assert compare.text([one, other], 0.05).startswith("beside the code there differs pretrain.batch_size: 4 | 8\n")
    assert compare.differing(made([1, 2, 3]), other) == []  # an earlier result kept no settings: nothing is known


def test_a_figure_is_shown_by_the_samples_that_its_change_is_of(made):
    one, other = made([100, 101, 99, 900], "less"), made([5, 5.5, 4.5], "less")
    shown = compare.text([one, other], 0.05)
    assert "100 (99 to 101) a unit, 3 of 4  |  5 (4.5 to 5.5) a unit, 3 -95.0% better" in shown
    assert shown.endswith("worse: none; better: f")


def test_what_too_few_samples_tell_is_not_claimed_and_can_be_told_by_more(made):
    shown = compare.text([made([1234567.0]), made([2234567.0])], 0.05)
    assert "1,234,567 a unit  |  2,234,567 a unit +81.0% too few samples" in shown
    assert shown.endswith("worse: none; better: none")  # what is measured once in a run
    assert compare.sentence(made([1, 2]), made([3, 4]), 0.05).endswith("; measure for longer to tell more")
