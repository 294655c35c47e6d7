"""Stream: every sample at most once an epoch over all ranks, the same order after any stop, no label that leaks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.codec import decode
from mixcl_dist.data_shards.manifest import Manifest, case_of
from mixcl_dist.data_shards.shard import ShardError, read_index
from mixcl_dist.data_shards.stream import PatchStream, StreamError


def stream_of(shards: Path, **changes) -> PatchStream:
    settings = {"batch_size": 3, "seed": 7, "workers": 0, "label_cases": set(), "shuffle_buffer": 8}
    return PatchStream(shards, **settings | changes)


def keys_of(stream: PatchStream, batches: int) -> list[list[str]]:
    return [batch.keys for batch in islice(stream, batches)]


def epoch_of(shards: Path, **changes) -> list[str]:
    stream = stream_of(shards, **changes)
    return [key for keys in keys_of(stream, stream.batches_per_epoch) for key in keys]


@pytest.fixture(scope="module")
def stored(built) -> dict[str, dict]:
    """All samples by key, as plain webdataset reads them."""
    files = [str(path) for path in built.glob("*.tar")]
    return {sample["__key__"]: sample for sample in wds.WebDataset(files, shardshuffle=False)}


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def test_a_batch_holds_what_the_shards_hold(built, stored):
    batch = next(iter(stream_of(built, batch_size=5, label_cases={"a", "b"})))
    assert batch.image.shape == (5, 1, 16, 16, 16) and batch.image.dtype == torch.int16
    assert batch.label.shape == (5, 16, 16, 16) and batch.label.dtype == torch.uint8
    for row, key in enumerate(batch.keys):
        np.testing.assert_array_equal(batch.image[row, 0], decode(stored[key]["ct.b2"], (16, 16, 16), np.int16))
        if case_of(key) in "ab":
            np.testing.assert_array_equal(batch.label[row], decode(stored[key]["seg.b2"], (16, 16, 16), np.uint8))
        np.testing.assert_allclose(batch.spacing[row], json.loads(stored[key]["json"])["spacing_mm"])


def test_candidate_bits_are_the_catalogues_for_labelled_cases_and_open_for_the_others(built):
    catalogue = Catalogue(Manifest.load(built).classes)
    stream = stream_of(built, label_cases={"a"})
    labelled = 0
    for batch in islice(stream, stream.batches_per_epoch):
        for row, key in enumerate(batch.keys):
            mine = case_of(key) == "a"
            expected = catalogue.candidate_bits(["core"] if mine else None)
            np.testing.assert_array_equal(batch.candidate_bits[row], expected)
            assert mine or not batch.label[row].any()
            labelled += int(mine and batch.label[row].any())
    assert labelled > 0


def test_a_label_outside_of_the_budget_is_not_even_decoded(copy):
    """Every label of case b is destroyed on disk: whoever touched one would fail."""
    for path in copy.glob("*.tar"):
        content = bytearray(path.read_bytes())
        for key, members in read_index(path).samples.items():
            if case_of(key) == "b":
                offset, size, _ = members["seg.b2"]
                content[offset : offset + size] = b"\xff" * size
        path.write_bytes(content)
    keys = epoch_of(copy, label_cases={"a"}, batch_size=1)
    assert any(case_of(key) == "b" for key in keys)
    with pytest.raises(ShardError, match=r"shard-\d+\.tar: b_\d+\.seg\.b2 is damaged"):
        epoch_of(copy, label_cases={"a", "b"}, batch_size=1)


def test_only_the_asked_cases_come_and_all_of_them(built, stored):
    keys = epoch_of(built, cases={"b", "d"}, batch_size=1)
    assert sorted(keys) == sorted(key for key in stored if case_of(key) in "bd")


def test_a_case_that_the_shards_do_not_hold_is_refused(built):
    with pytest.raises(StreamError, match="has no case nobody"):
        stream_of(built, cases={"a", "nobody"})


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (1, 2), (2, 3)])
def test_over_all_ranks_a_sample_comes_at_most_once_an_epoch_and_few_are_left_out(built, stored, workers, world_size):
    """There are fewer shards than readers in the last of these."""
    ranks = [epoch_of(built, workers=workers, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert len({len(keys) for keys in ranks}) == 1, "all ranks take as many steps"
    together = [key for keys in ranks for key in keys]
    assert len(together) == len(set(together)) and set(together) <= set(stored)
    readers = world_size * max(1, workers)
    assert len(stored) - len(together) < readers * 3 + readers


def test_every_epoch_and_every_seed_has_its_own_order(built):
    stream = stream_of(built, batch_size=1)
    epochs = [keys_of(stream, stream.batches_per_epoch) for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert keys_of(stream_of(built, batch_size=1), stream.batches_per_epoch) == epochs[0]
    assert keys_of(stream_of(built, batch_size=1, seed=8), stream.batches_per_epoch) != epochs[0]


def test_one_worker_and_none_give_the_same_order(built):
    assert keys_of(stream_of(built, workers=1), 15) == keys_of(stream_of(built, workers=0), 15)


def test_streaming_leaves_the_callers_random_numbers_alone(built):
    before = torch.get_rng_state()
    next(iter(stream_of(built)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_consumed_batches_and_wraps_into_epochs(built, workers):
    stream = stream_of(built, workers=workers)
    assert (stream.position()["epoch"], stream.position()["batch"]) == (0, 0)
    batches = iter(stream)
    for _ in range(stream.batches_per_epoch + 2):
        next(batches)
    assert (stream.position()["epoch"], stream.position()["batch"]) == (1, 2)
    assert all(isinstance(value, int | str) for value in stream.position().values())


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (1, 2), (2, 1)])
def test_a_stream_taken_up_at_any_batch_goes_on_as_if_never_stopped(built, workers, world_size):
    settings = {"workers": workers, "world_size": world_size, "rank": world_size - 1, "batch_size": 2}
    per_epoch = stream_of(built, **settings).batches_per_epoch
    whole = keys_of(stream_of(built, **settings), 2 * per_epoch + 4)
    for stop in (0, 1, 2, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch + 1):
        stopped = stream_of(built, **settings)
        assert keys_of(stopped, stop) == whole[:stop]
        resumed = stream_of(built, **settings)
        resumed.seek(json.loads(json.dumps(stopped.position())))
        assert keys_of(resumed, len(whole) - stop) == whole[stop:]


CONTINUE = """
import json, sys
from itertools import islice
from mixcl_dist.data_shards.stream import PatchStream
stream = PatchStream(sys.argv[1], batch_size=3, seed=7, workers=2, label_cases=set(), shuffle_buffer=8)
stream.seek(json.loads(sys.argv[2]))
print(json.dumps([batch.keys for batch in islice(stream, int(sys.argv[3]))]))
"""


def test_a_new_process_goes_on_exactly(built):
    whole = keys_of(stream_of(built, workers=2), 20)
    stopped = stream_of(built, workers=2)
    keys_of(stopped, 7)
    command = [sys.executable, "-c", CONTINUE, built, json.dumps(stopped.position()), "13"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == whole[7:]


def test_skipped_batches_are_not_decoded(copy):
    """The first batch's images are destroyed; a stream that begins after it must not notice."""
    first = next(iter(stream_of(copy))).keys
    for path in copy.glob("*.tar"):
        content = bytearray(path.read_bytes())
        for key in set(first) & set(read_index(path).samples):
            content[read_index(path).samples[key]["ct.b2"].offset + 50] ^= 1
        path.write_bytes(content)
    with pytest.raises(ShardError):
        next(iter(stream_of(copy)))
    stream = stream_of(copy)
    stream.seek(stream.position() | {"batch": 1})
    assert len(keys_of(stream, stream.batches_per_epoch - 1)) == stream.batches_per_epoch - 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"workers": 2}, "workers was 1 and is 2"),
        ({"batch_size": 2}, "batch_size"),
        ({"world_size": 2}, "world_size"),
        ({"shuffle_buffer": 9}, "shuffle_buffer"),
        ({"cases": {"a", "b"}}, "selection"),
        ({"label_cases": {"a"}}, "selection"),
    ],
)
def test_a_position_of_another_order_is_refused(built, change, named):
    position = stream_of(built).position()
    with pytest.raises(StreamError, match=named):
        stream_of(built, **change).seek(position)


