"""Line and point figures as inline SVG that follows the page's text colour, light or dark."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mixcl_dist.pretraining.alarms import LARGEST_UNIFORMITY, LEAST_ANCHORS, LEAST_RANK_SHARE
from mixcl_dist.pretraining.summary import above_floor
from mixcl_dist.report.folders import TableTrial
from mixcl_dist.report.results import MEAN, SCRATCH, Cell, Comparison, StudyResults, percent
from mixcl_dist.report.searched import SearchResults, position
from mixcl_dist.report.table import Pair
from mixcl_dist.studies.statistics import Difference

ARM_COLOURS = ("#8a8d91", "#0b78c2", "#d55e00", "#009e73", "#b0559a", "#b58900", "#6f5bd0", "#7a5c3e")
"""Scratch is grey everywhere; pre-trained starts follow in the study's order.
Seven hues that are told apart without colour vision's red, green or blue, dark enough for white paper."""

_INK = "#010203"  # replaced by currentColor
_STYLE = {
    "text.parse_math": False,  # names of classes and runs are shown as they are
    "text.usetex": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

TERMS = {
    "loss": "Total loss",
    "voxel_identity": "Voxel identity",
    "voxel_label": "Voxel label, above its floor",
    "crop_identity": "Crop identity",
    "reconstruction": "Reconstruction",
    "voxel_identity_similarity": "Similarity of a voxel's two views",
}
RATES = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "samples_per_s": "Samples per second",
    "data_wait_share": "Time waiting for data (%)",
    "slowest_rank_excess": "Slowest rank beyond the median (%)",
}

LONGEST_NAME = 40
"""Characters of a class's or start's name in a figure."""
PANEL_SIZE = (3.53, 2.35)
SMOOTHED_FROM = 20
"""Logged steps from which on a curve is drawn thin, with its running mean."""
PER_CENT = ("data_wait_share", "slowest_rank_excess", "clipped_share")
"""Shares from 0 to 1 that are drawn as per cent."""


@dataclass(frozen=True)
class Diagnostic:
    """A panel with what good looks like, and what to change where it is not so."""

    title: str
    advice: str
    limit: float | None = None
    """Drawn as a dashed line."""


TERM_GRADIENTS = Diagnostic(
    "Gradient of each term on the backbone",
    "Norms as weighted in the loss, on the first rank's own batch before averaging; good: within a factor of about "
    "three of each other, so raise the weight under objective of a term far below, as the network hardly hears it.",
)
DIAGNOSTICS = {
    "voxel_label_anchors": Diagnostic(
        "Label anchors a step",
        f"Good: several hundred; below the line ({LEAST_ANCHORS}) the label term teaches little, so raise "
        "data.labelled_fraction, rows.per_view_pair or pretrain.batch_size, or set rows.min_spacing to 1.",
        LEAST_ANCHORS,
    ),
    "clipped_share": Diagnostic(
        "Clipped steps (%)",
        "Good: few after the warm-up; near 100 % all steps have one length whatever the gradient's, so raise "
        "engine.gradient_clipping to about the usual gradient norm.",
    ),
    "alignment": Diagnostic(
        "Alignment: squared distance of twins",
        "Good: falls far below 2, that of unrelated voxels, while uniformity stays low; if it stays high, raise "
        "objective.voxel_identity or degrade the views less (section views).",
    ),
    "uniformity": Diagnostic(
        "Uniformity of voxel rows",
        f"Good: falls towards −4, rows spread evenly; above the line (−{-LARGEST_UNIFORMITY:g}) all rows are nearly "
        "one (collapse), so lower optimizer.learning_rate or raise objective.voxel_identity.",
        LARGEST_UNIFORMITY,
    ),
    "effective_rank": Diagnostic(
        "Effective rank of voxel rows",
        "Good: rises and stays a good part of the embedding's width; below the line "
        f"({100 * LEAST_RANK_SHARE:g} % of it) rows keep to a few directions (collapse), so lower "
        "optimizer.learning_rate or objective.voxel_temperature.",
    ),
}


