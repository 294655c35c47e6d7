"""The numbers of a report: what the page shows and report.json and report.csv hold. Dice is 0 to 1 here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mixcl_dist.report.folders import RunFolder, Start, StudyFolder, Trial
from mixcl_dist.studies.statistics import Interval, t_interval

SCRATCH = "scratch"
MEAN = "mean"


@dataclass(frozen=True)
class Cell:
    """All finished seeds of one start at one label fraction, for one class or the mean over classes."""

    start: str
    fraction: float
    values: dict[int, float]
    """Dice by subset seed."""
    summary: Interval


@dataclass(frozen=True)
class Comparison:
    """A pre-trained start minus scratch, seed by seed (same label cases, same settings), at one fraction."""

    start: str
    fraction: float
    differences: dict[int, float]
    summary: Interval


@dataclass(frozen=True)
class ClassRow:
    """One class (or the mean over classes) at one fraction: scratch, one pre-trained start, their difference."""

    name: str
    scratch: Cell
    pretrained: Cell
    comparison: Comparison


@dataclass(frozen=True)
class StudyResults:
    classes: list[str]
    fractions: list[float]
    starts: list[str]
    """The arms: scratch first, then the pre-trained ones; several pre-training runs may serve one arm."""
    cells: list[Cell]
    comparisons: list[Comparison]
    per_class: list[ClassRow]
    label_cases: dict[float, list[int]]
    """Number of labelled cases at each fraction, over the seeds."""
    protocol: list[dict[str, Any]]
    draws: int
    """Most draws of searched values that one (start, fraction, seed) had; the best on the scored cases is shown."""


def study_results(study: StudyFolder) -> StudyResults:
    best = _best_trials(study.trials)
    fractions = sorted({trial.row["fraction"] for trial in study.trials})
    starts = list(dict.fromkeys([SCRATCH, *(trial.row["start"] for trial in study.trials)]))
    pretrained = [(start, fraction) for fraction in fractions for start in starts if start != SCRATCH]
    classes = list(dict.fromkeys(name for trial in best for name in trial.row.get("class_mean") or {}))
    return StudyResults(
        classes=classes,
        fractions=fractions,
        starts=starts,
        cells=[_cell(best, start, fraction, MEAN) for fraction in fractions for start in starts],
        comparisons=[_class_row(best, start, fraction, MEAN).comparison for start, fraction in pretrained],
        per_class=[_class_row(best, *arm, name) for arm in pretrained for name in [*classes, MEAN]],
        label_cases={fraction: _label_counts(study.trials, fraction) for fraction in fractions},
        protocol=[_protocol(start, study.trials) for start in study.starts],
        draws=_most_draws(study.trials),
    )


def headline(results: StudyResults) -> list[str]:
    """What was found, in words: one sentence for each fraction and pre-trained start, fewest labels first."""
    sentences = [_sentence(results, comparison) for comparison in results.comparisons]
    if sentences:
        return sentences
    if len(results.starts) > 1:
        return ["No trial has finished yet."]
    return ["Only training from scratch was studied; there is no pre-trained start to compare."]


def _sentence(results: StudyResults, comparison: Comparison) -> str:
    cells = {(cell.start, cell.fraction): cell for cell in results.cells}
    seeds = comparison.differences
    counts = results.label_cases[comparison.fraction]
    cases = f" ({number_range(counts)} {'case' if max(counts) == 1 else 'cases'})" if counts else ""
    name = "pre-training" if len(results.starts) == 2 else f"pre-training {comparison.start}"
    where = f"With {percent(comparison.fraction)} of the labels{cases}"
    summary = comparison.summary
    if summary.mean is None:
        return f"{where}, {name} and scratch have no finished pair of trials yet."
    scratch, pretrained = (
        100 * math.fsum(cells[start, comparison.fraction].values[seed] for seed in seeds) / len(seeds)
        for start in (SCRATCH, comparison.start)
    )
    if summary.excludes_zero:
        verb = "raised" if summary.mean > 0 else "lowered"
        return (
            f"{where}, {name} {verb} mean Dice from {scratch:.1f} to {pretrained:.1f}: {points(summary.mean)} points "
            f"(95 % interval {points(summary.low)} to {points(summary.high)}, {summary.n} pairs)."
        )
    change = (
        f"{where}, mean Dice was {scratch:.1f} from scratch and {pretrained:.1f} with {name}: "
        f"{points(summary.mean)} points"
    )
    if summary.low is None:
        return f"{change} in one pair of trials, too few for an interval."
    return (
        f"{change}, but the 95 % interval ({points(summary.low)} to {points(summary.high)}, {summary.n} pairs) "
        "includes 0: these trials cannot tell whether pre-training helps."
    )


class Line(NamedTuple):
    """For people: an arm at one number or share of labels."""

    labels: str
    arm: str
    trials: str
    """Finished, of those planned where not all are."""
    dice: str
    """Mean (0 to 100) ± standard deviation over seeds; empty where none has finished."""
    gain: str
    """Over scratch, with its 95 % interval, or why there is none."""


def lines(results: StudyResults) -> Iterator[Line]:
    gains = {(comparison.start, comparison.fraction): comparison.summary for comparison in results.comparisons}
    for cell in results.cells:
        gain = gains.get((cell.start, cell.fraction))
        dice = spread(cell.summary.mean, cell.summary.sd)
        told = with_interval(gain.mean, gain.low, gain.high) if gain else ""
        yield Line(percent(cell.fraction), cell.start, str(cell.summary.n), dice, told)


def text_table(results: StudyResults) -> str:
    """Mean Dice (0 to 100) ± standard deviation over seeds, and the paired difference from scratch, as a table."""
    head = f"{'labels':>8}  {'start':<12}  {'mean Dice':>11}  {'seeds':>5}  gain over scratch (95 % interval)"
    rows = [f"{of.labels:>8}  {of.arm:<12}  {of.dice or '–':>11}  {of.trials:>5}  {of.gain}" for of in lines(results)]
    return "\n".join(line.rstrip() for line in (head, *rows))


def spread(mean: float | None, sd: float | None) -> str:
    """Dice as percentage; nothing where there is no mean."""
    return "" if mean is None else f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    """A difference in Dice as percentage points, and its ends where it has them."""
    return points(mean) + ("" if low is None else f" ({points(low)} to {points(high)})")


def points(value: float | None) -> str:
    """A Dice difference as signed percentage points."""
    return "–" if value is None else f"{100 * value:+z.1f}".replace("-", "−")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def number_range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def finetune_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row for each scored case and class of a fine-tuning run; a class not annotated in a case has None."""
    cases = (run.dice or {}).get("cases", {})
    return [
        {"case": case, "class": name, "dice": value} for case, scores in cases.items() for name, value in scores.items()
    ]


