"""A report says what the run folders hold: no number of its own making, nothing fetched, gaps named."""

from __future__ import annotations

import csv
import html
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_lines
from mixcl_dist.report import figures, slices, write_report
from mixcl_dist.report.folders import open_study
from mixcl_dist.report.results import points, study_results
from mixcl_dist.studies.statistics import t_interval

CLASSES = ["liver", "left_kidney"]
FRACTIONS = (0.05, 0.15)
SEEDS = (0, 1, 2)
STARTS = ("scratch", "mixcl")
ORGAN = (slice(2, 6), slice(3, 12))


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_pretraining(folder: Path, training_cases: list[str]) -> None:
    facts = {"kind": "pretrain", "name": folder.name, "started": "2025-01-01T10:00:00+00:00", "finished": None}
    facts |= {
        "warnings": {"label_anchors": "8 label anchors a step at step 1"},
        "training_cases": training_cases,
        "label_cases": ["t0"],
        "parameters": 1000,
        "seconds": 60.0,
    }
    write(folder / "run.json", facts)
    steps = [
        {"step": step, "loss": 9 - step / 10, "voxel_identity": 5 - step / 20, "voxel_identity_floor": 2.5}
        | {"learning_rate": 1e-3, "samples_per_s": 7.0, "data_wait_share": 0.02, "voxel_label_anchors": 8.0}
        | ({"gradient_norm_voxel_identity": 3.0, "effective_rank": 12.0} if step % 10 == 0 else {})
        for step in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 41, "lo')
    slice_ = np.zeros((2, 16, 16), dtype=np.float16)
    label = np.zeros((2, 16, 16), dtype=np.uint8)
    label[0][ORGAN] = 1
    pictures = {"clean": slice_, "degraded": slice_, "restored": slice_, "label": label, "step": np.array(40)}
    np.savez(folder / "samples.npz", **pictures, embedding_rgb=np.zeros((2, 16, 16, 3), dtype=np.float16))
    network = {"architecture": "dynunet", "filters": [4, 8, 8], "window_hu": [-1000, 1000], "spacing_mm": None}
    write(folder / "network.json", network | {"classes": CLASSES})


def write_trial(folder: Path, scores: dict[str, float], fraction: float, start: str | None = None) -> None:
    facts = {"kind": "finetune", "name": folder.name, "started": "2025-01-01T10:00:00+00:00", "finished": None}
    facts |= {"label_cases": [f"t{i}" for i in range(round(fraction * 20))], "validation_cases": ["v0", "v1"]}
    facts |= {"training_cases": ["t0", "t1", "t2", "v1"]}  # with those of its start
    write(folder / "run.json", facts | {"classes": CLASSES, "start": start})
    cases = {"v0": scores, "v1": {"liver": scores["liver"], "left_kidney": None}}
    write(folder / "dice.json", {"classes": CLASSES, "cases": cases, "class_mean": scores, "mean": 0.5})
    truth = np.zeros((1, 16, 24), dtype=np.uint8)
    truth[0][ORGAN] = 2
    image = np.zeros((1, 16, 24), dtype=np.float16)
    overlays = {"image": image, "truth": truth, "prediction": truth, "cases": np.array(["v0"])}
    np.savez(folder / "overlays.npz", **overlays, spacing=np.array([[2.0, 1.0]]))


def dice_of(start: str, fraction: float, seed: int) -> dict[str, float]:
    rng = np.random.default_rng([STARTS.index(start), round(100 * fraction), seed])
    return {name: float(rng.uniform(0.5, 0.6) + 0.2 * (start == "mixcl")) for name in CLASSES}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    write_pretraining(tmp_path / "pre", ["t0", "t1"])
    trials = []
    for fraction in FRACTIONS:
        for seed in SEEDS:
            for start in STARTS:
                name = f"{start}-{fraction}-{seed}"
                scores = dice_of(start, fraction, seed)
                write_trial(folder / "trials" / name, scores, fraction, "../pre" if start == "mixcl" else None)
                row = {"id": name, "start": start, "fraction": fraction, "seed": seed, "run": f"trials/{name}"}
                row |= {"status": "done", "mean": sum(scores.values()) / 2, "class_mean": scores}
                trials.append(row | {"seconds": 75.0, "params": {}, "error": None})
    starts = ["scratch", {"name": "mixcl", "path": "../pre"}]
    write(folder / "study.json", {"kind": "study", "name": "few labels", "starts": starts, "trials": trials})
    return folder


def change_trials(study: Path, change) -> None:
    facts = json.loads((study / "study.json").read_text())
    for row in facts["trials"]:
        row |= change(row) or {}
    write(study / "study.json", facts)


class Page(HTMLParser):
    """The text, the addresses and the pictures of a page; refuses tags that are not closed in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.addresses, self.images, self.ids, self._open = "", [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self._open.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "action")]
        self.ids += [v for k, v in attributes if k == "id"]
        self.images += [v for k, v in attributes if tag == "img" and k == "alt"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " "


def test_page_is_one_file_that_fetches_nothing(study):
    index = write_report(study)
    page = Page(index)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert "http" not in index.read_text() and "@import" not in index.read_text()
    assert len(page.ids) == len(set(page.ids))


def test_numbers_are_those_of_an_independent_computation(study):
    write_report(study)
    report = json.loads((study / "report" / "report.json").read_text())
    for comparison, fraction in zip(report["results"]["comparisons"], FRACTIONS, strict=True):
        means = {start: [np.mean(list(dice_of(start, fraction, seed).values())) for seed in SEEDS] for start in STARTS}
        test = stats.ttest_rel(means["mixcl"], means["scratch"])
        interval = test.confidence_interval(0.95)
        assert comparison["summary"]["n"] == 3
        assert comparison["summary"]["mean"] == pytest.approx(np.subtract(means["mixcl"], means["scratch"]).mean())
        assert comparison["summary"]["low"] == pytest.approx(interval.low)
        assert comparison["summary"]["high"] == pytest.approx(interval.high)
    row = next(row for row in report["results"]["per_class"] if row["name"] == "liver")
    assert row["scratch"]["summary"]["sd"] == pytest.approx(
        np.std([dice_of("scratch", 0.05, seed)["liver"] for seed in SEEDS], ddof=1)
    )


def test_csv_holds_every_trial_and_class(study):
    write_report(study)
    rows = list(csv.DictReader((study / "report" / "report.csv").open()))
    assert len(rows) == len(STARTS) * len(FRACTIONS) * len(SEEDS) * (len(CLASSES) + 1)
    row = next(row for row in rows if row["id"] == "mixcl-0.15-2" and row["class"] == "left_kidney")
    assert float(row["dice"]) == dice_of("mixcl", 0.15, 2)["left_kidney"]


def test_headline_says_raised_only_where_the_interval_leaves_out_zero(study):
    def flip_one_seed(row):
        if row["start"] == "mixcl" and row["fraction"] == 0.15 and row["seed"] == 0:
            return {"mean": 0.1}

    change_trials(study, flip_one_seed)
    write_report(study)
    few, more = json.loads((study / "report" / "report.json").read_text())["headline"]
    assert few.startswith("With 5 % of the labels (1 case), pre-training raised mean Dice from ")
    assert "raised" not in more and "includes 0: these trials cannot tell" in more and "3 pairs" in more


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    assert [points(value) for value in (-0.0001, 0.0001, -0.019, None)] == ["+0.0", "+0.0", "−1.9", "–"]


def test_one_pair_has_no_interval_and_says_so(study):
    def fail_other_seeds(row):
        if row["seed"] > 0:
            return {"status": "failed", "mean": None, "class_mean": None, "error": "out of <memory>"}

    change_trials(study, fail_other_seeds)
    page = Page(write_report(study))
    assert "in one pair of trials, too few for an interval" in page.text
    assert "needs 2 pairs" in page.text
    assert "8 failed" in page.text and "out of <memory>" in page.text


def test_failed_partner_takes_its_pair_out_but_not_the_other_arm(study):
    def fail(row):
        if row["id"] == "mixcl-0.05-1":
            return {"status": "failed", "mean": None, "class_mean": None}

    change_trials(study, fail)
    write_report(study)
    results = json.loads((study / "report" / "report.json").read_text())["results"]
    assert results["comparisons"][0]["differences"].keys() == {"0", "2"}
    assert [cell["summary"]["n"] for cell in results["cells"][:2]] == [3, 2]


def test_of_several_draws_the_best_is_shown_and_the_page_warns(study):
    facts = json.loads((study / "study.json").read_text())
    first = facts["trials"][0]
    facts["trials"].append(first | {"id": "again", "mean": 0.99, "params": {"finetune.learning_rate": 1e-4}})
    write(study / "study.json", facts)
    page = Page(write_report(study))
    report = json.loads((study / "report" / "report.json").read_text())
    assert report["results"]["cells"][0]["values"]["0"] == 0.99
    assert "makes all Dice values optimistic" in page.text


def test_same_case_is_shown_for_both_starts_and_pretraining_beside_it(study):
    page = Page(write_report(study))
    assert {"v0, Truth", "v0, scratch", "v0, mixcl", "patch 1, Embedding", "patch 2, No label here"} <= set(page.images)
    assert "Voxel identity: 4.95 at step 1, 3 at step 40." in page.text
    assert "Cases" in page.text and "not finished" in page.text


def test_the_first_screen_shows_a_ct_its_labels_both_predictions_and_the_result(study):
    page = write_report(study).read_text()
    start = page.index("At a glance")
    glance = page[start : page.index("</section>", start)]
    assert re.findall(r'alt="v0, ([^"]*)"', glance) == ["CT", "Truth", "scratch", "mixcl"]
    assert glance.count("<img") == 4 and page.index("<img") > start
    for start_name in STARTS:
        means = [np.mean(list(dice_of(start_name, max(FRACTIONS), seed).values())) for seed in SEEDS]
        assert f"{100 * np.mean(means):.1f}" in glance
    assert f"{100 * max(FRACTIONS):g} % of the labels, seed {SEEDS[0]}" in glance


def test_validation_case_in_pretraining_is_called_a_leak(study):
    """By what the trial found of its scans in the start, whatever they are called there."""
    write_pretraining(study.parent / "pre", ["t0", "v1"])  # another patient of the same name
    assert study_results(open_study(study)).protocol[0]["validation_cases_seen"] == []
    for file in study.glob("trials/mixcl-*/run.json"):
        write(
            file, json.loads(file.read_text()) | {"start_saw": {"v1": [], "t0": ["liver"], "t9": ["liver"], "t8": []}}
        )
    text = " ".join(Page(write_report(study)).text.split())
    assert "1: a leak v1" in text and "1 cases t9" in text


@pytest.mark.parametrize("missing", ["trials/mixcl-0.05-0/overlays.npz", "trials/scratch-0.05-0/run.json", "../pre"])
def test_what_is_missing_is_left_out(study, missing):
    path = study / missing
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    assert "raised mean Dice" in Page(write_report(study)).text


def test_study_that_has_only_begun_has_a_page(study):
    change_trials(study, lambda row: {"status": "pending", "mean": None, "class_mean": None, "seconds": None})
    for trial in (study / "trials").iterdir():
        for file in trial.iterdir():
            file.unlink()
    page = Page(write_report(study))
    assert "no finished pair of trials yet" in page.text and "12 pending" in page.text


def test_finetuning_run_has_its_table_by_class_and_case(study):
    run = study / "trials" / "mixcl-0.05-0"
    page = Page(write_report(run))
    assert "Mean Dice 50.0 % over 2 classes on 2 validation cases" in page.text
    rows = list(csv.DictReader((run / "report" / "report.csv").open()))
    assert rows[-1] == {"case": "v1", "class": "left_kidney", "dice": ""}


def test_a_finetuning_runs_headline_counts_the_classes_that_its_mean_is_of(study):
    run = study / "trials" / "mixcl-0.05-0"
    facts, dice = (json.loads((run / name).read_text()) for name in ("run.json", "dice.json"))
    write(run / "run.json", facts | {"unshown_classes": ["left_kidney"]})
    assert "Mean Dice 50.0 % over 1 class on" in Page(write_report(run)).text
    write(run / "run.json", facts)
    write(run / "dice.json", dice | {"class_mean": {"liver": 0.5, "left_kidney": None}})  # annotated in no scored case
    assert "Mean Dice 50.0 % over 1 class on" in Page(write_report(run)).text


def test_a_finetuning_run_shows_its_dice_by_step_where_it_has_development_scans(study):
    run = study / "trials" / "mixcl-0.05-0"
    write_lines(run / "metrics.jsonl", [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 1.5}])
    assert "Dice on development scans" not in write_report(run).read_text()
    write_lines(
        run / "curve.jsonl", [{"step": 10, "mean": 0.25}, {"step": 20, "mean": None}, {"step": 30, "mean": 0.5}]
    )
    page = write_report(run).read_text()
    assert "Dice on development scans (%) by step" in page and "give more finetune.steps" in page


def test_pretraining_run_has_its_page_and_metrics_as_csv(study):
    page = Page(write_report(study.parent / "pre"))
    assert "Trained for 40 steps so far on 2 CT volumes by voxel identity." in page.text
    rows = list(csv.DictReader((study.parent / "pre" / "report" / "report.csv").open()))
    assert len(rows) == 40 and float(rows[-1]["voxel_identity"]) == 3.0


def test_pretraining_page_shows_what_was_measured_beside_the_loss_with_advice_and_warnings(study):
    index = write_report(study.parent / "pre")
    text = Page(index).text
    assert "8 label anchors a step at step 1" in text
    for advice in ("Good: several hundred; below the line (100)", "hardly hears it", "5 % of it"):
        assert advice in text
    assert "falls towards −4" not in text  # uniformity was not logged
    assert {"Gradient of each term on the backbone", "Label anchors a step", "Effective rank of voxel rows"} <= {
        label for label in re.findall(r'aria-label="([^"]*)"', index.read_text())
    }


def text_of_pretraining(run: Path, steps: list[dict], config: str = "", **facts: object) -> str:
    known = {"kind": "pretrain", "name": "run", "finished": "2025-01-01T10:00:00+00:00", "label_cases": []}
    write(run / "run.json", known | facts)
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "config.yaml").write_text(config)
    return Page(write_report(run)).text


STEPS = [
    {"step": step, "voxel_identity": 6.0, "voxel_identity_similarity": 0.5 + step / 100, "reconstruction": 1 / step}
    | {
        "voxel_label": 5.0,
        "voxel_label_floor": 4.0 + step / 100,
        "voxel_label_anchors": 90.0 + step,
        "samples": 4 * step,
    }
    for step in range(1, 21)
]
BATCHES = "{engine: {accumulation_steps: 2}, pretrain: {batch_size: 8}, rows: {per_view_pair: 16}}"


def test_a_pretrainings_headline_says_on_what_by_which_terms_and_what_it_learnt(tmp_path):
    text = text_of_pretraining(tmp_path, STEPS, training_cases=["a", "b", "c"], label_cases=["a"])
    assert (
        "Trained for 20 steps on 3 CT volumes (80 patches drawn) by voxel identity, voxel labels of 1 scan (100 label "
        "anchors a step) and reconstruction: similarity of a voxel's two views 0.515 → 0.695; label loss above its "
        "floor 0.985 → 0.805; reconstruction error 0.75 → 0.0513."
    ) in text


def test_a_label_term_without_labels_is_said_to_be_off(tmp_path):
    without = [{k: v for k, v in step.items() if k not in ("voxel_label", "voxel_label_floor")} for step in STEPS]
    text = text_of_pretraining(tmp_path, [step | {"voxel_label_anchors": 0.0} for step in without])
    assert "by voxel identity and reconstruction:" in text and "label term is off" in text and "budget.scans" in text
    assert "above its floor" not in text and "label term is off" not in text_of_pretraining(tmp_path, STEPS)


def test_an_identity_loss_stands_beside_chance_and_a_label_loss_above_its_floor(tmp_path):
    """Chance is InfoNCE's value when all embeddings are one: the twin is one of all other rows of the batch."""
    rows = 2 * (8 // 2) * 16
    chance = -np.log(np.exp(0) / (np.exp(np.zeros(rows - 1)).sum()))
    text = text_of_pretraining(tmp_path, STEPS, BATCHES)
    assert f"Voxel identity: 6 at step 1, 6 at step 20 (chance {chance:.3g})." in text
    assert "Voxel label, above its floor: 0.99 at step 1, 0.8 at step 20." in text


def test_captions_tell_only_of_what_is_drawn(tmp_path, study):
    short = text_of_pretraining(tmp_path, [{k: v for k, v in s.items() if "label" not in k} for s in STEPS])
    assert not [line for line in ("running mean", "Chance", "floor", "Embedding") if line in short]
    long = text_of_pretraining(tmp_path, [s | {"step": s["step"] + 20 * k} for k in (0, 1) for s in STEPS], BATCHES)
    assert "thick: running mean" in long and "Chance is where" in long and "cannot fall below its floor" in long
    change_trials(study, lambda row: {"status": "failed"} if row["seed"] else {})
    once = Page(write_report(study)).text
    assert not [line for line in ("t-interval", "grey line", "one standard deviation") if line in once]


def test_what_was_measured_once_is_drawn_and_what_never_was_is_not_named():
    once = [{"step": 5, "alignment": 0.5, "gradient_norm_voxel_identity": 1.0, "gradient_norm_voxel_label": 0.0}]
    gradients, alignment = (figure for figure, _ in figures.diagnostic_curves(once, "run", embedding_width=8))
    assert "Voxel identity" in gradients and "Voxel label" not in gradients
    assert re.search(r"<g clip-path[^>]*>\s*<use ", alignment), "a point, as a line of one has no length"


def test_a_curve_that_does_not_move_has_an_axis_that_can_be_read():
    drawn = figures.rate_curves([{"step": step, "data_wait_share": 0.02} for step in range(1, 60)], "still")[0]
    marks = re.findall(r">([0-9.]+)</text>", drawn)
    assert len(set(marks)) == len(marks) > 4, marks


def test_every_title_has_room_above_its_panel():
    titles = [*figures.TERMS.values(), *figures.RATES.values(), *(one.title for one in figures.DIAGNOSTICS.values())]
    assert max(map(len, titles)) <= len(figures.TERM_GRADIENTS.title) == 37, "which just fits"


def test_development_cases_are_not_called_validation_cases(study):
    for file in [study / "study.json", *study.glob("trials/*/run.json")]:
        write(file, json.loads(file.read_text()) | {"scored": "development"})
    assert "Development cases at 5 %" in Page(write_report(study)).text
    assert "Development cases, the slice" in Page(write_report(study / "trials" / "mixcl-0.05-0")).text


@pytest.mark.parametrize("folder", ["study", "study/trials/scratch-0.05-0"])
def test_words_of_the_field_are_explained(study, folder):
    text = Page(write_report(study.parent / folder)).text
    assert "Dice : how far" in text and "Scratch : the same network" in text


def simulated(colour: str) -> list[np.ndarray]:
    """Lab of a colour as seen with full colour vision and without red, green or blue (Machado et al. 2009)."""
    code = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    seen = [np.eye(3)] + [np.array(m) for m in DEFICIENCIES]
    white = TO_XYZ.sum(axis=1)
    found = []
    for matrix in seen:
        x, y, z = np.cbrt(TO_XYZ @ np.clip(matrix @ linear, 0, 1) / white)
        found.append(np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    return found


TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
DEFICIENCIES = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
)


def test_eight_classes_can_be_told_apart_by_anyone_and_stand_out_from_dark_tissue():
    colours = [slices.class_colour(k) for k in range(1, 17)]
    assert len(set(colours)) == 16
    for one, other in itertools.combinations(colours[:8], 2):
        distances = [np.linalg.norm(a - b) for a, b in zip(simulated(one), simulated(other), strict=True)]
        assert distances[0] > 30 and min(distances) > 17, (one, other, distances)
    tissue = simulated("#333333")[0][0]
    assert all(simulated(colour)[0][0] - tissue > 30 for colour in colours)


@pytest.mark.parametrize("folder", ["study", "pre", "study/trials/mixcl-0.05-0"])
def test_nothing_overflows_on_a_telephone(study, folder, width_on_a_telephone):
    assert width_on_a_telephone(write_report(study.parent / folder)) <= 420


def test_run_that_has_logged_nothing_says_so(tmp_path):
    write(tmp_path / "run" / "run.json", {"kind": "pretrain", "name": "run", "finished": None, "label_cases": []})
    text = Page(write_report(tmp_path / "run")).text
    assert "No loss has been logged yet" in text and "No pictures were kept" in text


HOSTILE = (
    ("$\\frac$", "a&b<c>", "{{ 7 * 7 }}", "\\", "</style><script>alert(1)</script>"),
    ("$x^$", '" onload="x', "=1+1", "$\\frac{1}{2}$", "../../x"),
    ("_hidden", "a\nb", "x" * 5000, "\x1b[31m", "%s{}"),
)


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.found |= {(tag, name) for name, _ in attributes} | {(tag, "")}


@pytest.mark.parametrize("texts", HOSTILE)
def test_text_of_a_strangers_study_is_shown_as_text(study, texts):
    """In names of classes, starts, cases and the study; in figures too, where $...$ would be a formula."""
    known = Tags(write_report(study)).found
    renamed = dict(zip(("liver", "mixcl", "v0", "few labels", "t0"), texts, strict=True))
    for file in [*study.rglob("*.json"), study.parent / "pre" / "run.json"]:
        if file.parent.name != "report":
            tree = file.read_text()
            for old, new in renamed.items():
                tree = tree.replace(json.dumps(old), json.dumps(new))
            file.write_text(tree)
    page = write_report(study)
    assert Tags(page).found <= known
    svgs = " ".join(re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL))
    for text in texts[:2]:
        assert html.escape(" ".join(text.split()).lstrip("_"), quote=False) in svgs
    cells = [cell for row in csv.reader((study / "report" / "report.csv").open()) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "@"))]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("report", "../private"),
        ("trials/mixcl-0.05-0", "../../private"),
        ("trials/mixcl-0.05-0/config.yaml", "../../../private/config.yaml"),
        ("trials/mixcl-0.05-0/overlays.npz", "../../../private/overlays.npz"),
        ("study.json", "../private/run.json"),
    ],
)
def test_a_link_out_of_a_strangers_folder_is_neither_followed_nor_written_through(study, link, target):
    private = study.parent / "private"
    write_trial(private, dict.fromkeys(CLASSES, 0.5), 0.05)
    (private / "config.yaml").write_text("secret: here")
    before = {file: file.read_bytes() for file in private.iterdir()}
    if (study / link).is_dir():
        shutil.rmtree(study / link)
    (study / link).unlink(missing_ok=True)
    (study / link).symlink_to(target)
    with pytest.raises(RunError, match="leads out of") as error:
        write_report(study)
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in private.iterdir()} == before


