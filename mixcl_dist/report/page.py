"""From what a folder holds to the sections of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mixcl_dist.pretraining import summary
from mixcl_dist.report import figures, slices
from mixcl_dist.report.folders import Arrays, PredictionFolder, RunFolder, StudyFolder, TableFolder, Trial
from mixcl_dist.report.prediction import class_rows, scan_rows
from mixcl_dist.report.results import MEAN, SCRATCH, StudyResults, headline, number_range, percent, points
from mixcl_dist.report.searched import search_results
from mixcl_dist.report.table import AT_ZERO, TableResults

MAX_OVERLAY_CASES = 3
MAX_ROWS = 100
"""Of a prediction's scans, and of those that were refused."""


@dataclass(frozen=True)
class Picture:
    source: str
    title: str


@dataclass(frozen=True)
class PictureRow:
    """Pictures of one slice beside each other."""

    name: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Legend:
    colour: str
    name: str


def study_page(study: StudyFolder, results: StudyResults) -> str:
    sections = [pretraining_section(start.run, start.name) for start in study.starts if start.run]
    search = search_results(study)
    overlays, legend, setting = compared_overlays(study, results)
    shown, shown_legend, shown_setting = compared_overlays(study, results, most_labels=True)
    return _render(
        "study.html",
        shown=shown[:1],
        shown_legend=shown_legend,
        shown_setting=shown_setting,
        title=study.facts.get("name", study.path.name),
        facts=study.facts,
        results=results,
        headline=headline(results) if len(results.starts) > 1 or not search else [_best_of(study)],
        colours=figures.arm_colours(results.starts),
        dice_figure=figures.dice_by_fraction(results) if any(cell.values for cell in results.cells) else None,
        paired_figure=_paired_figure(results),
        class_figures=_class_figures(results),
        overlays=overlays,
        overlay_legend=legend,
        overlay_setting=setting,
        pretraining=sections,
        trials=study.trials,
        counts=study.standing.counts,
        standing=study.standing,
        search=search,
        search_figures=[figures.parallel_coordinates(search), figures.setting_shares(search)] if search else [],
        provenance=_study_provenance(study),
    )


def table_page(table: TableFolder, results: TableResults) -> str:
    """The page of a few-label table, finished or not."""
    colours = figures.arm_colours(results.arms)
    by_block = {fold: [row for row in results.rows if row.fold == fold] for fold in results.blocks}
    curves = {
        fold: figures.table_curves([t for t in table.trials if t.fold == fold], colours, fold) for fold in by_block
    }
    machines = [record["machine"] for record in table.records.values() if "machine" in record]
    return _render(
        "table.html",
        title=table.facts.get("name", table.path.name),
        facts=table.facts,
        config=table.config,
        results=results,
        folds=table.facts["table"]["other_organs"]["folds"],
        colours=colours,
        from_scratch={(p.fold, p.scans, p.arm): p for p in results.pairs if p.reference == SCRATCH},
        other_pairs={f: [p for p in results.pairs if p.fold == f and p.reference != SCRATCH] for f in by_block},
        difference_figures={
            f: figures.table_differences([p for p in results.pairs if p.fold == f], colours, f) for f in by_block
        },
        curve_figures={fold: figure for fold, figure in curves.items() if figure},
        widths={fold: 80 + 250 * len({row.scans for row in rows if row.done}) for fold, rows in by_block.items()},
        block_classes={
            f: list(dict.fromkeys(n for row in rows for n in row.class_mean)) for f, rows in by_block.items()
        },
        comparisons=sum(pair.p_holm is not None for pair in results.pairs),
        probes=probe_figures(table),
        trials=table.trials,
        counts=Counter(trial.status for trial in table.trials),
        machines=list(dict.fromkeys(f"{m.get('gpu') or m.get('cpu')}, {m.get('cores')} cores" for m in machines)),
        seconds=sum(record.get("seconds", 0) for record in table.records.values()),
        at_zero=AT_ZERO,
        tolerance_mm=yaml.safe_load(table.config or "{}").get("finetune", {}).get("surface_tolerance_mm", 0),
    )