def study_rows(study: StudyFolder) -> list[dict[str, Any]]:
    """One row for each trial and class, with the mean over classes last."""
    rows = []
    for trial in study.trials:
        head = {key: trial.row.get(key) for key in ("id", "start", "fraction", "seed", "status", "seconds")}
        scores = (trial.row.get("class_mean") or {}) | {MEAN: trial.row.get("mean")}
        rows += [head | {"class": name, "dice": value} for name, value in scores.items()]
    return rows


def as_json(value: Any) -> Any:
    """Plain JSON values of results: dataclasses opened, keys as text, numbers that are not finite as null."""
    if isinstance(value, Cell | Comparison | ClassRow | StudyResults | Interval):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _best_trials(trials: Iterable[Trial]) -> list[Trial]:
    """The finished trial of each (start, fraction, seed); of several draws the one best on the scored cases."""
    best: dict[tuple[str, float, int], Trial] = {}
    for trial in trials:
        if not _finished(trial):
            continue
        key = (trial.row["start"], trial.row["fraction"], trial.row["seed"])
        if key not in best or trial.row["mean"] > best[key].row["mean"]:
            best[key] = trial
    return list(best.values())


def _finished(trial: Trial) -> bool:
    mean = trial.row.get("mean")
    return trial.row.get("status") == "done" and mean is not None and math.isfinite(mean)


def _cell(trials: Iterable[Trial], start: str, fraction: float, name: str) -> Cell:
    values = {}
    for trial in trials:
        if (trial.row["start"], trial.row["fraction"]) == (start, fraction):
            score = trial.row["mean"] if name == MEAN else (trial.row.get("class_mean") or {}).get(name)
            if score is not None and math.isfinite(score):
                values[trial.row["seed"]] = score
    values = dict(sorted(values.items()))
    return Cell(start, fraction, values, t_interval(list(values.values())))


def _class_row(trials: list[Trial], start: str, fraction: float, name: str) -> ClassRow:
    scratch = _cell(trials, SCRATCH, fraction, name)
    pretrained = _cell(trials, start, fraction, name)
    both = scratch.values.keys() & pretrained.values.keys()
    differences = {seed: pretrained.values[seed] - scratch.values[seed] for seed in sorted(both)}
    comparison = Comparison(start, fraction, differences, t_interval(list(differences.values())))
    return ClassRow(name, scratch, pretrained, comparison)


def _label_counts(trials: Iterable[Trial], fraction: float) -> list[int]:
    """Labelled cases by seed; the starts share them."""
    counts = {
        trial.row["seed"]: len(trial.run.facts["label_cases"])
        for trial in trials
        if trial.row["fraction"] == fraction and trial.run and trial.run.facts.get("label_cases") is not None
    }
    return [counts[seed] for seed in sorted(counts)]


def _most_draws(trials: Sequence[Trial]) -> int:
    keys = [(trial.row["start"], trial.row["fraction"], trial.row["seed"]) for trial in trials]
    return max((keys.count(key) for key in set(keys)), default=0)


def _protocol(start: Start, trials: Iterable[Trial]) -> dict[str, Any]:
    """Which labels and images this start's pre-training had seen, and what of it the trials that used it must not know.

    Names are those of the trials' data set, whatever the start called these scans (`start_saw` in a trial's facts).
    """
    facts = start.run.facts if start.run else {}
    validation: set[str] = set()
    beyond: set[str] = set()
    apart: set[tuple[str, str, float]] = set()
    for trial in trials:
        if trial.run and trial.run.facts.get("start") == start.path:
            own = trial.run.facts
            saw = own.get("start_saw", {})
            validation |= saw.keys() & set(own.get("validation_cases", []))
            read = {case for case, classes in saw.items() if set(classes) & set(own.get("classes", []))}
            beyond |= read - set(own.get("label_cases", []))
            apart |= {(str(case), str(other), float(by)) for case, other, by in own.get("distinct_patients", [])}
    return {
        "start": start.name,
        "found": start.run is not None,
        "images": len(facts.get("training_cases", [])),
        "label_cases": len(facts.get("label_cases", [])),
        "label_cases_beyond_a_trials_budget": sorted(beyond),
        "validation_cases_seen": sorted(validation),
        "told_apart": [f"{case} and {other} ({distance:.4f})" for case, other, distance in sorted(apart)],
    }
