"""One self-contained page about a run, a study or a table, with its numbers as CSV and JSON beside it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.report import page
from mixcl_dist.report.folders import (
    PredictionFolder,
    RunFolder,
    TableFolder,
    bare,
    open_folder,
    open_study,
    open_table,
    own,
)
from mixcl_dist.report.prediction import flat_rows
from mixcl_dist.report.results import as_json, finetune_rows, headline, study_results, study_rows, text_table
from mixcl_dist.report.table import not_final, table_results, text_rows, trial_rows


def write_report(path: Path) -> Path:
    """Write `path`/report/{index.html,report.csv,report.json} for the folder of a run, study or prediction; returns
    index.html.

    Of a TABLE folder the numbers go to `path`/table.json and, a row for each planned trial, `path`/table.csv.

    The folder may be unfinished: what is missing is left out and said so. Raises `RunError`, in one line, where
    the folder is no run and no study, where a file in it is broken, or where the report cannot be written.
    """
    folder = open_folder(path)
    if isinstance(folder, TableFolder):
        return _write_table(folder)
    index = own(path, "report") / "index.html"
    if isinstance(folder, RunFolder):
        html, summary, rows = page.run_page(folder), _run_summary(folder), _run_rows(folder)
    elif isinstance(folder, PredictionFolder):
        html, summary, rows = page.prediction_page(folder), folder.facts, flat_rows(folder)
    else:
        results = study_results(folder)
        html, rows = page.study_page(folder, results), study_rows(folder)
        summary = {"kind": "study", "name": folder.facts.get("name"), "headline": headline(results)}
        summary |= {"finished": folder.facts.get("finished"), "results": results, "trials": rows}
    return _write(index, html, path / "report" / "report", summary, rows)


def _write_table(folder: TableFolder) -> Path:
    results = table_results(folder)
    rows = trial_rows(folder, results.classes)
    summary = {"kind": "table", "name": folder.facts.get("name"), "headline": results.headline}
    summary |= {"done": results.done, "planned": results.planned, "results": asdict(results)}
    summary |= {"probes": page.probe_figures(folder), "trials": rows}
    html = page.table_page(folder, results)
    return _write(own(folder.path, "report") / "index.html", html, folder.path / "table", summary, rows)


def _write(index: Path, html: str, numbers: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """The page, and its numbers as `numbers`.csv and `numbers`.json."""
    try:
        index.parent.mkdir(exist_ok=True)
        write_atomic(numbers.with_suffix(".csv"), _csv(rows).encode())
        write_atomic(numbers.with_suffix(".json"), (json.dumps(as_json(summary), indent=1) + "\n").encode())
        write_atomic(index, html.encode())
    except OSError as error:
        cure = "make room there for a folder that you may write"
        raise RunError(f"{index.parent}: {error.strerror}; {cure}") from None
    return index


def table_text(path: Path) -> str:
    """The table's mean Dice and differences, as lines for a terminal. Raises `RunError`."""
    table = open_table(path)
    return "\n".join(filter(None, [not_final(table), text_rows(table_results(table))]))


def study_table(path: Path) -> str:
    """The study's mean Dice by label fraction and start, as lines for a terminal. Raises `RunError`."""
    return text_table(study_results(open_study(path)))


def _run_rows(run: RunFolder) -> list[dict[str, Any]]:
    return list(run.metrics) if run.facts["kind"] == "pretrain" else finetune_rows(run)


def _run_summary(run: RunFolder) -> dict[str, Any]:
    last = run.metrics[-1] if run.metrics else None
    start = {"start": bare(run.facts["start"])} if run.facts.get("start") else {}
    return run.facts | start | {"last_logged_step": last} | ({"dice": run.dice} if run.dice else {})


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerow({key: _cell(key) for key in columns})
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
