"""Verify: finds whatever is not as it was built, and names it in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mixcl_dist import cli
from mixcl_dist.cli import shards
from mixcl_dist.data_shards.format.manifest import CASES_FILE, CLASSES_FILE, Manifest, table_digest
from mixcl_dist.data_shards.format.shard import index_path, read_index, read_sample, write_shard
from mixcl_dist.data_shards.inspection import verify as verifying
from mixcl_dist.data_shards.inspection.verify import verify


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def test_whole_shards_verify(built):
    assert verify(built) == []


def damage_payload(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    key, members = next(iter(read_index(path).samples.items()))
    _flip(path, members["ct.b2"].offset + 40)
    return f"shard-000001.tar: {key}.ct.b2 is damaged"


def damage_header(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    key, members = list(read_index(path).samples.items())[-1]
    _flip(path, members["json"].offset - 512)
    return f"shard-000001.tar: {key}.json has a damaged header"


def cut(folder: Path) -> str:
    path = folder / "shard-000000.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-20000])
    return f"shard-000000.tar: is cut off, {size - 20000} of {size} bytes are there"


def remove(folder: Path) -> str:
    (folder / "shard-000001.tar").unlink()
    return "shard-000001.tar: is missing"


def add(folder: Path) -> str:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000099.tar")
    return "shard-000099.tar: is not in the manifest"


def swap(folder: Path) -> str:
    """A shard with its own, matching index, but not the one that was built."""
    for of in (lambda path: path, index_path):
        shutil.copy(of(folder / "shard-000000.tar"), of(folder / "shard-000001.tar"))
    return "shard-000001.tar: is not the shard that the manifest names"


def miscount(folder: Path) -> str:
    content = json.loads((folder / "manifest.json").read_text())
    content["cases"][0]["patches"] += 1
    (folder / "manifest.json").write_text(json.dumps(content))
    return f"{content['cases'][0]['name']} has {content['cases'][0]['patches'] - 1} patches, the manifest says"


def lose_a_sample_in_the_index(folder: Path) -> str:
    path = folder / "shard-000001.index.json"
    content = json.loads(path.read_text())
    del content["samples"][next(iter(content["samples"]))]
    path.write_text(json.dumps(content))
    return "shard-000001.index.json: is not the index that the manifest names"


def write_the_index_otherwise(folder: Path) -> str:
    path = folder / "shard-000001.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    return "shard-000001.index.json: is not the index that the manifest names"


def rewrite(folder: Path, number: int, samples: list) -> None:
    """Another shard, its index and its entry in the manifest, so that all digests are right."""
    path = folder / f"shard-{number:06d}.tar"
    write_shard(path, samples)
    _adopt(folder, number)


def _adopt(folder: Path, number: int) -> None:
    """Make the manifest name the shard that is there."""
    path = folder / f"shard-{number:06d}.tar"
    index, content = read_index(path), json.loads((folder / "manifest.json").read_text())
    content["shards"][number] |= {
        "samples": len(index.samples),
        "bytes": index.bytes,
        "xxh3": index.xxh3,
        "index_xxh3": xxhash.xxh3_64_hexdigest(index_path(path).read_bytes()),
    }
    (folder / "manifest.json").write_text(json.dumps(content))


def samples_in(path: Path) -> list:
    return [(key, read_sample(path, key, members)) for key, members in read_index(path).samples.items()]


def repeat_a_key(folder: Path) -> str:
    first, second = (samples_in(folder / f"shard-00000{n}.tar") for n in (0, 1))
    rewrite(folder, 1, [first[0], *second[1:]])
    return f"{folder}: {first[0][0]} is in shard-000000.tar and shard-000001.tar"


def hide_a_member(folder: Path) -> str:
    """A sample that is in the tar, but not in the index; everything else is consistent."""
    path = folder / "shard-000000.tar"
    last = samples_in(path)[-1][0]
    index = json.loads(index_path(path).read_text())
    del index["samples"][last]
    index_path(path).write_text(json.dumps(index))
    _adopt(folder, 0)
    return f"shard-000000.tar: webdataset reads {last} where the index has no sample"


def swap_rows_of_the_table(folder: Path) -> str:
    path = folder / CASES_FILE
    table = np.load(path)
    other = int(np.flatnonzero(table != table[0])[0])
    table[[0, other]] = table[[other, 0]]
    np.save(path, table)
    content = json.loads((folder / "manifest.json").read_text())
    content["tables"][CASES_FILE] = table_digest(table)
    (folder / "manifest.json").write_text(json.dumps(content))
    return f"{CASES_FILE}: says "


def damage_a_table(folder: Path) -> str:
    _flip(folder / CLASSES_FILE, -1)
    return f"{CLASSES_FILE}: is not the table that the manifest names"


def lose_a_table(folder: Path) -> str:
    (folder / CLASSES_FILE).unlink()
    return f"{CLASSES_FILE}: No such file"


DAMAGES = [
    damage_payload,
    damage_header,
    cut,
    remove,
    add,
    swap,
    miscount,
    lose_a_sample_in_the_index,
    write_the_index_otherwise,
    repeat_a_key,
    hide_a_member,
    swap_rows_of_the_table,
    damage_a_table,
    lose_a_table,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged(copy, damage):
    expected = damage(copy)
    problems = verify(copy)
    assert any(expected in problem for problem in problems), problems
    assert len(problems) <= 3 and not any("\n" in problem for problem in problems), "no flood of lines"


def test_several_processes_find_the_same_and_the_verb_reports_it(copy, capsys, monkeypatch):
    expected = [damage_payload(copy), add(copy)]
    assert verify(copy, workers=2) == verify(copy)
    monkeypatch.setattr(shards, "_cores", lambda: 1)
    assert cli.main(["shards", "verify", str(copy)]) == 1
    told = capsys.readouterr()
    assert all(line in told.err for line in expected) and "shard (100 %)" in told.err
    assert told.out == f"{copy}: 2 problems; remove the folder and build the shards again\n"


def test_progress_counts_every_shard(built):
    seen = []
    verify(built, progress=lambda *counts: seen.append(counts))
    total = len(Manifest.load(built).shards)
    assert seen == [(done, total, "shard") for done in range(1, total + 1)]


def test_a_process_that_dies_is_a_problem_of_its_shard(copy, monkeypatch):
    def run(work, items):
        return ((item, None, "out of memory") for item in items)

    monkeypatch.setattr(verifying, "in_this_process", run)
    problems = verify(copy)
    assert f"{copy / 'shard-000000.tar'}: the process that read it died (out of memory)" in problems


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