def test_a_position_in_other_shards_is_refused(built):
    with pytest.raises(StreamError, match="manifest was other"):
        stream_of(built).seek(stream_of(built).position() | {"manifest": "other"})


def test_fewer_samples_than_a_batch_for_each_worker_is_refused(built):
    with pytest.raises(StreamError, match=r"do not fill one batch of 50 for each of 2 workers on 3 ranks; lower"):
        stream_of(built, batch_size=50, workers=2, world_size=3)


def damage_image(path: Path, content: bytearray) -> str:
    key, members = list(read_index(path).samples.items())[4]
    content[members["ct.b2"].offset + 60] ^= 1
    return rf"shard-000000.tar: {key}.ct.b2 is damaged"


def damage_json(path: Path, content: bytearray) -> str:
    key, members = list(read_index(path).samples.items())[4]
    content[members["json"].offset + 30] ^= 1
    return rf"shard-000000.tar: {key}.json is damaged"


def damage_header(path: Path, content: bytearray) -> str:
    """webdataset would end the shard here without a word."""
    key, members = list(read_index(path).samples.items())[4]
    content[members["ct.b2"].offset - 512] ^= 1
    return rf"shard-000000.tar: {key} is not whole"


def cut_in_a_payload(path: Path, content: bytearray) -> str:
    members = list(read_index(path).samples.values())[4]
    del content[members["ct.b2"].offset + 10 :]
    return r"shard-000000.tar: "


def cut_between_members(path: Path, content: bytearray) -> str:
    """webdataset would give half a sample."""
    key, members = list(read_index(path).samples.items())[4]
    del content[members["json"].offset - 512 :]
    return rf"shard-000000.tar: {key} is not whole"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [damage_image, damage_json, damage_header, cut_in_a_payload, cut_between_members])
def test_a_damaged_sample_is_one_line_that_names_shard_and_key(copy, damage, workers):
    path = copy / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    message = damage(path, content)
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message) as refused:
        epoch_of(copy, workers=workers, batch_size=1)
    assert "\n" not in str(refused.value)


def test_a_missing_shard_is_named(copy):
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar"):
        epoch_of(copy, batch_size=1)


def test_an_index_with_fewer_samples_than_the_manifest_is_refused(copy):
    content = json.loads((copy / "shard-000000.index.json").read_text())
    content["samples"].popitem()
    (copy / "shard-000000.index.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"shard-000000.tar: its index does not match the manifest"):
        epoch_of(copy, batch_size=1)
