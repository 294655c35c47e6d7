"""The rows of a study's table as they stand now: those of `study.json`, and what the ledger has of them since."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mixcl_dist.records import TrialRecord
from mixcl_dist.studies import ledger

LEDGER = "ledger.jsonl"
PROBE = "probe"
"""Item of the ledger that has the share of a GPU which was measured."""


def fold(rows: Iterable[TrialRecord], lines: Iterable[ledger.LedgerRecord]) -> dict[str, TrialRecord]:
    """Rows by id after a ledger's lines, with all that each has reported."""
    found = {row.id: row for row in rows}
    reports = {row.id: list(row.reports) for row in found.values()}
    for line in lines:
        if "trial" in line:
            row = line["trial"]
            found[row.id] = row
            reports.setdefault(row.id, list(row.reports))
        elif line["status"] == "partial" and line["item"] in found and line.get("mean") is not None:
            curve = reports[line["item"]]
            if "step" in line and (not curve or line["step"] > curve[-1][0]):
                curve.append((line["step"], line["mean"]))  # type: ignore[arg-type]
    return {key: dataclasses.replace(row, reports=tuple(reports[key])) for key, row in found.items()}
