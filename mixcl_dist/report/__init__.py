"""One self-contained page about a run or a study, with its numbers as CSV and JSON beside it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from mixcl_dist.report import page
from mixcl_dist.report.folders import RunFolder, open_folder, open_study
from mixcl_dist.report.results import as_json, finetune_rows, headline, study_results, study_rows, text_table
from mixcl_dist.run import RunError, write_atomic


def write_report(path: Path) -> Path:
    """Write `path`/report/{index.html,report.csv,report.json} for a RUN or STUDY folder; returns index.html.

    The folder may be unfinished: what is missing is left out and said so. Raises `RunError`, in one line, where
    the folder is no run and no study, where a file in it is broken, or where the report cannot be written.
    """
    folder = open_folder(path)
    if isinstance(folder, RunFolder):
        html, summary, rows = page.run_page(folder), _run_summary(folder), _run_rows(folder)
    else:
        results = study_results(folder)
        html, rows = page.study_page(folder, results), study_rows(folder)
        summary = {"kind": "study", "name": folder.facts.get("name"), "headline": headline(results)}
        summary |= {"finished": folder.facts.get("finished"), "results": results, "trials": rows}
    out = path / "report"
    try:
        out.mkdir(exist_ok=True)
        write_atomic(out / "report.csv", _csv(rows).encode())
        write_atomic(out / "report.json", (json.dumps(as_json(summary), indent=1) + "\n").encode())
        write_atomic(out / "index.html", html.encode())
    except OSError as error:
        raise RunError(f"{out}: {error.strerror}; the report needs room and a folder that you may write") from None
    return out / "index.html"


def study_table(path: Path) -> str:
    """The study's mean Dice by label fraction and start, as lines for a terminal. Raises `RunError`."""
    return text_table(study_results(open_study(path)))


def _run_rows(run: RunFolder) -> list[dict[str, Any]]:
    return list(run.metrics) if run.facts["kind"] == "pretrain" else finetune_rows(run)


def _run_summary(run: RunFolder) -> dict[str, Any]:
    last = run.metrics[-1] if run.metrics else None
    return run.facts | {"last_logged_step": last} | ({"dice": run.dice} if run.dice else {})


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