def prediction_page(folder: PredictionFolder) -> str:
    low, high = folder.facts["window_hu"]
    rows, labels = [], []
    for name, arrays in folder.slices.items():
        named = {"Truth": arrays["truth"][0]} if arrays["truth"].any() else {}
        named["Prediction"] = arrays["prediction"][0]
        rows.append(PictureRow(name, _pictures(arrays, 0, named, (low, high))))
        labels += list(named.values())
    return _render(
        "prediction.html",
        title=folder.path.resolve().name,
        facts=folder.facts,
        cases=folder.cases,
        classes=class_rows(folder),
        scans=scan_rows(folder),
        overlays=rows,
        colours=_legend(slices.labels_in(*labels), folder.facts["classes"]),
        most=MAX_ROWS,
    )


def probe_figures(table: TableFolder) -> list[dict[str, Any]]:
    """What was probed, and its Dice."""
    return [
        {"name": name.partition("/")[2], "linear": record["linear"], "knn": record["knn"]}
        for name, record in table.records.items()
        if name.startswith("probe/") and record["status"] == "done"
    ]


def run_page(run: RunFolder) -> str:
    is_pretraining = run.facts["kind"] == "pretrain"
    return _render(
        "run.html",
        title=run.facts.get("name", run.path.name),
        facts=run.facts,
        pretraining=pretraining_section(run, run.facts.get("name", run.path.name)) if is_pretraining else None,
        finetuning=None if is_pretraining else finetuning_section(run),
        provenance=[(run.facts.get("name", run.path.name), run)],
    )


def pretraining_section(run: RunFolder, name: str) -> dict[str, Any]:
    """Curves and pictures of one pre-training, with what they amount to in words."""
    rows, legend = sample_rows(run)
    config = _settings(run)
    chance = summary.chance_levels(run.facts, config)
    return {
        "name": name,
        "facts": run.facts,
        "told": summary.told(run.facts, run.metrics),
        "planned": summary.came_of_plan(run.facts, run.metrics),
        "warnings": _warnings(run),
        "summary": _summarise_losses(run.metrics, chance),
        "terms": summary.terms_on(run.metrics),
        "smoothed": len(run.metrics) > figures.SMOOTHED_FROM,
        "chance": any(term in chance for term in summary.terms_on(run.metrics)),
        "losses": figures.loss_curves(run.metrics, name, chance),
        "rates": figures.rate_curves(run.metrics, name),
        "diagnostics": figures.diagnostic_curves(run.metrics, name, (config.get("network") or {}).get("voxel_dim")),
        "samples": rows,
        "legend": legend,
        "sample_step": int(run.samples["step"]) if run.samples and "step" in run.samples else None,
    }


def _settings(run: RunFolder) -> dict[str, Any]:
    """config.yaml as it is; empty where there is none."""
    return yaml.safe_load(run.config) or {}


def _warnings(run: RunFolder) -> list[str]:
    """What the run warned of, and that its label term was off where it did not say so."""
    said = dict(run.facts.get("warnings", {}))
    if summary.label_term_is_off(run.metrics):
        said.setdefault("label_term", summary.LABEL_TERM_OFF)
    return list(said.values())


def finetuning_section(run: RunFolder) -> dict[str, Any]:
    overlays = run.overlays
    rows = []
    for i, case in enumerate(overlays["cases"].tolist() if overlays else []):
        rows.append(PictureRow(case, _overlay_pictures(run, i, [("Prediction", run)])))
    found = slices.labels_in(overlays["truth"], overlays["prediction"]) if overlays else ()
    means = (run.dice or {}).get("class_mean", {}).items()
    return {
        "dice": run.dice,
        "in_mean": [name for name, of in means if of is not None and name not in run.facts.get("unshown_classes", ())],
        "warnings": _warnings(run),
        "losses": figures.loss_curves(run.metrics, "finetune", {}),
        "curve": figures.dice_curve(run.curve, "finetune"),
        "overlays": rows,
        "legend": _legend(found, run.facts.get("classes", [])),
    }


