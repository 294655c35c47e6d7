"""Shard: a plain tar file that anything reads, whose index finds every kind of damage."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
import xxhash

from mixcl_dist.data_shards.format.shard import (
    ShardError,
    index_path,
    parse_index,
    read_index,
    read_sample,
    verify_shard,
    write_shard,
)

SAMPLES = [
    (f"case_{number:04d}", {"ct.b2": bytes([number]) * (300 * number + 1), "json": b'{"n": %d}' % number})
    for number in range(5)
]


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "shard-000000.tar"
    write_shard(path, SAMPLES)
    return path


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_plain_tarfile_finds_the_samples_as_files_without_owner_or_time(shard):
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        assert {(m.uid, m.gid, m.mtime, m.uname, m.type) for m in tar.getmembers()} == {(0, 0, 0, "", tarfile.REGTYPE)}
    assert members == {f"{key}.{name}": payload for key, sample in SAMPLES for name, payload in sample.items()}
    assert shard.read_bytes()[257:265] == b"ustar\x0000"


def test_plain_webdataset_reads_the_samples_in_order(shard):
    found = list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [(s["__key__"], {"ct.b2": s["ct.b2"], "json": s["json"]}) for s in found] == SAMPLES


def test_the_index_says_where_every_payload_lies_and_what_its_digest_is(shard):
    content = shard.read_bytes()
    index = json.loads(index_path(shard).read_text())
    assert (index["bytes"], index["xxh3"]) == (len(content), xxhash.xxh3_64_hexdigest(content))
    for key, sample in SAMPLES:
        for name, payload in sample.items():
            offset, size, digest = index["samples"][key][name]
            assert content[offset : offset + size] == payload
            assert digest == xxhash.xxh3_64_hexdigest(payload)


def test_one_sample_is_read_by_the_index_alone(shard):
    index = read_index(shard)
    key, sample = SAMPLES[3]
    assert read_sample(shard, key, index.samples[key]) == sample
    flip(shard, index.samples[key]["ct.b2"].offset)
    with pytest.raises(ShardError, match=r"shard-000000.tar: case_0003.ct.b2 is damaged"):
        read_sample(shard, key, index.samples[key])


def test_a_sample_behind_the_end_of_a_cut_file_is_refused_before_it_is_read(shard):
    key, _ = SAMPLES[3]
    place = read_index(shard).samples[key]
    shard.write_bytes(shard.read_bytes()[: place["ct.b2"].offset + 1])
    with pytest.raises(ShardError, match=r"is cut off before the end of case_0003\.ct\.b2"):
        read_sample(shard, key, place)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("offset", 10**15),
        ("size", 10**15),
        ("offset", -512),
        ("size", -1),
        ("offset", 0),
        ("offset", 1.5),
        ("xxh3", "?"),
    ],
)
def test_an_index_with_an_impossible_place_is_refused(shard, what, value):
    index = json.loads(index_path(shard).read_text())
    index["samples"]["case_0002"]["json"][["offset", "size", "xxh3"].index(what)] = value
    with pytest.raises(ShardError, match=r"index\.json: (is damaged|names bytes beyond the shard's end)"):
        parse_index(json.dumps(index).encode(), "shard-000000.index.json")


@pytest.mark.parametrize("key", ["../case", "a.b", "", "a\nb", "ä"])
def test_an_index_with_a_key_that_is_none_is_refused(shard, key):
    index = json.loads(index_path(shard).read_text())
    index["samples"][key] = index["samples"].pop("case_0002")
    with pytest.raises(ShardError, match="is damaged"):
        parse_index(json.dumps(index).encode(), "shard-000000.index.json")


def test_the_same_samples_give_the_same_bytes(shard, tmp_path):
    write_shard(tmp_path / "again.tar", SAMPLES)
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "a" * 101])
def test_a_key_that_webdataset_or_ustar_could_not_hold_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=r"key|name is too long"):
        write_shard(tmp_path / "s.tar", [(key, {"json": b""})])
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_a_key_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="repeated"):
        write_shard(tmp_path / "s.tar", [SAMPLES[0], SAMPLES[0]])


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    def samples():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "s.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_a_whole_shard_verifies(shard):
    assert verify_shard(shard) == []


def test_a_flipped_byte_anywhere_is_found_and_its_sample_named(shard):
    index = read_index(shard)
    whole = shard.read_bytes()
    for key, members in index.samples.items():
        for name, member in members.items():
            for offset in (
                member.offset,
                member.offset + member.size - 1,
                member.offset - 512,
                member.offset - 512 + 140,
            ):
                flip(shard, offset)
                (problem,) = verify_shard(shard)
                assert f"shard-000000.tar: {key}.{name} " in problem
                shard.write_bytes(whole)
    flip(shard, len(whole) - 1)
    assert "outside of the samples" in verify_shard(shard)[0]


@pytest.mark.parametrize("keep", [0, 100, 512, 2000, -10240])
def test_a_cut_shard_is_found(shard, keep):
    shard.write_bytes(shard.read_bytes()[:keep])
    problems = verify_shard(shard)
    assert problems and all(str(shard) in problem for problem in problems)


def test_a_member_turned_into_a_link_is_found(shard):
    content = bytearray(shard.read_bytes())
    info = tarfile.TarInfo("case_0000.ct.b2")
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/hostname", 1
    content[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(content)
    assert "case_0000.ct.b2 has a damaged header" in verify_shard(shard)[0]


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"version": 1}', b"\xff\xfe"])
def test_a_missing_or_damaged_index_is_one_line(shard, content):
    index_path(shard).unlink()
    if content is not None:
        index_path(shard).write_bytes(content)
    (problem,) = verify_shard(shard)
    assert "shard-000000.index.json" in problem and "\n" not in problem


def test_an_index_of_a_newer_version_asks_for_an_update(shard):
    index = json.loads(index_path(shard).read_text()) | {"version": 99}
    index_path(shard).write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"format 99, newer than 1; update"):
        read_index(shard)