def arm_colours(starts: Sequence[str]) -> dict[str, str]:
    return {start: ARM_COLOURS[i % len(ARM_COLOURS)] for i, start in enumerate(starts)}


def dice_by_fraction(results: StudyResults) -> Markup:
    """Mean Dice of each start at each label fraction: every seed a dot, the mean with its standard deviation."""
    colours = arm_colours(results.starts)

    def draw(axes: Axes) -> None:
        for i, start in enumerate(results.starts):
            cells = [cell for cell in results.cells if cell.start == start and cell.values]
            offset = 0.16 * (i - (len(results.starts) - 1) / 2)
            at = [results.fractions.index(cell.fraction) + offset for cell in cells]
            _draw_arm(axes, at, cells, colours[start], start)
        _fraction_axis(axes, results)
        axes.set_ylabel("Mean Dice over classes (%)")
        axes.legend(loc="best")

    return _figure("dice", (5.2, 3.7), draw, "Mean Dice against label fraction for each start")


def paired_differences(results: StudyResults) -> Markup:
    """Pre-trained minus scratch: every seed a dot, the mean with its 95 % t-interval, and the line of no effect."""
    colours = arm_colours(results.starts)
    arms = results.starts[1:]

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=colours[SCRATCH], linewidth=1.5)
        for comparison in results.comparisons:
            i = arms.index(comparison.start)
            at = results.fractions.index(comparison.fraction) + 0.2 * (i - (len(arms) - 1) / 2)
            _draw_comparison(axes, at, comparison, colours[comparison.start])
        _fraction_axis(axes, results)
        axes.set_ylabel("Pre-trained − scratch (Dice points)")

    return _figure("paired", (5.2, 3.7), draw, "Paired differences of pre-trained and scratch by label fraction")


