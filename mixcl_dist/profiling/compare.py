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


def differing(first: Result, other: Result) -> list[str]:
    """What beside the code differs, so that figures of time say little."""
    said = []
    for name in ("machine", "card", "python", "versions", "variables"):
        ours, theirs = getattr(first.environment, name), getattr(other.environment, name)
        if ours != theirs:
            said.append(f"{name}: {_told(ours)} | {_told(theirs)}")
    if first.conditions and other.conditions:  # results of before these were kept have none
        for name in sorted(first.conditions.keys() | other.conditions.keys()):
            ours, theirs = first.conditions.get(name), other.conditions.get(name)
            if ours != theirs:
                said.append(f"{name}: {_told(ours)} | {_told(theirs)}")
    return said + (["quick: sizes differ"] if first.quick != other.quick else [])


def sentence(first: Result, other: Result, smallest: float) -> str:
    """Which figures are worse and which better, of those that both have."""
    verdicts: dict[str, list[str]] = {}
    for name in (name for name in first.figures if name in other.figures):
        verdicts.setdefault(compare(first.figures[name], other.figures[name], smallest).verdict, []).append(name)
    told = [f"{verdict}: {', '.join(verdicts.get(verdict, ['none']))}" for verdict in ("worse", "better")]
    few = any(len(first.figures[name].samples) > 1 for name in verdicts.get("too few samples", []))
    return "; ".join([*told, *(["measure for longer to tell more"] if few else [])])


def text(results: Sequence[Result], smallest: float) -> str:
    """A line for each figure of the first result, and of the others beside it."""
    first, *others = results
    lines = [f"beside the code there differs {line}" for other in others for line in differing(first, other)]
    for name, figure in first.figures.items():
        cells = [f"{name:<36} {_shown(figure)}"]
        for other in others:
            if name in other.figures:
                found = compare(figure, other.figures[name], smallest)
                cells.append(f"{_shown(other.figures[name])} {found.change:+.1%} {found.verdict}")
        lines.append("  |  ".join(cells))
    return "\n".join([*lines, *(sentence(first, other, smallest) for other in others)])


STYLE = """body{font:14px/1.45 sans-serif;margin:24px;max-width:1120px;overflow-wrap:anywhere}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:left;vertical-align:top;border-bottom:1px solid #ccc}
@media (max-width:700px){body{margin:14px}th,td{min-width:88px}}"""


def write_page(results: Sequence[Result], names: Sequence[str], smallest: float, path: Path) -> None:
    """One HTML file without anything from elsewhere; `names` are those of the results' files."""
    first, *others = results
    lines = [f"{name}: {one.said}" for name, one in zip(names, results, strict=True) if one.said]
    for name, other in zip(names[1:], others, strict=True):
        lines.append(f"{name} against {names[0]}: {sentence(first, other, smallest)}.")
    warnings = [f"<li>{html.escape(line)}</li>" for other in others for line in differing(first, other)]
    environment = [_row("file", names)]
    for head, name in ENVIRONMENT.items():
        environment.append(_row(head, [_told(getattr(one.environment, name)) for one in results]))
    figures = [_row("", names), *(_row_of_figure(name, results, smallest) for name in first.figures)]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmark: {html.escape(first.benchmark)}</title><style>{STYLE}</style>"
        f"<h1>Benchmark: {html.escape(first.benchmark)}</h1>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        + (f"<p>Beside the code there differ:</p><ul>{''.join(warnings)}</ul>" if warnings else "")
        + f"<h2>Figures</h2><p>{_how_to_read(smallest, bool(others))}</p>"
        + f'<div class="scroll"><table>{"".join(figures)}</table></div>'
        + f'<h2>Where and when</h2><div class="scroll"><table>{"".join(environment)}</table></div>'
    )
    write_atomic(path, page.encode())


ENVIRONMENT = {
    "begun": "begun",
    "machine": "machine",
    "GPU": "card",
    "commit": "commit",
    "clock (MHz)": "clock_mhz",
    "load before": "load_before",
    "load after": "load_after",
    "versions": "versions",
}
"""Heading on a page → field."""


def _how_to_read(smallest: float, compared: bool) -> str:
    said = (
        "Median (least to greatest) and the number of samples; <i>2 of 3</i> says that one was left out, "
        f"whose modified z-score is beyond {BEYOND}. A count has no spread. A part's <i>floor</i> is the least "
        "that it can take, by bytes over a copy's bandwidth or operations over a matmul's rate."
    )
    if compared:
        said += (
            f" A change of a median counts where it is at least {smallest:.0%} and its own modified z-score, <i>z</i>, "
            f"is beyond {BEYOND}; any change of a count does. Below {LEAST_SAMPLES} samples nothing is claimed."
        )
    return said


def _row_of_figure(name: str, results: Sequence[Result], smallest: float) -> str:
    first, *others = results
    cells = [f"<td>{html.escape(_shown(first.figures[name]))}</td>"]
    for other in others:
        if name not in other.figures:
            cells.append("<td>not measured</td>")
            continue
        found = compare(first.figures[name], other.figures[name], smallest)
        z = f", z {found.z:.1f}" if math.isfinite(found.z) and not first.figures[name].exact else ""
        shown = f"{html.escape(_shown(other.figures[name]))}<br>{found.change:+.1%}{z}: {found.verdict}"
        cells.append(f'<td style="background:{COLOURS.get(found.verdict, "none")}">{shown}</td>')
    return f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>"


def _row(head: str, values: Sequence[str]) -> str:
    return f"<tr><th>{head}</th>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"


def _told(value: object) -> str:
    """As a reader would say it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    return "none" if value is None else str(value)


def _shown(figure: Figure) -> str:
    if figure.exact:
        return f"{_number(figure.samples[0])} {figure.unit}"
    values = kept(figure.samples)
    samples = f"{len(values)} of {len(figure.samples)}" if len(values) < len(figure.samples) else f"{len(values)}"
    low, middle, high = (_number(value) for value in (values.min(), float(np.median(values)), values.max()))
    return f"{middle} {figure.unit}" if len(values) == 1 else f"{middle} ({low} to {high}) {figure.unit}, {samples}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
