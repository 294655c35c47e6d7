"""The pack for a bare GPU machine: within its size, the same bytes each time, and whole when laid out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def pack(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("pack")
    sys.modules.pop("pack", None)


@pytest.fixture
def archive(tmp_path) -> Path:
    """Three cases as OpenKBP has them."""
    folder = tmp_path / "source"
    listed = {"training": [], "validation": []}
    for split, cases in (("training", "ab"), ("validation", "c")):
        for case in cases:
            entry = {kind: f"./{kind}/{case}.nii.gz" for kind in ("image", "label")}
            listed[split].append(entry)
            for kind, name in entry.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(gzip.compress(f"{kind} of {case}".encode() * 100))
    (folder / "dataset.json").write_text(json.dumps(listed))
    return folder


def test_ct_comes_out_as_it_went_in_and_the_list_names_it(pack, archive, tmp_path):
    folder, work = tmp_path / "pack", tmp_path / "work"
    folder.mkdir()
    pack.make_part(folder, "ct", "key", lambda: pack.make_ct(archive, folder, None))
    pack.unpack(folder, work)
    listed = json.loads((work / "ct" / "dataset.json").read_text())
    entries = listed["training"] + listed["validation"]
    assert len(entries) == 3
    for entry in entries:
        for kind in ("image", "label"):
            packed = gzip.decompress((archive / f"{entry[kind]}.gz").read_bytes())
            assert (work / "ct" / entry[kind]).read_bytes() == packed


def test_fewer_cases_where_the_size_asks_for_it(pack, archive, tmp_path):
    pack.make_ct(archive, tmp_path, 1)
    pack.make_part(tmp_path, "other", "key", lambda: None)
    pack.unpack(tmp_path, tmp_path / "work")
    listed = json.loads((tmp_path / "work" / "ct" / "dataset.json").read_text())
    assert [len(listed[split]) for split in ("training", "validation")] == [1, 1]
    assert len(list((tmp_path / "work" / "ct" / "image").iterdir())) == 2


def test_a_part_is_made_again_only_where_its_sources_changed(pack, tmp_path):
    made = []

    def make() -> None:
        made.append(1)
        pack.write_archive(tmp_path / "site.tar.xz", [(b"content", "site/a")])

    for key in ("1", "1", "2"):
        pack.make_part(tmp_path, "site", key, make)
    assert len(made) == 2
    (tmp_path / "site.tar.xz").unlink()
    pack.make_part(tmp_path, "site", "2", make)
    assert len(made) == 3


def test_a_part_that_was_interrupted_is_made_again(pack, tmp_path):
    def interrupted() -> None:
        (tmp_path / "site.tar.xz").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack.make_part(tmp_path, "site", "1", interrupted)
    pack.make_part(tmp_path, "site", "1", lambda: (tmp_path / "site.tar.xz").write_bytes(b"whole"))
    assert (tmp_path / "site.tar.xz").read_bytes() == b"whole"


def test_the_same_members_give_the_same_bytes(pack, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"content")  # at different times
        pack.write_archive(tmp_path / f"{name}.tar.xz", [(tmp_path / name, "a"), (b"more", "b")])
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()


def test_laying_out_is_done_once_for_a_pack(pack, tmp_path):
    pack.make_part(tmp_path, "site", "1", lambda: pack.write_archive(tmp_path / "site.tar.xz", [(b"1", "site/a")]))
    work = tmp_path / "work"
    pack.unpack(tmp_path, work)
    (work / "site" / "a").write_bytes(b"kept")
    pack.unpack(tmp_path, work)
    assert (work / "site" / "a").read_bytes() == b"kept"
    pack.make_part(tmp_path, "site", "2", lambda: pack.write_archive(tmp_path / "site.tar.xz", [(b"2", "site/a")]))
    pack.unpack(tmp_path, work)
    assert (work / "site" / "a").read_bytes() == b"2"


def test_the_size_counts_pack_and_repository_but_nothing_that_git_ignores(pack, tmp_path, capsys, monkeypatch):
    root, folder = tmp_path / "root", tmp_path / "root" / ".pack"
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".gitignore").write_text(".pack/\nignored\n")
    (root / "source.py").write_bytes(b"x" * 1000)
    (root / "ignored").write_bytes(b"x" * 5000)
    (folder / "ct-00.tar.xz").write_bytes(b"x" * 300)
    expected = 1000 + len(".pack/\nignored\n") + 300
    assert pack.size(folder, root) == expected
    for limit, code in ((expected, 0), (expected - 1, 1)):
        monkeypatch.setattr(pack, "LIMIT", limit)
        assert pack.complain(folder, root) == code
    assert "over by 1 bytes" in capsys.readouterr().err


def test_compiled_kernels_are_found_where_they_are_laid_out(pack, tmp_path):
    group = json.dumps({"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin", "k.ptx": "/elsewhere/KEY/k.ptx"}}).encode()
    members = [(group, "cache/KEY/__grp__k.json"), (b"machine code", "cache/KEY/k.cubin")]
    pack.make_part(tmp_path, "cache", "1", lambda: pack.write_archive(tmp_path / "cache.tar.xz", members))
    pack.unpack(tmp_path, tmp_path / "work")
    folder = tmp_path / "work" / "cache" / "KEY"
    paths = json.loads((folder / "__grp__k.json").read_text())["child_paths"]
    assert Path(paths["k.cubin"]).read_bytes() == b"machine code"