def test_a_trial_elsewhere_is_refused(study):
    write_trial(study.parent / "private", dict.fromkeys(CLASSES, 0.5), 0.05)
    change_trials(study, lambda row: {"run": "../private"} if row["id"] == "mixcl-0.05-0" else {})
    with pytest.raises(RunError, match="leads out of"):
        write_report(study)


def test_a_start_is_shown_only_where_a_trial_tells_what_it_was_trained_on(study):
    """So that a stranger's study cannot show a run of mine, nor mine a later run at the start's path."""
    (study.parent / "pre" / "config.yaml").write_text("budget: {full_datasets: [secret]}")
    assert "secret" in write_report(study).read_text()
    write_pretraining(study.parent / "pre", ["another patient"])
    page = write_report(study).read_text()
    assert "secret" not in page and "another patient" not in page and "not checked" in page


def test_links_within_the_folder_are_followed(study):
    trial = study / "trials" / "mixcl-0.05-0"
    trial.rename(study / "kept")
    trial.symlink_to("../kept")
    assert "raised mean Dice" in Page(write_report(study)).text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("study.json", "{", "cannot be read"),
        ("study.json", '{"name": "s", "starts": []}', "'trials' is missing"),
        ("study.json", '{"name": "s", "trials": [{"id": "a"}], "starts": []}', "'trials.0.start' is missing"),
        ("trials/scratch-0.05-0/run.json", "[]", "kind is None, not finetune"),
        ("trials/scratch-0.05-0/overlays.npz", "cut", "not a whole .npz file"),
        ("trials/scratch-0.05-0/dice.json", "{}", "'classes' is missing"),
        ("../pre/metrics.jsonl", "{\n{}", "line 1: cannot be read"),
    ],
)
def test_broken_file_is_named_in_one_line_with_the_cure(study, file, content, message):
    (study / file).write_text(content)
    with pytest.raises(RunError, match=message) as error:
        write_report(study)
    assert Path(file).name in str(error.value) and "\n" not in str(error.value)


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="neither a run"):
        write_report(tmp_path)


def test_picture_has_anterior_up_and_the_patients_right_on_its_left_side():
    marked = np.zeros((20, 30))
    marked[15:, 25:] = 1  # right and anterior
    shown = slices.enlarged(marked, (1.0, 1.0), order=0)
    height, width = shown.shape
    assert shown[: height // 6, : width // 5].all()
    assert shown.sum() == pytest.approx(shown.size / 24, rel=0.05)


def test_picture_has_the_bodys_proportions():
    height, width = slices.enlarged(np.zeros((20, 30)), (3.0, 1.0), order=0).shape
    assert width / height == pytest.approx(2.0)


def test_t_interval_agrees_with_scipy_and_needs_two_values():
    values = [0.01, 0.04, 0.02, 0.07]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = t_interval(values)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    assert (t_interval([0.3]).mean, t_interval([0.3]).low) == (0.3, None)
    assert t_interval([]).mean is None and not t_interval([0.3]).excludes_zero
