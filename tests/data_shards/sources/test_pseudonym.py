"""Pseudonyms: of any name, for any user, traced by their owner alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mixcl_dist import cli
from mixcl_dist.cli import main
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.sources import CaseError, open_source
from mixcl_dist.data_shards.sources.pseudonym import pseudonym


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user with a home folder and no key in the environment."""
    monkeypatch.delenv("MIXCL_PSEUDONYM_KEY")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def scans(cohort, folder: Path, *names: bytes) -> Path:
    """Copies of scan a, then b, … under names of any bytes."""
    folder.mkdir()
    listed = cohort("a", "b")
    for name, scan in zip(names, ("a", "b"), strict=False):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes((listed / f"{scan}.nii.gz").read_bytes())
    return folder


def test_scans_whose_names_are_not_utf8_are_read(cohort, small_config, tmp_path):
    folder = scans(cohort, tmp_path / "scans", b"plain.nii.gz", b"M\xfcller.nii.gz")
    result = build([folder], tmp_path / "out", small_config, run=in_this_process)
    assert len(result.manifest.cases) == 2 and result.quarantined == []


def test_what_is_wrong_with_them_is_said_in_text(cohort, small_config, tmp_path):
    folder = scans(cohort, tmp_path / "scans", b"plain.nii.gz", b"M\xfcller.nii.gz")
    copy = Path(os.fsdecode(os.fsencode(folder) + b"/Z\xfcrich.nii.gz"))
    copy.write_bytes((folder / "plain.nii.gz").read_bytes()[:-100])
    (problem,) = build([folder], tmp_path / "out", small_config, run=in_this_process).quarantined
    assert "Z\\xfcrich.nii.gz: cannot be read as NIfTI" in str(problem)
    str(problem).encode()
    again = build([folder], tmp_path / "out", small_config, run=in_this_process)
    assert list(map(str, again.quarantined)) == [str(problem)]


def test_without_a_place_for_the_key_it_is_asked_for_by_name(cohort, tmp_path, home, monkeypatch):
    folder = scans(cohort, tmp_path / "scans", b"a.nii.gz")
    home.write_text("no folder")
    with pytest.raises(CaseError, match="set MIXCL_PSEUDONYM_KEY to a secret of your own"):
        open_source(folder)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CaseError, match="no home folder; set MIXCL_PSEUDONYM_KEY"):
        open_source(folder)


def test_a_user_without_name_and_home_gets_what_libraries_ask_for(monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 45678")

    monkeypatch.setattr(cli.getpass, "getuser", nameless)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "access", lambda *_: False)
    cli._stand_in_for_a_user()
    assert os.environ["USER"] == f"user-{os.getuid()}" and Path(os.environ["MPLCONFIGDIR"]).is_dir()


def test_a_pseudonym_is_traced_by_who_has_the_key_and_by_nobody_else(
    cohort, small_config, tmp_path, home, capsys, monkeypatch
):
    folder = scans(cohort, tmp_path / "DOE_JANE", b"one.nii.gz", b"two.nii.gz")
    (folder / "zcopy.nii.gz").write_bytes((folder / "one.nii.gz").read_bytes())
    (copy,) = build([folder], tmp_path / "out", small_config, run=in_this_process).quarantined
    name = pseudonym("DOE_JANE/one.nii.gz")
    assert f"has the same voxels as case {name}; remove one of them (mixcl shards trace {name} tells" in str(copy)
    (kept,) = (file for file in (home / ".config/mixcl").iterdir() if file.suffix == ".jsonl")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert main(["shards", "trace", name]) == 0 and capsys.readouterr().out == f"{folder}/one.nii.gz\n"
    published = [file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert not [content for content in published if b"DOE_JANE" in content]
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert main(["shards", "trace", name]) == 1 and "no build of this user" in capsys.readouterr().err
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", (home / ".config/mixcl/pseudonym.key").read_text())
    assert main(["shards", "trace", name, str(folder)]) == 0, "or by the sources and the key"