def class_dumbbells(results: StudyResults, fraction: float, start: str) -> Markup:
    """Each class as a line from scratch to pre-trained at one fraction."""
    colours = arm_colours(results.starts)
    both = [row for row in results.per_class if row.comparison.differences]
    rows = [row for row in both if (row.comparison.fraction, row.comparison.start) == (fraction, start)]
    means = [100 * cell.summary.mean for row in both for cell in (row.scratch, row.pretrained)]  # type: ignore[operator]

    def draw(axes: Axes) -> None:
        for y, row in enumerate(reversed(rows)):
            ends = [100 * cell.summary.mean for cell in (row.scratch, row.pretrained)]  # type: ignore[operator]
            axes.plot(ends, [y, y], color=colours[start], alpha=0.4, linewidth=3, solid_capstyle="round")
            axes.plot(ends[0], y, "o", color=colours[SCRATCH], markersize=8)
            axes.plot(ends[1], y, "o", color=colours[start], markersize=8)
        axes.set_yticks(range(len(rows)), [_class_label(row.name) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(min(means) - 3, max(means) + 3)
        axes.set_xlabel("Dice (%)")
        axes.set_title(f"{percent(fraction)} of the labels")

    size = (5.2, 0.9 + 0.3 * max(len(rows), 2))
    return _figure(f"class-{fraction}-{start}", size, draw, f"Dice by class at {percent(fraction)} of the labels")


def parallel_coordinates(search: SearchResults) -> Markup | None:
    """A line for each trial through its settings to its Dice, the better the darker; trials without a setting (its
    condition did not hold) have no line there."""
    judged = sorted(search.judged, key=lambda one: one.dice)
    if len(judged) < 2:
        return None
    low, high = judged[0].dice, judged[-1].dice

    def draw(axes: Axes) -> None:
        lines = np.full((len(judged), len(search.keys) + 1), np.nan)
        for column, key in enumerate(search.keys):
            there = [number for number, one in enumerate(judged) if key in one.params]
            if there:
                at, marks = position([judged[number].params[key] for number in there])
                lines[there, column] = at
                for height, text in marks:
                    axes.annotate(_shown(text), (column, height), (4, 4), textcoords="offset points", fontsize=9)
        lines[:, -1] = [(one.dice - low) / (high - low or 1) for one in judged]
        for height, dice in ((0, low), (1, high)):
            axes.annotate(
                f"{100 * dice:.1f}", (len(search.keys), height), (4, 4), textcoords="offset points", fontsize=9
            )
        for line in lines:
            axes.plot(line, color=ARM_COLOURS[1], linewidth=1.2, alpha=0.12 + 0.78 * line[-1])
        names = [_shown(key.partition(".")[2].replace("_", " ")) for key in search.keys]
        axes.set_xticks(range(len(names) + 1), [*names, "Dice (%)"], rotation=15, ha="right")
        axes.set_yticks([])
        axes.set_ylim(-0.06, 1.12)
        axes.set_xlim(-0.15, len(names) + 0.35)
        axes.grid(axis="y", visible=False)

    width = max(5.2, 1.2 * (len(search.keys) + 1))
    return _figure("searched", (width, 3.7), draw, "Settings and Dice of every trial")


def setting_shares(search: SearchResults) -> Markup | None:
    """How much of the variance of Dice goes with each setting alone."""
    if not search.shares:
        return None
    shares = sorted(search.shares.items(), key=lambda item: item[1])

    def draw(axes: Axes) -> None:
        axes.barh(range(len(shares)), [100 * share for _, share in shares], color=ARM_COLOURS[1], height=0.6)
        axes.set_yticks(range(len(shares)), [_shown(key.partition(".")[2].replace("_", " ")) for key, _ in shares])
        axes.set_xlim(0, 100)
        axes.set_xlabel("Share of the variance of Dice (%)")
        axes.grid(axis="y", visible=False)

    return _figure("shares", (4.2, 1.1 + 0.35 * len(shares)), draw, "Share of the variance of Dice by setting")


def table_differences(pairs: Sequence[Pair], colours: dict[str, str], name: str) -> Markup | None:
    """Each arm minus scratch with its interval, a panel for each number of labelled scans."""
    shown = [pair for pair in pairs if pair.reference == SCRATCH and pair.difference.mean is not None]
    scans, arms = sorted({pair.scans for pair in shown}), list(dict.fromkeys(pair.arm for pair in shown))
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(scans), sharex=True, sharey=True, squeeze=False)[0]
        for axes, count in zip(panels, scans, strict=True):
            axes.axvline(0, color=colours[SCRATCH], linewidth=1.5)
            for pair in (pair for pair in shown if pair.scans == count):
                _draw_difference(axes, arms.index(pair.arm), pair.difference, colours[pair.arm])
            axes.set_yticks(range(len(arms)), [_class_label(arm) for arm in arms])
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.set_title(f"{count} {'scan' if count == 1 else 'scans'}")
            axes.set_xlabel("Dice points")

    width = 2.2 + 2.4 * len(scans)
    return _svg(f"table-{name}", (width, 1.1 + 0.32 * len(arms)), draw, "Differences from scratch by labelled scans")


def table_curves(trials: Sequence[TableTrial], colours: dict[str, str], name: str) -> Markup | None:
    """Mean Dice by fine-tuning step, the mean over seeds of each arm, a panel for each number of labelled scans."""
    shown = [trial for trial in trials if trial.curve and trial.status == "done"]
    scans = sorted({trial.scans for trial in shown})
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(scans), sharey=True, squeeze=False)[0]
        for axes, count in zip(panels, scans, strict=True):
            here = [trial for trial in shown if trial.scans == count]
            for arm, colour in colours.items():
                curves = [dict(trial.curve) for trial in here if trial.arm == arm]
                steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
                means = [100 * sum(curve[step] for curve in curves) / len(curves) for step in steps]
                axes.plot(steps, means, color=colour, linewidth=1.8, marker="o", markersize=3)
            # An arm that is given more steps goes on beyond the figure.
            axes.set_xlim(0, min(trial.curve[-1][0] for trial in here))
            axes.set_title(f"{count} {'scan' if count == 1 else 'scans'}")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_xlabel("step")
        panels[0].set_ylabel("Mean Dice (%)")

    return _svg(f"curves-{name}", (1.0 + 2.8 * len(scans), 2.9), draw, "Mean Dice by fine-tuning step and arm")


