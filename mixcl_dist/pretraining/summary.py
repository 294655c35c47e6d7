"""What a pre-training was taught by and what came of it, from its facts and metrics. Imports no torch, for the report.

Figures of one step are noisy: what is told is the mean over the first and the last tenth of the logged steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

TERMS = {
    "voxel_identity": "voxel identity",
    "voxel_label": "voxel labels",
    "crop_identity": "crop identity",
    "reconstruction": "reconstruction",
}
LABEL_TERM_OFF = (
    "the label term is off, as the label budget holds no scan; set budget.scans or budget.fraction, "
    "or objective.voxel_label to 0 if that is meant"
)
Metrics = Sequence[Mapping[str, float]]


def told(facts: Mapping[str, Any], metrics: Metrics) -> str:
    """One sentence: what was trained, on what, by which terms, and what it learnt."""
    terms = [_with_anchors(name, facts, metrics) for name in terms_on(metrics)]
    if not terms:
        return "Nothing has been logged yet."
    steps, images = round(metrics[-1]["step"]), len(facts.get("training_cases", []))
    drawn = f" ({round(metrics[-1]['samples']):,} patches drawn)" if "samples" in metrics[-1] else ""
    so_far = "" if facts.get("finished") else " so far"
    taught = f"Trained for {_count(steps, 'step')}{so_far} on {_count(images, 'CT volume')}{drawn} by {_joined(terms)}"
    return f"{taught}: {'; '.join(found)}." if (found := learnt(metrics)) else f"{taught}."


def came_of_plan(facts: Mapping[str, Any], metrics: Metrics) -> list[str]:
    """What `mixcl plan` had said, beside what came of it, a line each; empty without a plan, or before two logs.

    It counts from the first log on, which has the start in it.
    """
    rows = [row for row in metrics if _is_number(row.get("samples")) and _is_number(row.get("seconds"))]
    seconds = sum(row["seconds"] for row in rows[1:])
    if "plan" not in facts or seconds <= 0:
        return []
    plan, patches = facts["plan"], rows[-1]["samples"] - rows[0]["samples"]
    said, rate = plan["patches_per_s"], patches / seconds
    where = "as planned" if said["low"] <= rate <= said["high"] else "outside of what was planned"
    return [
        f"Planned {said['expected']:.3g} patches/s ({said['low']:.3g} to {said['high']:.3g}) on "
        f"{_count(plan['gpus'], 'GPU or process', 'GPUs or processes')}; measured {rate:.3g} over {patches:,.0f} "
        f"patches, {rate / said['expected'] - 1:+.0%}: {where}.",
        f"These took {_time(seconds)}, for which {_time(patches / said['expected'])} were planned.",
    ]


def terms_on(metrics: Metrics) -> list[str]:
    """Terms that had a weight and something to say in some step; the label term needs label anchors."""
    return [name for name in TERMS if any(_is_number(row.get(name)) for row in metrics)]


def label_anchors(metrics: Metrics) -> float | None:
    """Mean number of label anchors of a step; None where the label term had no weight."""
    logged = [row["voxel_label_anchors"] for row in metrics if _is_number(row.get("voxel_label_anchors"))]
    return fmean(logged) if logged else None


def label_term_is_off(metrics: Metrics) -> bool:
    """Whether the label term had a weight and never an anchor."""
    return label_anchors(metrics) == 0


def learnt(metrics: Metrics) -> list[str]:
    """What the terms came to, from the beginning to the end, and what a probe of the features reached."""
    above = [{"label": excess} for row in metrics if (excess := above_floor(row)) is not None]
    found = [
        _change(metrics, "voxel_identity_similarity", "similarity of a voxel's two views"),
        _change(above, "label", "label loss above its floor"),
        _change(metrics, "reconstruction", "reconstruction error"),
    ]
    if probes := [row["probe_linear"] for row in metrics if _is_number(row.get("probe_linear"))]:
        found.append(f"a linear probe of its features reached Dice {100 * probes[-1]:.1f} % on development scans")
    return [text for text in found if text]


def above_floor(row: Mapping[str, float]) -> float | None:
    """The label loss less the least value that the step's positives allow: 0 is all that can be learnt."""
    loss, floor = row.get("voxel_label"), row.get("voxel_label_floor", 0.0)
    return loss - floor if _is_number(loss) and _is_number(floor) else None  # type: ignore[operator]


def chance_levels(facts: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float]:
    """Identity losses of embeddings that are all alike, so that a twin is one of many: ln of the other rows' number.

    For a step whose rows are all present; rows that are known to be of one class are not told apart and lower it a
    little. Empty where `facts` or `config` (nested dictionaries, as in config.yaml) do not say how many rows there are.
    """
    try:
        alone = config.get("objective", {}).get("contrast", "rank") == "rank"  # earlier runs contrasted within ranks
        parts = config["engine"]["accumulation_steps"] * (facts.get("world_size", 1) if alone else 1)
        views = 2 * (config["pretrain"]["batch_size"] // parts)
        rows = views * config["rows"]["per_view_pair"]
        return {"voxel_identity": math.log(rows - 1), "crop_identity": math.log(views - 1)} if views > 2 else {}
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}


def _with_anchors(term: str, facts: Mapping[str, Any], metrics: Metrics) -> str:
    if term != "voxel_label":
        return TERMS[term]
    scans = _count(len(facts.get("label_cases", [])), "scan")
    return f"{TERMS[term]} of {scans} ({label_anchors(metrics) or 0:.0f} label anchors a step)"


def _change(metrics: Metrics, key: str, name: str) -> str | None:
    values = [row[key] for row in metrics if _is_number(row.get(key))]
    tenth = max(1, len(values) // 10)
    return f"{name} {fmean(values[:tenth]):.3g} → {fmean(values[-tenth:]):.3g}" if len(values) > 1 else None


def _count(number: int, noun: str, nouns: str = "") -> str:
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def _time(seconds: float) -> str:
    length, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{seconds / length:.3g} {unit}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