def sample_rows(run: RunFolder) -> tuple[list[PictureRow], list[Legend]]:
    """For each kept patch: original, degraded, restored, embedding and, where it may be read, the label."""
    samples = run.samples
    if not samples:
        return [], []
    rows = []
    for i, clean in enumerate(samples["clean"]):
        pictures = [
            Picture(slices.ct_png(samples[key][i], run.window_hu), title)
            for key, title in (("clean", "Original"), ("degraded", "Input"), ("restored", "Restored"))
            if key in samples
        ]
        if "embedding_rgb" in samples:
            pictures.append(Picture(slices.colour_png(samples["embedding_rgb"][i]), "Embedding"))
        if "label" in samples:
            title = "Label" if samples["label"][i].any() else "No label here"
            pictures.append(Picture(slices.label_png(clean, samples["label"][i], run.window_hu), title))
        rows.append(PictureRow(f"patch {i + 1}", pictures))
    found = slices.labels_in(samples["label"]) if "label" in samples else ()
    return rows, _legend(found, run.facts.get("shards", {}).get("classes", []))


def compared_overlays(
    study: StudyFolder, results: StudyResults, *, most_labels: bool = False
) -> tuple[list[PictureRow], list[Legend], dict[str, Any] | None]:
    """The same cases segmented by every start of one (fraction, seed): the fewest (or most) labels that both finished,
    and the first seed."""
    for fraction in sorted(results.fractions, reverse=most_labels):
        for seed in sorted({trial.row["seed"] for trial in study.trials}):
            runs = _runs_with_overlays(study.trials, results.starts, fraction, seed)
            if SCRATCH in runs and len(runs) > 1:
                return *_overlay_rows(runs), {"fraction": percent(fraction), "seed": seed}
    for trial in study.trials:
        if trial.run and trial.run.overlays:
            setting = {"fraction": percent(trial.row["fraction"]), "seed": trial.row["seed"]}
            return *_overlay_rows({trial.row["start"]: trial.run}), setting
    return [], [], None


def _runs_with_overlays(trials: list[Trial], starts: list[str], fraction: float, seed: int) -> dict[str, RunFolder]:
    found = {
        trial.row["start"]: trial.run
        for trial in trials
        if (trial.row["fraction"], trial.row["seed"]) == (fraction, seed) and trial.run and trial.run.overlays
    }
    return {start: found[start] for start in starts if start in found}


def _overlay_rows(runs: dict[str, RunFolder]) -> tuple[list[PictureRow], list[Legend]]:
    first = next(iter(runs.values()))
    rows, labels = [], []
    for i, case in enumerate(first.overlays["cases"].tolist()[:MAX_OVERLAY_CASES]):  # type: ignore[index]
        shown = [(start, run) for start, run in runs.items() if _same_slice(first, run, i)]
        rows.append(PictureRow(case, _overlay_pictures(first, i, shown)))
        labels += [first.overlays["truth"][i]]  # type: ignore[index]
        labels += [run.overlays["prediction"][i] for _, run in shown]  # type: ignore[index]
    return rows, _legend(slices.labels_in(*labels), first.facts.get("classes", []))


def _same_slice(first: RunFolder, other: RunFolder, i: int) -> bool:
    """Whether slice `i` of both runs is the same slice of the same case."""
    a, b = first.overlays, other.overlays
    return (
        a is not None
        and b is not None
        and i < len(b["cases"])
        and a["cases"][i] == b["cases"][i]
        and np.array_equal(a["truth"][i], b["truth"][i])
    )


