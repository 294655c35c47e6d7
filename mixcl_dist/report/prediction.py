"""What a prediction found: rows by class and by scan, for its page and its CSV."""

from __future__ import annotations

import statistics
from typing import Any

from mixcl_dist.report.folders import PredictionFolder


def class_rows(folder: PredictionFolder) -> list[dict[str, Any]]:
    """Of every class in how many scans it was found, how much of it, and its mean scores."""
    rows = []
    for name in folder.facts["classes"]:
        found = [case.volume_ml[name] for case in folder.cases if case.volume_ml.get(name)]
        row: dict[str, Any] = {"name": name, "found": len(found), "volume": _spread(found)}
        row["scored"] = sum(case.dice.get(name) is not None for case in folder.cases)
        for score in ("dice", "surface_dice", "hd95_mm"):
            row[score] = (folder.facts[score] or {"class_mean": {}})["class_mean"].get(name)
        rows.append(row)
    return rows


def _spread(values: list[float]) -> str:
    if len(set(values)) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def scan_rows(folder: PredictionFolder) -> list[dict[str, Any]]:
    """Of every scan what was found, those with the lowest mean Dice first, those without scores last."""
    rows = []
    for case in folder.cases:
        dice = [value for value in case.dice.values() if value is not None]
        mean = statistics.fmean(dice) if dice else None
        known = {key: getattr(case, key) for key in ("case", "seconds", "volume_ml", "dice", "surface_dice", "hd95_mm")}
        rows.append(known | {"mean": mean})
    return sorted(rows, key=lambda row: (row["mean"] is None, row["mean"] or 0.0, row["case"]))


def flat_rows(folder: PredictionFolder) -> list[dict[str, Any]]:
    """A row for each scan and class."""
    return [
        {"case": case.case, "class": name, "volume_ml": case.volume_ml.get(name)}
        | {score: getattr(case, score).get(name) for score in ("dice", "surface_dice", "hd95_mm")}
        for case in folder.cases
        for name in folder.facts["classes"]
    ]
