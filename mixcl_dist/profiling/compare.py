"""Results side by side: a difference counts where it is both beyond the spread and large enough to matter.

Of each figure's samples those are left out whose modified z-score (Iglewicz and Hoaglin 1993: 0.6745 times the distance
to the median, over the median absolute deviation) is beyond 3.5. The difference of two medians is held, in both
directions, against the spread of both samples about their own medians by the same score; and it has to be at least
`smallest` of the first median. Counts have no spread: any difference is one. Below three samples nothing is claimed.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.profiling.result import Figure, Result

BEYOND = 3.5
TO_DEVIATIONS = 0.6745
LEAST_SAMPLES = 3
SMALLEST = 0.05
"""Share of the median from which a change matters, unless another is asked for."""
Verdict = Literal["better", "worse", "the same", "not told apart", "too few samples"]
COLOURS = {"better": "#d6f5d6", "worse": "#f9d6d5"}


@dataclass(frozen=True)
class Comparison:
    """One figure of two results."""

    before: float
    after: float
    """Medians."""
    change: float
    """Of the median, as a share of the first one."""
    z: float
    verdict: Verdict


def compare(before: Figure, after: Figure, smallest: float) -> Comparison:
    """`smallest` is the least change of the median, as a share, that matters. Raises `ValueError` for other units."""
    if (before.unit, before.better, before.exact) != (after.unit, after.better, after.exact):
        raise ValueError(f"{before.unit} and {after.unit} are not compared")
    first, second = kept(before.samples), kept(after.samples)
    medians = float(np.median(first)), float(np.median(second))
    difference = medians[1] - medians[0]
    change = difference / abs(medians[0]) if medians[0] else math.copysign(math.inf, difference) if difference else 0.0
    spread = float(np.median(np.abs(np.concatenate([first - medians[0], second - medians[1]]))))
    z = TO_DEVIATIONS * difference / spread if spread else math.copysign(math.inf, difference) if difference else 0.0
    return Comparison(*medians, change, z, _verdict(before, min(len(first), len(second)), change, z, smallest))


def _verdict(figure: Figure, samples: int, change: float, z: float, smallest: float) -> Verdict:
    if not figure.exact and samples < LEAST_SAMPLES:
        return "too few samples"
    if change == 0 or (not figure.exact and abs(z) > BEYOND and abs(change) < smallest):
        return "the same"
    if not figure.exact and (abs(z) <= BEYOND or abs(change) < smallest):
        return "not told apart"
    return "better" if (change > 0) == (figure.better == "more") else "worse"


def kept(samples: Sequence[float]) -> np.ndarray:
    """Without what lies beyond."""
    values = np.asarray(samples, dtype=float)
    distances = np.abs(values - np.median(values))
    spread = np.median(distances)
    return values[TO_DEVIATIONS * distances <= BEYOND * spread] if spread else values


def read(path: Path, benchmark: str) -> Result:
    """A result to compare with one of `benchmark`; raises `RunError`."""
    found = Result.read(path)
    if found.benchmark != benchmark:
        raise RunError(f"{path}: is of {found.benchmark}, not of {benchmark}; give another to compare with")
    return found


def worse(first: Result, other: Result, smallest: float) -> list[str]:
    """Names of the figures that have become worse."""
    shared = [name for name in first.figures if name in other.figures]
    return [name for name in shared if compare(first.figures[name], other.figures[name], smallest).verdict == "worse"]


def differences_of_environment(first: Result, other: Result) -> list[str]:
    """What beside the code differs, so that figures of time say little."""
    said = []
    for name in ("machine", "card", "python", "versions", "variables"):
        ours, theirs = getattr(first.environment, name), getattr(other.environment, name)
        if ours != theirs:
            said.append(f"{name}: {ours} | {theirs}")
    return said + (["quick: sizes differ"] if first.quick != other.quick else [])


def text(results: Sequence[Result], smallest: float) -> str:
    """A line for each figure of the first result, and of the others beside it."""
    first, *others = results
    lines = []
    for name, figure in first.figures.items():
        cells = [f"{name:<44} {_shown(figure)}"]
        for other in others:
            if name in other.figures:
                found = compare(figure, other.figures[name], smallest)
                cells.append(f"{_shown(other.figures[name])} {found.change:+.1%} {found.verdict}")
        lines.append("  |  ".join(cells))
    return "\n".join(lines)


def write_page(results: Sequence[Result], names: Sequence[str], smallest: float, path: Path) -> None:
    """One HTML file without anything from elsewhere; `names` are those of the results' files."""
    first, *others = results
    cell = "<td>{}</td>".format
    rows = [_row("file", names), _row("begun", [one.environment.begun for one in results])]
    for name in ("machine", "card", "commit", "clock_mhz", "load_before", "load_after", "versions"):
        rows.append(_row(name, [getattr(one.environment, name) for one in results]))
    figures = []
    for name, figure in first.figures.items():
        cells = [cell(html.escape(_shown(figure)))]
        for other in others:
            if name not in other.figures:
                cells.append(cell(""))
                continue
            found = compare(figure, other.figures[name], smallest)
            shown = f"{_shown(other.figures[name])}<br>{found.change:+.1%}, z {found.z:.1f}: {found.verdict}"
            cells.append(f'<td style="background:{COLOURS.get(found.verdict, "none")}">{shown}</td>')
        figures.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    differing = [line for other in others for line in differences_of_environment(first, other)]
    warnings = [f"<li>{html.escape(line)}</li>" for line in differing]
    sentences = [f"<p>{html.escape(f'{name}: {one.said}')}</p>" for name, one in zip(names, results, strict=True)]
    page = (
        '<!doctype html><meta charset="utf-8"><title>benchmarks</title>'
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:4px 10px;text-align:left;vertical-align:top}"
        "table{border-collapse:collapse;margin:1em 0}tr{border-bottom:1px solid #ccc}</style>"
        f"<h1>{html.escape(first.benchmark)}</h1><p>Median (least to greatest), samples. A change counts from "
        f"{smallest:.0%} on and beyond a modified z-score of {BEYOND}.</p>"
        + (f"<p>Beside the code there differ:</p><ul>{''.join(warnings)}</ul>" if warnings else "")
        + f"<table>{''.join(rows)}</table><table>{''.join(figures)}</table>"
        + "".join(sentences)
    )
    write_atomic(path, page.encode())


def _row(head: str, values: Sequence[object]) -> str:
    return f"<tr><th>{head}</th>{''.join(f'<td>{html.escape(str(value))}</td>' for value in values)}</tr>"


def _shown(figure: Figure) -> str:
    values = np.asarray(figure.samples)
    if figure.exact:
        return f"{values[0]:g} {figure.unit}"
    return f"{np.median(values):.4g} ({values.min():.4g} to {values.max():.4g}) {figure.unit}, {len(values)}"