def _overlay_pictures(run: RunFolder, i: int, predictions: list[tuple[str, RunFolder]]) -> list[Picture]:
    arrays = run.overlays
    assert arrays is not None
    labels = {"Truth": arrays["truth"][i]}
    labels |= {name: other.overlays["prediction"][i] for name, other in predictions}  # type: ignore[index]
    return _pictures(arrays, i, labels, run.window_hu)


def _pictures(arrays: Arrays, i: int, labels: dict[str, np.ndarray], window_hu: tuple[float, float]) -> list[Picture]:
    image = arrays["image"][i]
    box = slices.content_box(image, *labels.values())
    x_mm, y_mm = arrays["spacing"][i].tolist() if "spacing" in arrays else (1.0, 1.0)
    pictures = [Picture(slices.ct_png(image[box], window_hu, (x_mm, y_mm)), "CT")]
    for name, label in labels.items():
        pictures.append(Picture(slices.label_png(image[box], label[box], window_hu, (x_mm, y_mm)), name))
    return pictures


def _legend(labels: Any, classes: list[str]) -> list[Legend]:
    return [Legend(slices.class_colour(k), classes[k - 1] if k <= len(classes) else f"class {k}") for k in labels]


def _paired_figure(results: StudyResults) -> Markup | None:
    return figures.paired_differences(results) if any(c.differences for c in results.comparisons) else None


def _class_figures(results: StudyResults) -> list[Markup]:
    return [
        figures.class_dumbbells(results, comparison.fraction, comparison.start)
        for comparison in results.comparisons
        if comparison.differences and results.classes
    ]


def _summarise_losses(metrics: list[dict[str, float]], chance: dict[str, float]) -> list[str]:
    """First and last value of each term, and what it is by chance where that is known."""
    sentences = []
    for term, title in figures.TERMS.items():
        values = [(row, summary.above_floor(row) if term == "voxel_label" else row.get(term)) for row in metrics]
        logged = [(row["step"], value) for row, value in values if value is not None]
        if len(logged) < 2:
            continue
        (begin, first), (end, last) = logged[0], logged[-1]
        by_chance = f" (chance {chance[term]:.3g})" if term in chance else ""
        sentences.append(f"{title}: {first:.3g} at step {begin}, {last:.3g} at step {end}{by_chance}.")
    return sentences


def _best_of(study: StudyFolder) -> str:
    """What a search of one arm has come to so far."""
    best = study.standing.best
    if not best:
        return "No trial has finished yet."
    where = f"{len(best)} finished {'trial' if len(best) == 1 else 'trials'} of {study.standing.planned}"
    return f"The best of {where} has a Dice of {_dice(best[0].mean)} % on development scans: {best[0].id}."


def _study_provenance(study: StudyFolder) -> list[tuple[str, RunFolder]]:
    """The pre-trainings and one trial, which stands for all: they share code, machine and configuration."""
    runs = [(start.name, start.run) for start in study.starts if start.run]
    trial = next((trial for trial in study.trials if trial.run), None)
    return runs + ([(f"trial {trial.row['id']}", trial.run)] if trial and trial.run else [])


def _time(iso: str | None) -> str:
    return "–" if iso is None else iso[:16].replace("T", " ") + (" UTC" if iso.endswith("+00:00") else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _window(hu: Sequence[float]) -> str:
    return "{:.0f} to {:.0f} HU".format(*hu).replace("-", "−")


def _dice(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _render(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("mixcl_dist.report", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "points": points,
        "percent": percent,
        "number_range": number_range,
        "duration": _duration,
        "time": _time,
        "dice": _dice,
        "window": _window,
        "setting": lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
        "p": lambda value: "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}",
        "billions": lambda number: f"{number / 1e9:.2f}" if number else "0",
        "plain": lambda name: "mean of classes" if name == MEAN else str(name).replace("_", " "),
    }
    style = Markup(resources.files("mixcl_dist.report").joinpath("style.css").read_text())
    return environment.get_template(template).render(style=style, display_window=_window(slices.DISPLAY_HU), **context)
