"""What was measured as tables, bars and a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

OURS, DECODING = "PatchStream", "decoding alone"
RATIOS = {"webdataset, blosc2": 5, "webdataset, npz": 15, "litdata": 3, "mosaicml-streaming": 3}
"""Beginning of baselines' names → how many times as fast as the fastest of them the stream is to be."""
SHARE = 0.7
"""Of decoding alone."""


class Bar(NamedTuple):
    """A figure that was promised, and what came of it."""

    name: str
    figure: str
    met: bool | None
    """None where it was not measured."""

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


def bars(results: dict) -> list[Bar]:
    """Each at the setting where the stream does worst, by the median over the rounds."""
    promised = [(f"≥ {least}× as fast as {name}", name, least, "{:.1f}×") for name, least in RATIOS.items()]
    promised.append((f"≥ {SHARE:.0%} of {DECODING}", DECODING, SHARE, "{:.0%}"))
    found = []
    for title, beginning, least, style in promised:
        timings = [timing for timing in results["timings"] if timing["name"].startswith(beginning)]
        worst = min(timings, key=lambda timing: statistics.median(ratios(results, timing)), default=None)
        if worst is None:
            found.append(Bar(title, "–", None))
        else:
            reached = ratios(results, worst)
            figure = f"{spread_text(reached, style)}, at worst ({worst['name']}, {setting_text(worst)})"
            found.append(Bar(title, figure, statistics.median(reached) >= least))
    return found


def ratios(results: dict, timing: dict, reference: str = OURS) -> list[float]:
    """How many times as fast as a contestant the reference was, round by round."""
    (mine,) = (one for one in results["timings"] if one["name"] == reference and _setting(one) == _setting(timing))
    return [a / b for a, b in zip(mine["patches_per_second"], timing["patches_per_second"], strict=True)]


def summary(results: dict) -> str:
    """All tables, in Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    variants = all(timing["name"] != OURS for timing in results["timings"])
    lines = [
        "# webdataset with other settings" if variants else "# The stream, measured",
        "",
        f"{machine['device']}; Python {machine['python']}, {versions}; Linux {machine['kernel']}; {machine['date']}; "
        f"load {machine['load']:.1f} before and {machine['load_after']:.1f} after, {machine['minutes']} minutes.",
        "",
        corpus_text(results["corpus"]) + (". A quick run: no figures to quote." if results["quick"] else "."),
        "",
        "Patches/s in the trainer and ratios are medians (least to greatest) of the rounds; ratios are taken round by "
        "round. Every contestant delivered each sample exactly once in an epoch, bit for bit, before it was timed.",
        "",
    ]
    if not variants:
        lines += ["## Bars", ""]
        lines += table(("bar", "figure", ""), [(bar.name, bar.figure, bar.verdict) for bar in bars(results)])
    reference = "webdataset, blosc2" if variants else OURS
    for setting in dict.fromkeys(map(_setting, results["timings"])):
        chosen = [timing for timing in results["timings"] if _setting(timing) == setting]
        lines += [f"## {setting_text(chosen[0])}", ""]
        rows = [
            (
                timing["name"],
                spread_text(timing["patches_per_second"], "{:,.0f}"),
                spread_text(ratios(results, timing, reference), "{:.2f}"),
            )
            for timing in chosen
        ]
        lines += table(("contestant", "patches/s", f"{reference} is faster by"), rows)
    if results["left_out"]:
        lines += ["## Left out", ""]
        lines += [f"- {one['name']}, {setting_text(one)}: {one['why']}" for one in results["left_out"]] + [""]
    return "\n".join(lines)


def corpus_text(facts: dict) -> str:
    least, most = facts["least_most_bytes_per_voxel"]
    return (
        f"{facts['patches']} patches of {'×'.join(map(str, facts['patch_size']))} int16 from {facts['cases']} scans; "
        f"blosc2 {facts['bytes_per_voxel']:.2f} bytes a voxel ({least:.2f} to {most:.2f}), "
        f"npz {facts['npz_bytes_per_voxel']:.2f}"
    )


def chart(results: dict, path: Path) -> None:
    """Patches/s of each contestant, a panel for each number of workers, a bar for each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timings = results["timings"]
    names = list(dict.fromkeys(timing["name"] for timing in timings))[::-1]
    panels = sorted({timing["workers"] for timing in timings})
    sizes = sorted({timing["batch_size"] for timing in timings})
    shape = {"figsize": (4.6 * len(panels) + 1.6, 0.42 * len(names) + 1.2)}
    figure, axes = plt.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False, layout="constrained", **shape)
    for axis, workers in zip(axes[0], panels, strict=True):
        for place, size in enumerate(sizes):
            chosen = [timing for timing in timings if (timing["workers"], timing["batch_size"]) == (workers, size)]
            laps = [timing["patches_per_second"] for timing in chosen]
            middle = [statistics.median(lap) for lap in laps]
            spread = [
                [statistics.median(lap) - min(lap) for lap in laps],
                [max(lap) - statistics.median(lap) for lap in laps],
            ]
            heights = [names.index(timing["name"]) - 0.4 * (place - (len(sizes) - 1) / 2) for timing in chosen]
            axis.barh(heights, middle, 0.36, xerr=spread, label=f"batches of {size}", error_kw={"elinewidth": 0.8})
        axis.set_title("1 worker" if workers == 1 else f"{workers} workers", fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("patches/s in the trainer")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def spread_text(values: Iterable[float], style: str) -> str:
    """Median, least and greatest."""
    values = list(values)
    median, least, most = (style.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def _setting(record: dict) -> tuple[int, int]:
    return record["workers"], record["batch_size"]


def setting_text(record: dict) -> str:
    return f"{record['workers']} worker{'s' * (record['workers'] > 1)}, batches of {record['batch_size']}"