def _draw_difference(axes: Axes, y: int, found: Difference, colour: str) -> None:
    axes.plot(100 * found.mean, y, "o", color=colour, markersize=7)  # type: ignore[operator]
    if found.low is not None and found.high is not None:
        axes.plot([100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")


def loss_curves(metrics: list[dict[str, float]], name: str, chance: Mapping[str, float]) -> list[Markup]:
    """A figure for each loss term that was logged, with what it is by chance, where that is known, as a dashed line."""
    return _panels(f"loss-{name}", metrics, TERMS, chance)


def dice_curve(curve: list[dict[str, float]], name: str) -> list[Markup]:
    """Mean Dice on development scans by step; none without a point."""
    return _panels(f"curve-{name}", curve, {"dice": "Dice on development scans (%)"}, {})


def rate_curves(metrics: list[dict[str, float]], name: str) -> list[Markup]:
    """Learning rate, gradient norm and throughput by step, each a figure."""
    return _panels(f"rate-{name}", metrics, RATES, {})


def diagnostic_curves(
    metrics: list[dict[str, float]], name: str, embedding_width: int | None
) -> list[tuple[Markup, str]]:
    """What was logged of `diagnostics`, each a panel with its advice."""

    def term_gradients(axes: Axes) -> None:
        axes.set_yscale("log")
        for i, (key, title) in enumerate(gradients.items(), start=1):
            step, norm = _series(metrics, key)
            seen = norm > 0  # a batch without labels has none of the label term
            if not seen.any():
                continue
            axes.plot(step[seen], norm[seen], color=ARM_COLOURS[i], linewidth=1.5, marker=".", label=title)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
        axes.legend(loc="upper center", ncols=2, fontsize=8, labelspacing=0.2, columnspacing=1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        _name_axes(axes, TERM_GRADIENTS.title)

    gradients = _logged(metrics, {f"gradient_norm_{term}": title.partition(",")[0] for term, title in TERMS.items()})
    panels = []
    if gradients:
        figure = _figure(f"gradients-{name}", PANEL_SIZE, term_gradients, TERM_GRADIENTS.title)
        panels.append((figure, TERM_GRADIENTS.advice))
    for key in _logged(metrics, {key: panel.title for key, panel in DIAGNOSTICS.items()}):
        panel = DIAGNOSTICS[key]
        limit = LEAST_RANK_SHARE * embedding_width if key == "effective_rank" and embedding_width else panel.limit
        draw = functools.partial(_draw_panel, metrics=metrics, key=key, title=panel.title, limit=limit)
        advice = panel.advice if limit is not None else panel.advice.replace("below the line", "below")
        panels.append((_figure(f"{key}-{name}", PANEL_SIZE, draw, panel.title), advice))
    return panels


def _draw_arm(axes: Axes, at: list[float], cells: list[Cell], colour: str, label: str) -> None:
    means = [100 * cell.summary.mean for cell in cells]  # type: ignore[operator]
    sds = [100 * (cell.summary.sd or 0) for cell in cells]
    axes.errorbar(at, means, sds, color=colour, marker="o", markersize=7, capsize=4, linewidth=1.8, label=_shown(label))
    for x, cell in zip(at, cells, strict=True):
        values = [100 * value for value in cell.values.values()]
        axes.plot([x + 0.045] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.55)


def _draw_comparison(axes: Axes, at: float, comparison: Comparison, colour: str) -> None:
    values = [100 * value for value in comparison.differences.values()]
    axes.plot([at + 0.07] * len(values), values, "o", color=colour, markersize=4, alpha=0.55)
    summary = comparison.summary
    if summary.mean is None:
        return
    axes.plot(at, 100 * summary.mean, "D", color=colour, markersize=7)
    if summary.low is not None and summary.high is not None:
        half = 100 * (summary.high - summary.mean)
        axes.errorbar(at, 100 * summary.mean, half, color=colour, capsize=5, linewidth=1.8)


def _fraction_axis(axes: Axes, results: StudyResults) -> None:
    axes.set_xticks(range(len(results.fractions)), [percent(fraction) for fraction in results.fractions])
    axes.set_xlim(-0.5, len(results.fractions) - 0.5)
    axes.set_xlabel("Share of training cases with labels")
    axes.grid(axis="x", visible=False)


def _panels(
    name: str, metrics: list[dict[str, float]], panels: dict[str, str], chance: Mapping[str, float]
) -> list[Markup]:
    figures = []
    for key, title in _logged(metrics, panels).items():
        draw = functools.partial(_draw_panel, metrics=metrics, key=key, title=title, chance=chance.get(key))
        figures.append(_figure(f"{key}-{name}", PANEL_SIZE, draw, f"{title} by step"))
    return figures


def _logged(metrics: list[dict[str, float]], panels: dict[str, str]) -> dict[str, str]:
    return {key: title for key, title in panels.items() if any(_is_number(row.get(key)) for row in metrics)}


def _draw_panel(
    axes: Axes,
    metrics: list[dict[str, float]],
    key: str,
    title: str,
    limit: float | None = None,
    chance: float | None = None,
) -> None:
    scale = 100 if key in PER_CENT else 1
    step, value = _series(metrics, key)
    noisy = len(value) > SMOOTHED_FROM and key != "learning_rate"
    width, alpha, point = (0.8, 0.4, None) if noisy else (1.8, 1, "o" if len(value) == 1 else None)
    axes.plot(step, scale * value, color=ARM_COLOURS[1], linewidth=width, alpha=alpha, marker=point, markersize=4)
    if noisy:
        axes.plot(step, scale * _smooth(value), color=ARM_COLOURS[1], linewidth=1.8)
    if chance is not None:
        axes.axhline(chance, linestyle="--", color=ARM_COLOURS[0], linewidth=1.3, label="chance")
        axes.legend(loc="best")
    if limit is not None:
        axes.axhline(limit, linestyle="--", color=ARM_COLOURS[2], linewidth=1.3)
    if key == "clipped_share":
        axes.set_ylim(-4, 104)  # a curve that does not move would have an axis of its own making
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    _name_axes(axes, title)


def _name_axes(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step")


def _series(metrics: list[dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    at = {row["step"]: above_floor(row) if key == "voxel_label" else row.get(key) for row in metrics}
    kept = [(step, value) for step, value in at.items() if _is_number(value)]
    return np.array([step for step, _ in kept]), np.array([value for _, value in kept], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points; shorter at both ends."""
    half = max(1, len(values) // 40)
    first = values[0]  # sums of differences from it: a curve that does not move stays so, to the last digit
    total = np.concatenate([[0.0], np.cumsum(values - first)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return first + (total[high] - total[low]) / (high - low)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _class_label(name: str) -> str:
    return "mean of classes" if name == MEAN else _shown(name.replace("_", " "))


def _shown(name: str) -> str:
    """A name of one line that leaves room for the axes; matplotlib leaves out of a legend what begins with "_"."""
    line = "".join(filter(str.isprintable, " ".join(name.split()))).lstrip("_")
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def _figure(name: str, size: tuple[float, float], draw: Callable[[Axes], None], label: str) -> Markup:
    return _svg(name, size, lambda figure: draw(figure.add_subplot()), label)


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None], label: str) -> Markup:
    """Draw and return one `<svg>` element whose ids are unique on the page and that names no address."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    prefix = re.sub(r"\W", "-", name)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    head = f'<svg role="img" aria-label="{label}" class="figure"'
    return Markup(text.replace("<svg", head, 1).replace(_INK, "currentColor"))
