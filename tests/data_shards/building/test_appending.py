"""Append: more cases become more shards, what is there stays as it is, and a killed append loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import webdataset as wds

from mixcl_dist.data_shards.building import build as building
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildError
from mixcl_dist.data_shards.format.manifest import CASES_FILE, CLASSES_FILE, Manifest, case_of
from mixcl_dist.data_shards.inspection.verify import verify

from .reading import begin, finish, kill, published, script

build = partial(building.build, run=in_this_process)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in published(folder).items() if name.startswith("shard")}


def edit(source: Path, change) -> None:
    content = json.loads((source / "dataset.json").read_text())
    change(content)
    (source / "dataset.json").write_text(json.dumps(content))


def hold_back(source: Path, *names: str) -> list[dict]:
    """Take cases out of a data set; returns their entries."""
    held = []

    def change(content: dict) -> None:
        entries = content["training"]
        held.extend(entry for entry in entries if Path(entry["image"]).name.split(".")[0] in names)
        content["training"] = [entry for entry in entries if entry not in held]

    edit(source, change)
    return held


def put_back(source: Path, entries: list[dict]) -> None:
    edit(source, lambda content: content["training"].extend(entries))


@pytest.fixture
def grown(cohort, small_config, tmp_path):
    """A data set of a, b, c, of which a and b were built first, and the folder before the append of c."""
    source, out = cohort("a", "b", "c", labelled=1), tmp_path / "out"
    held = hold_back(source, "c")
    build([source], out, small_config)
    before = published(out)
    put_back(source, held)
    return source, out, before


def test_new_cases_become_further_shards_and_the_old_ones_stay_byte_for_byte(grown, small_config):
    source, out, before = grown
    result = build([source], out, small_config)
    assert [case.name for case in result.manifest.cases] == ["a", "b", "c"] and (result.added, result.absent) == (1, 0)
    after = published(out)
    old = {name for name in before if name.startswith("shard")}
    assert all(after[name] == before[name] for name in old)
    assert verify(out) == []
    new = sorted(name for name in after if name.endswith(".tar") and name not in old)
    appended = wds.WebDataset([str(out / name) for name in new], shardshuffle=False)
    assert {case_of(sample["__key__"]) for sample in appended} == {"c"}
    assert sum(case.patches for case in result.manifest.cases) == result.manifest.patches


def test_the_histograms_and_tables_are_those_of_one_build(grown, small_config, tmp_path):
    source, out, _ = grown
    appended = build([source], out, small_config).manifest
    whole = build([source], tmp_path / "whole", small_config).manifest
    for field in ("cases", "hu_histogram", "spacing_histogram", "annotated", "classes", "settings"):
        assert getattr(appended, field) == getattr(whole, field), field


def test_an_unchanged_case_is_not_read_again(grown, small_config):
    source, out, _ = grown
    for name in ("a", "b"):  # a file of the same size and time is taken for unchanged without a look inside
        path, stat = source / f"{name}.nii.gz", (source / f"{name}.nii.gz").stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = build([source], out, small_config)
    assert result.added == 1 and result.quarantined == []


@pytest.mark.parametrize("forget", [False, True])
def test_a_file_that_was_only_touched_is_known_by_its_voxels(grown, small_config, forget):
    source, out, before = grown
    for path in source.glob("*.nii.gz"):
        os.utime(path)
    if forget:
        shutil.rmtree(out / ".build")
    result = build([source], out, small_config)
    assert [case.name for case in result.manifest.cases] == ["a", "b", "c"] and result.quarantined == []
    assert shards_of(out).items() >= {n: c for n, c in before.items() if n.startswith("shard")}.items()


def test_a_changed_case_stays_as_it_was_and_is_named(grown, small_config):
    source, out, _ = grown
    image = nib.load(source / "b.nii.gz")
    changed = np.asarray(image.dataobj).copy()
    changed[20, 18, 15] += 1
    nib.save(nib.Nifti1Image(changed, image.affine), source / "b.nii.gz")
    label = nib.load(source / "a_label.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) * 0, label.affine), source / "a_label.nii.gz")
    result = build([source], out, small_config)
    assert [case.name for case in result.manifest.cases] == ["a", "b", "c"], "the new one is appended all the same"
    lines = [str(problem) for problem in result.quarantined]
    assert any("case b has other voxels than in the shards" in line and "rename it" in line for line in lines)
    assert any("case a has other labels than in the shards" in line for line in lines) and len(lines) == 2
    assert verify(out) == []
    assert len(build([source], out, small_config).quarantined) == 2, "said again, as long as it is so"


def test_a_case_that_becomes_one_to_test_on_is_not_passed_over(grown, small_config):
    source, out, _ = grown
    held = hold_back(source, "b")
    edit(source, lambda content: content.update(validation=[held[0] | {"label": "a_label.nii.gz"}]))
    (line,) = [str(problem) for problem in build([source], out, small_config).quarantined]
    assert "case b is in the shards, but its split is validation now" in line


def test_a_case_that_is_gone_stays_in_the_shards_and_is_counted(grown, small_config, cohort):
    _, out, _ = grown
    result = build([cohort("d")], out, small_config)
    assert [case.name for case in result.manifest.cases] == ["a", "b", "d"] and (result.added, result.absent) == (1, 2)


def test_a_copy_of_a_stored_scan_is_not_appended(grown, small_config):
    source, out, _ = grown
    shutil.copy(source / "a.nii.gz", source / "again.nii.gz")
    put_back(source, [{"image": "again.nii.gz"}])
    (line,) = [str(problem) for problem in build([source], out, small_config).quarantined]
    assert "again.nii.gz: has the same voxels as case a" in line


def test_classes_grow_at_the_end_and_stored_labels_keep_their_numbers(cohort, small_config, tmp_path):
    first, second, out = cohort("a", labelled=1), cohort("b", labelled=1), tmp_path / "out"
    build([first], out, small_config)
    names = {str(number): f"organ{number}" for number in range(2, 11)}  # more than one byte of bits
    edit(second, lambda content: content.update(labels={"0": "background", "1": "organ1"} | names))
    manifest = build([second, first], out, small_config).manifest
    assert manifest.classes == ("core", *(f"organ{number}" for number in range(1, 11)))
    cases, present = (manifest.check_table(n, (out / n).read_bytes(), out / n) for n in (CASES_FILE, CLASSES_FILE))
    bits = np.unpackbits(present, axis=1, bitorder="little")
    assert present.shape == (manifest.patches, 2)
    assert set(np.flatnonzero(bits[cases == 0].any(axis=0))) == {0}, "core keeps the number 1"
    assert set(np.flatnonzero(bits[cases == 1].any(axis=0))) == {1}, "organ1, stored as 1 in its file, is 2"
    assert verify(out) == []


def test_settings_must_stay(grown, small_config):
    source, out, _ = grown
    with pytest.raises(BuildError, match=r"was begun with build\.seed = 0"):
        build([source], out, dataclasses.replace(small_config, seed=1))


@pytest.mark.slow
def test_an_append_killed_again_and_again_ends_with_the_same_bytes_and_the_old_set_can_be_read_all_the_while(
    grown, small_config, tmp_path, cohort
):
    source, out, before = grown
    put_back(source, [{"image": str(cohort("d") / "d.nii.gz")}])
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    build([source], whole, small_config)
    first_new = sum(name.endswith(".tar") for name in before)
    for table in (CASES_FILE, CLASSES_FILE):
        (tmp_path / table).write_bytes(before[table])
    is_new = "(out / '{0}').read_bytes() != (out.parent / '{0}').read_bytes()".format
    moments = {
        "a case is being written": "list(out.glob('.build/cases/.*.tar.*.tmp'))",
        "a case is done": "list(out.glob('.build/cases/*.outcome.json'))",
        "a shard has no index yet": "len(list(out.glob('*.tar'))) > len(list(out.glob('*.index.json')))",
        "a later shard is being written": f"(out / 'shard-{first_new + 1:06d}.tar').exists()",
        "one table is the new one": is_new(CASES_FILE),
        "both tables are": is_new(CLASSES_FILE),
    }
    for number, (moment, expression) in enumerate(moments.items()):
        kill(begin(tmp_path, source, out, 1 + number % 2, expression))
        assert (out / "manifest.json").read_bytes() == before["manifest.json"], moment
        old = Manifest.load(out)
        for name in old.tables:
            old.check_table(name, (out / name).read_bytes(), out / name)
        assert shards_of(out).items() >= {n: c for n, c in before.items() if n.startswith("shard")}.items(), moment
    subprocess.run([sys.executable, script(tmp_path), source, out, "2"], check=True)
    assert published(out) == published(whole)
    assert verify(out) == [] and not (out / ".build" / "cases").exists() and not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_when_the_sources_change_while_a_build_is_interrupted_only_what_changed_is_done_again(
    cohort, small_config, tmp_path
):
    source, out = cohort("a", "b", "c"), tmp_path / "out"
    kill(begin(tmp_path, source, out, 1, "(out / 'shard-000001.tar').exists()"))
    spooled = {path.name: path.stat().st_mtime_ns for path in (out / ".build" / "cases").glob("[ab].tar")}
    assert len(spooled) == 2
    hold_back(source, "c")
    more = cohort("d")
    put_back(source, [{"image": str(more / "d.nii.gz")}])
    again = begin(tmp_path, source, out, 1, "(out / '.build/cases/d.outcome.json').exists()")
    kept = {path.name: path.stat().st_mtime_ns for path in (out / ".build" / "cases").glob("[ab].tar")}
    assert finish(again) == 0 and kept == spooled, "a and b are not read again"
    build([source], tmp_path / "whole", small_config)
    assert published(out) == published(tmp_path / "whole")


def renamed(source: Path, old: str, new: str) -> Path:
    """The data set with one scan called otherwise."""
    (source / f"{old}.nii.gz").rename(source / f"{new}.nii.gz")
    text = (source / "dataset.json").read_text().replace(f'"{old}.nii.gz"', f'"{new}.nii.gz"')
    (source / "dataset.json").write_text(text)
    return source


def test_cases_of_two_sources_with_one_name_are_told_apart(cohort, small_config, tmp_path, caplog):
    one, other = cohort("a", "b"), renamed(cohort("c"), "c", "a")
    names = ["a", "b", f"{other.name}-a"]
    result = build([one, other], tmp_path / "out", small_config)
    assert [case.name for case in result.manifest.cases] == names and result.quarantined == []
    assert f"1 cases of {other.name} have names of others" in caplog.text and names[2] in caplog.text
    again = build([other, one], tmp_path / "out", small_config)  # whatever the order: the shards know whose name it is
    assert again.quarantined == [] and again.added == 0 and again.absent == 0
    moved = Path(shutil.copytree(one, tmp_path / "moved"))
    for sources in ([other], [moved, other]):
        again = build(sources, tmp_path / "out", small_config)
        assert again.quarantined == [] and again.added == 0
    assert [case.name for case in build([other, one], tmp_path / "new", small_config).manifest.cases] == [
        "a",
        f"{one.name}-a",
        "b",
    ]


def test_data_sets_of_one_name_are_said_and_told_apart_by_the_advice(cohort, small_config, tmp_path, caplog):
    """Budgets and counts go by a data set's name."""
    here, there = (shutil.copytree(cohort(name, labelled=1), tmp_path / name / "ct") for name in "ab")
    assert build([here, there], tmp_path / "out", small_config).manifest.annotated == {"ct": {"core": 2}}
    assert "2 data sets are called ct, so they share one label budget" in caplog.text
    caplog.clear()
    build([here], tmp_path / "grown", small_config)
    assert "are called" not in caplog.text
    build([there], tmp_path / "grown", small_config)
    assert "2 data sets are called ct" in caplog.text
    caplog.clear()
    manifest = build([here, there.rename(tmp_path / "b" / "mr")], tmp_path / "apart", small_config).manifest
    assert manifest.annotated == {"ct": {"core": 1}, "mr": {"core": 1}} and "are called" not in caplog.text


