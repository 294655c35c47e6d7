"""What a run has seen is known by voxels, and a trial's start is held to the trial's budget by them."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil

import nibabel as nib
import numpy as np
import pytest

from mixcl_dist import seen as seen_module
from mixcl_dist.config import load, replace
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.dedup import Scan, scans_of_shards
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.format.fingerprint import fingerprint, voxel_digest
from mixcl_dist.data_shards.sources import open_source
from mixcl_dist.data_shards.volume import CaseError, Volume, resample
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.start import check_start
from mixcl_dist.finetuning.task import budgeted, open_task
from mixcl_dist.phantom import draw_torso, write_cohort
from mixcl_dist.seen import KnownScans, Seen, check_split, leak, shared_scans
from mixcl_dist.settings import BudgetConfig
from mixcl_dist.studies.study import run_study
from mixcl_dist.studies.table.runner import run_table


def patient(number):
    hu, _ = draw_torso((36, 30, 36), 10.0, np.random.default_rng(number))
    return Volume(hu, np.diag([10.0, 10.0, 10.0, 1.0]))


def scan(name, volume, origin="trial"):
    return Scan(name, origin, voxel_digest(volume.hu), fingerprint(volume))


def seen_of(*scans, labels=()):
    """A start that has seen these scans, and read these labels of every one of them."""
    return Seen(tuple(each._replace(origin="start") for each in scans), (frozenset(labels),) * len(scans))


TRIAL = [scan(f"case_{number}", patient(number)) for number in range(4)]
"""Cases 0 and 1 are for training, 2 is kept back for development, 3 for validation; case 0 is the budget."""
RULES = {
    "held_out": {"case_2": "development", "case_3": "validation"},
    "budget": {"case_0": {"liver", "spleen"}},
    "classes": ("liver", "spleen"),
}


def verdict(seen, **changed):
    return leak(shared_scans(seen, TRIAL), **RULES | changed)


def test_a_start_within_the_budget_is_lawful():
    assert verdict(seen_of(TRIAL[0], labels=["liver", "spleen"])) is None
    assert verdict(seen_of(TRIAL[0], TRIAL[1])) is None  # images without labels
    assert verdict(seen_of()) is None


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (2, "case_2", r"development case case_2 \({how}\); train it with budget.development of these cases"),
        (3, "renamed", r"validation case case_3 \(there renamed, {how}\); build its shards with --exclude of"),
    ],
)
@pytest.mark.parametrize(
    ("made_from_it", "how"),
    [
        (lambda v: v, "the same voxels"),
        (lambda v: resample(v, (8.0, 8.0, 12.0)), r"distance 0\.0\d+, below 0.03 is .*"),
    ],
)
def test_an_image_that_is_held_out_is_found_under_any_name_and_resampled(number, name, said, made_from_it, how):
    problem = verdict(seen_of(TRIAL[0], scan(name, made_from_it(patient(number)))))
    assert re.search(said.format(how=how), problem) and "\n" not in problem
    assert ("--budget.distinct_patients" in problem) == ("same voxels" not in problem)


@pytest.mark.parametrize("labels", [(), ("spleen",)])
def test_two_patients_who_look_alike_are_told_apart_by_what_the_message_says_and_equal_voxels_by_nothing(labels):
    alike = [scan(f"it's {n}", resample(patient(n), (8.0, 8.0, 12.0))) for n in (1, 3)]
    given = ()
    for pair in (["case_1", "it's 1"], ["case_3", "it's 3"])[0 if labels else 1 :][:: -1 if labels else 1]:
        (words,) = re.findall(
            r"--budget.distinct_patients (.*)$", verdict(seen_of(*alike, labels=labels), distinct=given)
        )
        settings = load(overrides=[("budget.distinct_patients", *shlex.split(words))]).budget
        assert list(map(list, settings.distinct_patients)) == [*map(list, given), pair]
        given = settings.distinct_patients
    assert verdict(seen_of(*alike, labels=labels), distinct=given) is None
    copy = seen_of(scan("it's 3", patient(3)))
    assert "the same voxels" in verdict(copy, distinct=given)


def test_one_name_does_not_make_one_scan():
    stranger = scan("case_3", patient(9))
    assert verdict(seen_of(stranger, labels=["liver"])) is None


def test_labels_outside_the_budget_are_found_under_any_name():
    problem = verdict(seen_of(scan("renamed", resample(patient(1), (8.0, 8.0, 12.0))), labels=["spleen"]))
    assert re.search(r"labels of case case_1 \(there renamed, distance .*\), spleen first", problem)
    assert "--budget.seed" in problem


def test_labels_of_organs_that_are_not_to_be_learnt_are_no_leak():
    other_organs = seen_of(TRIAL[0], TRIAL[1], labels=["liver"])
    assert verdict(other_organs, classes=("spleen",), budget={"case_0": {"spleen"}}) is None
    assert "liver first" in verdict(other_organs)


def test_a_label_that_the_budget_s_own_case_does_not_have_is_a_leak():
    assert "case_0 (the same voxels), spleen first" in verdict(
        seen_of(TRIAL[0], labels=["spleen"]), budget={"case_0": {"liver"}}
    )


def test_how_many_more_there_are_is_said():
    assert "case_0 (the same voxels) and 1 more" in verdict(seen_of(*TRIAL[:2], labels=["liver"]), budget={})


@pytest.fixture
def start_on(data, tmp_path):
    """A function that builds shards of sources and returns the folder of a run that has seen all of them."""

    def make(*sources, exclude=(), labels=()):
        config = BuildConfig(patch_size=(16, 16, 16))
        build(sources, tmp_path / "shards", config, exclude=exclude, run=in_this_process)
        scans = scans_of_shards(tmp_path / "shards")
        Seen(tuple(scans), (frozenset(labels),) * len(scans)).save(tmp_path)
        return tmp_path

    return make


def checked(start, data):
    task = open_task(data)
    saw, apart = check_start(start, task, budgeted(task, BudgetConfig(fraction=1.0)), KnownScans(start))
    assert apart == []
    return saw


def test_a_validation_scan_in_a_folder_that_names_nobody_is_found_and_can_be_kept_out(start_on, data, tmp_path):
    """The same files without a list: pseudonyms for names, no labels."""
    archive = tmp_path / "archive"
    archive.mkdir()
    for number, image in enumerate(sorted(data.glob("*/images/*.nii.gz"))):
        shutil.copy(image, archive / f"{number}.nii.gz")
    with pytest.raises(RunError, match=r"was trained on validation case validation_000 \(there ct-.*--exclude"):
        checked(start_on(archive), data)
    shutil.rmtree(tmp_path / "shards")
    held_out = tmp_path / "held_out.json"
    validation = [str(case.files[0]) for case in open_source(data).cases if case.split == "validation"]
    held_out.write_text(json.dumps({"test": validation}))
    training = [case.name for case in open_source(data).cases if case.split == "training"]
    assert checked(start_on(archive, exclude=[held_out]), data) == {name: [] for name in sorted(training)}


def test_other_patients_of_the_same_names_are_nobody_s_scans(start_on, data, tmp_path):
    (other, *_) = write_cohort(
        tmp_path / "other", training=4, validation=1, unlabelled=0, size=(36, 30, 36), spacing_mm=10.0, seed=1
    )
    start = start_on(other, labels=["liver"])
    names = {scan.name for scan in scans_of_shards(start / "shards")}
    assert names <= {case.name for case in open_source(data).cases}
    assert checked(start, data) == {}


@pytest.fixture
def with_a_copy(data, tmp_path):
    """The data set with its validation scan, as a function makes it anew, as one more training case."""

    def make(made_from_it=lambda volume: volume):
        folder = shutil.copytree(data, tmp_path / "set")
        content = json.loads((folder / "dataset.json").read_text())
        copy = content["training"][0] | {"image": "another.nii.gz", "label": "another_label.nii.gz"}
        image, label = (nib.load(folder / content["validation"][0][key]) for key in ("image", "label"))
        volume = Volume(np.asarray(image.dataobj), image.affine, np.asarray(label.dataobj).astype(np.uint8))
        volume = made_from_it(volume)
        for key, array in (("image", volume.hu), ("label", volume.label)):
            nib.save(nib.Nifti1Image(array, volume.affine), folder / copy[key])
        (folder / "dataset.json").write_text(json.dumps(content | {"training": [*content["training"], copy]}))
        return folder

    return make


def split_of(folder, known):
    task = open_task(folder)
    return check_split(task.cases, budgeted(task, BudgetConfig(fraction=1.0)), task.held_out, known)


def test_a_scan_in_both_splits_is_named_with_its_other_name_and_the_cure_works(with_a_copy, data, tmp_path):
    folder = with_a_copy()
    what = r"another.nii.gz: training case another has the same voxels as validation case validation_000 \(/.*\); leave"
    with pytest.raises(CaseError, match=what):
        split_of(folder, KnownScans(tmp_path))
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"training": content["training"][:-1]}))
    assert split_of(folder, KnownScans(tmp_path)) is None
    assert split_of(data, KnownScans(tmp_path)) is None


def test_a_scan_that_was_made_from_one_of_the_other_split_is_warned_of(with_a_copy, tmp_path):
    said = split_of(with_a_copy(lambda volume: resample(volume, (8.0, 8.0, 12.0))), KnownScans(tmp_path))
    assert said.startswith("training case another looks like validation case validation_000 (distance 0.0")
    assert "\n" not in said


def test_every_verb_that_fine_tunes_refuses_a_scan_in_both_splits_before_its_folder_is_begun(
    with_a_copy, shards, small_config, tmp_path
):
    folder, out = with_a_copy(), tmp_path / "out"
    config = replace(small_config, {"study.fractions": [1.0], "study.seeds": [0]})
    every = replace(config, {"budget.fraction": 1.0})
    table = replace(
        config, {"table": {"scans": [1], "seeds": [0], "arms": {"scratch": {}}, "baselines": [], "first_arms": []}}
    )
    for verb in (
        lambda: finetune(every, data=folder, start=None, run=out),
        lambda: run_study(config, data=folder, starts=[], study=out),
        lambda: run_table(table, data=folder, shards=shards, out=out),
    ):
        with pytest.raises(CaseError, match="has the same voxels as validation case"):
            verb()
        assert not out.exists()


def test_what_was_seen_is_written_merged_and_read_again(tmp_path):
    first, second = seen_of(TRIAL[0], labels=["liver"]), seen_of(TRIAL[0], TRIAL[1], labels=["aorta"])
    first.merged(second).save(tmp_path)
    loaded = Seen.load(tmp_path)
    assert [each.name for each in loaded.scans] == ["case_0", "case_1"]
    assert loaded.labels == ({"liver", "aorta"}, {"aorta"})
    np.testing.assert_array_equal(loaded.scans[1].fingerprint, TRIAL[1].fingerprint)
    seen_of().save(tmp_path)
    assert Seen.load(tmp_path) == Seen((), ())


def test_a_run_that_does_not_tell_is_refused_in_one_line(tmp_path):
    for content in (None, b"", b"PK broken"):
        if content is not None:
            (tmp_path / "seen.npz").write_bytes(content)
        with pytest.raises(RunError, match=r"seen.npz: does not tell .*make it again"):
            Seen.load(tmp_path)


def test_a_case_is_read_once_for_all_trials(data, tmp_path, monkeypatch):
    cases = open_source(data).cases
    first = KnownScans(tmp_path)
    scans = first.of(cases)
    first.save()
    monkeypatch.setattr(seen_module, "read_scan", lambda item: pytest.fail(f"{item[0].name} is read again"))
    again = KnownScans(tmp_path).of(cases[::-1])[::-1]
    assert [(each.name, each.digest) for each in again] == [(each.name, each.digest) for each in scans]
    renamed = [dataclasses.replace(case, files=(case.files[0].parent / "absent.nii.gz",)) for case in cases[:1]]
    with pytest.raises(pytest.fail.Exception, match="is read again"):
        KnownScans(tmp_path).of(renamed)  # another file is another scan
    (tmp_path / ".scans.npz").write_bytes(b"broken")
    assert KnownScans(tmp_path)._scans == {}
