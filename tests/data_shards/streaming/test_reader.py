"""Reader: rows hold what plain webdataset reads, and one that cannot be filled says why without harm to the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from mixcl_dist.data_shards.format.codec import decode
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.format.shard import read_index
from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import Span, Store, UnreachableError
from mixcl_dist.data_shards.streaming.reader import RowRead, SampleReader, Wanted

SHAPE = (16, 16, 16)
UNTOUCHED = -7


def read(shards: Path, samples: list[int], *, store: Store | None = None, labels: bool = True, numbers=None):
    """The outcomes, images and labels of `samples`, the last of them in the first row."""
    image = np.full((len(samples), *SHAPE), UNTOUCHED, np.int16)
    label = np.full((len(samples), *SHAPE), 77, np.uint8)
    wanted = [Wanted(len(samples) - 1 - n, 100 + n, 0, sample, labels) for n, sample in enumerate(samples)]
    reader = SampleReader(store or open_store(shards), Manifest.load(shards), numbers)
    return reader.read(wanted, image, label if labels else None), image[::-1], label[::-1]


@pytest.fixture(scope="module")
def stored(built) -> list[dict]:
    """All samples in the order of their numbers, as plain webdataset reads them."""
    files = [str(path) for path in sorted(built.glob("*.tar"))]
    return list(wds.WebDataset(files, shardshuffle=False))


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def flip(shards: Path, sample: dict, member: str) -> None:
    path = shards / Path(sample["__url__"]).name
    content = bytearray(path.read_bytes())
    content[read_index(path).samples[sample["__key__"]][member].offset + 40] ^= 1
    path.write_bytes(content)


def test_rows_hold_the_samples_of_their_numbers_whatever_shard_has_them(built, stored):
    samples = [len(stored) - 1, 0, 11, 12, 1]
    outcomes, images, labels = read(built, samples)
    assert [outcome.key for outcome in outcomes] == [stored[sample]["__key__"] for sample in samples]
    assert [outcome.wanted.slot for outcome in outcomes] == [100, 101, 102, 103, 104]
    assert {outcome.cause for outcome in outcomes} == {None}
    for sample, image, label in zip(samples, images, labels, strict=True):
        of = stored[sample]
        np.testing.assert_array_equal(image, decode(of["ct.b2"], SHAPE, np.int16, "ct.b2"))
        expected = decode(of["seg.b2"], SHAPE, np.uint8, "seg.b2") if "seg.b2" in of else 0
        assert (label == expected).all()


def test_labels_are_read_as_the_numbers_that_are_asked_for(built, stored):
    labelled = next(number for number, sample in enumerate(stored) if "seg.b2" in sample)
    numbers = np.arange(256, dtype=np.uint8)[::-1].copy()
    (_, _, (plain,)), (_, _, (asked,)) = read(built, [labelled]), read(built, [labelled], numbers=numbers)
    np.testing.assert_array_equal(asked, numbers[plain])


def test_a_damaged_sample_says_so_and_its_neighbours_are_whole(copy, stored):
    flip(copy, stored[1], "ct.b2")
    outcomes, images, _ = read(copy, [0, 1, 2])
    key = stored[1]["__key__"]
    assert [outcome.cause for outcome in outcomes] == [None, f"{key}.ct.b2 is damaged", None]
    assert not outcomes[1].unreachable
    for number in (0, 2):
        np.testing.assert_array_equal(images[number], decode(stored[number]["ct.b2"], SHAPE, np.int16, "ct.b2"))


def test_a_damaged_label_does_no_harm_where_labels_are_not_read(copy, stored):
    labelled = next(number for number, sample in enumerate(stored) if "seg.b2" in sample)
    flip(copy, stored[labelled], "seg.b2")
    assert [outcome.cause for outcome in read(copy, [labelled], labels=False)[0]] == [None]
    assert "seg.b2 is damaged" in str(read(copy, [labelled])[0][0].cause)


class Mended(Store):
    """A store that gives bytes with a flaw until it is told to forget them, as a damaged cache does."""

    def __init__(self, below: Store) -> None:
        self._below, self.forgotten = below, list[Span]()

    def read(self, name: str) -> bytes:
        return self._below.read(name)

    def path(self, name: str) -> str:
        return self._below.path(name)

    def forget(self, span: Span) -> None:
        self.forgotten.append(span)

    def read_spans(self, spans):
        contents = self._below.read_spans(spans)
        return [memoryview(bytes(len(content))) if not self.forgotten else content for content in contents]

    def _read_blocks(self, blocks):
        raise NotImplementedError


def test_bytes_that_were_damaged_on_their_way_are_asked_for_once_more(built, stored):
    store = Mended(open_store(built))
    (outcome,), (image,), _ = read(built, [3], store=store)
    assert outcome.cause is None and len(store.forgotten) == 1
    np.testing.assert_array_equal(image, decode(stored[3]["ct.b2"], SHAPE, np.int16, "ct.b2"))


class Unreachable(Mended):
    def read_spans(self, spans):
        return [UnreachableError(f"{self.path(span.file)}: no connection") for span in spans]


def test_what_could_not_be_had_now_is_told_from_what_is_damaged(built):
    (outcome,), _, _ = read(built, [3], store=Unreachable(open_store(built)))
    assert outcome.unreachable and "no connection" in str(outcome.cause)


def test_an_index_that_is_not_the_manifests_takes_its_shard_alone(copy, stored):
    index = copy / "shard-000000.index.json"
    index.write_text(index.read_text() + "\n")
    in_second = next(n for n, sample in enumerate(stored) if "shard-000001" in sample["__url__"])
    bad, good = read(copy, [0, in_second])[0]
    assert bad == RowRead(bad.wanted, "", "shard-000000.tar", bad.cause)
    assert "is not the index that the manifest names" in str(bad.cause) and good.cause is None