def test_a_case_name_that_is_taken_is_free_by_the_advice(cohort, small_config, tmp_path):
    here, there = (shutil.copytree(cohort(name), tmp_path / name / "ct") for name in "ab")
    renamed(there, "b", "a")
    refused = build([here, there], tmp_path / "out", small_config).quarantined
    assert [problem.what.partition(" by ")[0] for problem in refused] == ["case name a is taken"]
    assert refused[0].cure == "rename the folder of one of the two data sets, or give it once"
    again = build([here, there.rename(tmp_path / "b" / "other")], tmp_path / "again", small_config)
    assert again.quarantined == [] and len(again.manifest.cases) == 2


def test_labels_without_a_labelled_voxel_are_said(cohort, small_config, tmp_path, caplog):
    source = cohort("a", "b", labelled=2)
    label = nib.load(source / "b_label.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), source / "b_label.nii.gz")
    result = build([source], tmp_path / "out", small_config)
    assert len(result.manifest.cases) == 2, "absence may be true"
    assert "1 of 2 new labels hold no class at all, that of b first" in caplog.text


@pytest.mark.parametrize(
    "name", ["$\\frac{1}{2}$", "<b>leber</b> & 'milz'", "a/b\\c", "肝臓", "ö{{x}}%s", "../x", "-- "]
)
def test_a_class_of_any_printable_name_is_stored_as_it_is_called(cohort, small_config, tmp_path, name):
    source = cohort("a", labelled=1)
    content = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(content | {"labels": {"1": name}}))
    manifest = build([source], tmp_path / "out", small_config).manifest
    assert Manifest.load(tmp_path / "out") == manifest and manifest.classes == (name,)
    assert manifest.annotated == {source.name: {name: 1}} and manifest.cases[0].reliable == (name,)


@pytest.mark.parametrize("name", ["liver\n", "\x00", "\ud800", "a\u202eb"])
def test_a_class_that_cannot_be_printed_is_refused(cohort, small_config, tmp_path, name):
    source = cohort("a", labelled=1)
    content = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(content | {"labels": {"1": name}}))
    with pytest.raises(BuildError, match="cannot be printed; give it another name") as refused:
        build([source], tmp_path / "out", small_config)
    assert str(refused.value).isprintable()


def test_classes_that_differ_in_spelling_alone_are_said(cohort, small_config, tmp_path, caplog):
    one, other = cohort("a", labelled=1), cohort("b", labelled=1)
    content = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(content | {"labels": {"1": "Core"}}))
    assert build([one, other], tmp_path / "out", small_config).manifest.classes == ("core", "Core")
    assert "classes 'core' and 'Core' are two" in caplog.text
