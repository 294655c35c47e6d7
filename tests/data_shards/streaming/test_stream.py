"""Stream: every sample once an epoch over all ranks, the same order after any stop, no label that leaks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import webdataset as wds

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.codec import decode
from mixcl_dist.data_shards.format.manifest import Manifest, ManifestError, case_of
from mixcl_dist.data_shards.format.shard import read_index
from mixcl_dist.data_shards.streaming.order import Order
from mixcl_dist.data_shards.streaming.stream import Batch, Mixture, PatchStream, StreamError, _pin


def stream_of(shards: Path, **changes) -> PatchStream:
    settings = {"batch_size": 3, "seed": 7, "workers": 0, "label_cases": set()}
    return PatchStream(shards, **settings | changes)


def keys_of(stream: PatchStream, batches: int) -> list[list[str]]:
    return [batch.keys for batch in islice(stream, batches)]


def keys_in(stream: PatchStream, samples: int) -> list[str]:
    """The first `samples` keys; the stream must have batches of one."""
    return [key for (key,) in keys_of(stream, samples)]


def epoch_of(shards: Path, **changes) -> list[str]:
    stream = stream_of(shards, batch_size=1, **changes)
    return keys_in(stream, stream.samples_per_epoch)


@pytest.fixture(scope="module")
def stored(built) -> dict[str, dict]:
    """All samples by key, as plain webdataset reads them."""
    files = [str(path) for path in built.glob("*.tar")]
    return {sample["__key__"]: sample for sample in wds.WebDataset(files, shardshuffle=False)}


@pytest.fixture(scope="module")
def two_classes(cohort, small_config, tmp_path_factory) -> Path:
    """Of the classes "core" and "rim", both are annotated in case a, and core alone in case b."""
    folder = cohort("a", "b", "c", labelled=2)
    path = folder / "a_label.nii.gz"
    image = nib.load(path)
    label = np.asarray(image.dataobj).astype(np.uint8)
    label[: len(label) // 2] *= 2  # one half of the organ
    nib.save(nib.Nifti1Image(label, image.affine), path)
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"]["2"] = "rim"
    content["training"][1]["annotated"] = ["core"]
    (folder / "dataset.json").write_text(json.dumps(content))
    out = tmp_path_factory.mktemp("two") / "shards"
    assert build([folder], out, small_config).quarantined == []
    return out


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_hold_what_the_shards_hold(built, stored, workers):
    for batch in islice(stream_of(built, batch_size=5, workers=workers, label_cases={"a", "b"}), 12):
        assert batch.image.shape == (5, 1, 16, 16, 16) and batch.image.dtype == torch.int16
        assert batch.label.shape == (5, 16, 16, 16) and batch.label.dtype == torch.uint8
        for row, key in enumerate(batch.keys):
            np.testing.assert_array_equal(batch.image[row, 0], decode(stored[key]["ct.b2"], (16, 16, 16), np.int16))
            has_label = case_of(key) in "ab"
            label = decode(stored[key]["seg.b2"], (16, 16, 16), np.uint8) if has_label else 0
            assert (batch.label[row].numpy() == label).all()
            np.testing.assert_allclose(batch.spacing[row], json.loads(stored[key]["json"])["spacing_mm"])


class TestLabels:
    def test_candidate_bits_are_the_catalogues_for_labelled_cases_and_open_for_the_others(self, built):
        catalogue = Catalogue(Manifest.load(built).classes)
        labelled = 0
        for batch in islice(stream_of(built, label_cases={"a"}), 30):
            for row, key in enumerate(batch.keys):
                mine = case_of(key) == "a"
                expected = catalogue.candidate_bits(["core"] if mine else None)
                np.testing.assert_array_equal(batch.candidate_bits[row], expected)
                assert mine or not batch.label[row].any()
                labelled += int(mine and batch.label[row].any())
        assert labelled > 0

    def test_a_label_outside_of_the_budget_is_not_even_read(self, copy):
        """Every label of case b is destroyed on disk: whoever touched one would notice."""
        for path in copy.glob("*.tar"):
            content = bytearray(path.read_bytes())
            for key, members in read_index(path).samples.items():
                if case_of(key) == "b":
                    offset, size, _ = members["seg.b2"]
                    content[offset : offset + size] = b"\xff" * size
            path.write_bytes(content)
        assert any(case_of(key) == "b" for key in epoch_of(copy, label_cases={"a"}))
        with pytest.raises(StreamError, match=r"shard-\d+\.tar: b_\d+: b_\d+\.seg\.b2 is damaged"):
            epoch_of(copy, label_cases={"a", "b"})

    def test_without_labels_there_is_no_memory_for_them(self, built):
        batch = next(iter(stream_of(built)))
        assert batch.label.shape == (3, 16, 16, 16) and not batch.label.any()
        assert batch.label.untyped_storage().nbytes() == 1


class TestLabelClasses:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_hidden_class_looks_as_if_nobody_had_annotated_it(self, two_classes, workers):
        stored = {}
        for batch in islice(stream_of(two_classes, batch_size=1, label_cases={"a", "b"}), 60):
            stored[batch.keys[0]] = batch.label[0].clone()
        assert any((label == 1).any() and (label == 2).any() for label in stored.values())
        hidden = stream_of(two_classes, batch_size=1, workers=workers, label_cases={"a", "b"}, label_classes={"core"})
        expected = Catalogue(("core", "rim")).candidate_bits(["core"])
        for batch in islice(hidden, 60):
            key = batch.keys[0]
            assert torch.equal(batch.label[0], stored[key] * (stored[key] == 1))
            if case_of(key) in "ab":
                np.testing.assert_array_equal(batch.candidate_bits[0], expected)

    def test_class_aware_drawing_does_not_look_for_a_hidden_class(self, two_classes):
        settings = {"batch_size": 2, "label_cases": {"a"}, "mixture": Mixture(labelled_fraction=0.5)}
        for shown, other in (("core", "rim"), ("rim", "core")):
            number = Manifest.load(two_classes).classes.index(shown) + 1
            for batch in islice(stream_of(two_classes, **settings, label_classes={shown}), 20):
                assert set(batch.label[1].unique().tolist()) in ({0, number}, {number}), other

    def test_a_stream_is_not_taken_up_with_other_classes(self, two_classes):
        position = stream_of(two_classes, label_cases={"a"}).position()
        with pytest.raises(StreamError, match="selection"):
            stream_of(two_classes, label_cases={"a"}, label_classes={"rim"}).seek(position)
        with pytest.raises(StreamError, match="has no class edge; choose among core, rim"):
            stream_of(two_classes, label_classes={"edge"})


class TestSelection:
    def test_only_the_asked_cases_come_and_all_of_them(self, built, stored):
        keys = epoch_of(built, cases={"b", "d"})
        assert sorted(keys) == sorted(key for key in stored if case_of(key) in "bd")

    @pytest.mark.parametrize("asked", [{"cases": {"a", "nobody"}}, {"label_cases": {"nobody"}}])
    def test_a_case_that_the_shards_do_not_hold_is_refused(self, built, asked):
        with pytest.raises(StreamError, match="has no case nobody"):
            stream_of(built, **asked)

    def test_fewer_samples_than_a_batch_are_refused(self, built):
        with pytest.raises(StreamError, match=r"do not fill a batch of 500.*; lower the batch size"):
            stream_of(built, batch_size=500)

    def test_a_batch_that_ranks_cannot_share_is_refused(self, built):
        with pytest.raises(StreamError, match="a batch of 8 cannot be shared by 3 ranks in 1 parts"):
            stream_of(built, batch_size=8, world_size=3)

    def test_a_folder_without_shards_is_refused(self, tmp_path):
        with pytest.raises(ManifestError, match=r"manifest\.json"):
            stream_of(tmp_path)


class TestOrder:
    @pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (1, 2), (0, 4)])
    def test_over_all_ranks_every_sample_comes_exactly_once_an_epoch(self, built, stored, workers, world_size):
        streams = [
            stream_of(built, batch_size=world_size, workers=workers, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        epoch, slots = streams[0].samples_per_epoch, {}
        for stream in streams:
            for batch in islice(stream, -(-2 * epoch // world_size)):
                slots |= dict(zip(batch.slots, batch.keys, strict=True))
        for first in (0, epoch):
            assert sorted(slots[slot] for slot in range(first, first + epoch)) == sorted(stored)

    def test_every_epoch_and_every_seed_has_its_own_order(self, built):
        stream = stream_of(built, batch_size=1)
        epochs = [keys_in(stream, stream.samples_per_epoch) for _ in range(2)]
        assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
        assert epoch_of(built) == epochs[0] != epoch_of(built, seed=8)

    def test_neither_workers_nor_ranks_nor_accumulation_change_what_a_slot_shows(self, built):
        def shown(**settings) -> dict[int, str]:
            batches = [
                batch
                for rank in range(settings.get("world_size", 1))
                for batch in islice(
                    stream_of(built, batch_size=12, rank=rank, **settings), 3 * settings.get("accumulation_steps", 1)
                )
            ]
            return {slot: key for batch in batches for slot, key in zip(batch.slots, batch.keys, strict=True)}

        expected = shown()
        assert sorted(expected) == list(range(36))
        for settings in (
            {"workers": 1},
            {"workers": 3},
            {"world_size": 3},
            {"accumulation_steps": 4},
            {"world_size": 2, "accumulation_steps": 3, "workers": 1},
        ):
            assert shown(**settings) == expected

    def test_streaming_leaves_the_callers_random_numbers_alone(self, built):
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        next(iter(stream_of(built)))
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


class TestCounts:
    @pytest.mark.parametrize(("world_size", "rank", "start"), [(1, 0, 0), (3, 1, 0), (2, 1, 6), (3, 2, 60)])
    def test_epochs_pass_on_every_rank_from_any_start(self, built, world_size, rank, start):
        stream = stream_of(built, batch_size=6, world_size=world_size, rank=rank)
        stream.seek(stream.position() | {"slot": start})
        keys_of(stream, 3 * stream.samples_per_epoch // 6)

    def test_a_sample_that_comes_twice_is_a_defect_that_stops_the_run(self, built, monkeypatch):
        monkeypatch.setattr(Order, "draw", lambda self, first, count: np.arange(first, first + count) % 7)
        with pytest.raises(StreamError, match="epoch 0 shows sample 0 twice: a defect"):
            epoch_of(built)

    def test_slots_that_are_left_out_are_a_defect_that_stops_the_run(self, built, monkeypatch):
        stream = stream_of(built, batch_size=1)
        wanted = stream._wanted
        skip = 5
        monkeypatch.setattr(stream, "_wanted", lambda first, samples: [
            one._replace(slot=one.slot + (first > skip)) for one in wanted(first, samples)
        ])  # fmt: skip
        with pytest.raises(StreamError, match=r"epoch 0 showed (\d+) samples where \d+ belong to rank 0"):
            keys_in(stream, stream.samples_per_epoch + 2)


class TestMixture:
    def test_a_labelled_share_is_held_exactly_in_every_batch(self, built):
        stream = stream_of(built, batch_size=4, label_cases={"a"}, mixture=Mixture(labelled_fraction=0.25))
        for batch in islice(stream, 40):
            assert sum(case_of(key) == "a" for key in batch.keys) == 1

    def test_every_rank_gets_its_part_of_the_labelled_share(self, built):
        for rank in range(2):
            stream = stream_of(
                built,
                batch_size=8,
                rank=rank,
                world_size=2,
                label_cases={"a"},
                mixture=Mixture(labelled_fraction=0.25),
            )
            assert all(sum(case_of(key) == "a" for key in keys) == 1 for keys in keys_of(stream, 10))

    def test_class_aware_drawing_shows_only_patches_that_hold_an_annotated_class(self, built):
        settings = {"batch_size": 4, "label_cases": {"a", "b"}}
        aware = stream_of(built, **settings, mixture=Mixture(labelled_fraction=0.5))
        assert all(bool(row.any()) == (slot % 4 in (1, 3)) for batch in islice(aware, 30)
                   for row, slot in zip(batch.label, batch.slots, strict=True))  # fmt: skip

    def test_an_upsampled_data_set_comes_that_often(self, cohort, small_config, tmp_path):
        small, large = cohort("s"), cohort("l", "m")
        build([small, large], tmp_path / "both", small_config)
        mixture = Mixture(upsampling={small.name: 3.0})
        times = Counter(epoch_of(tmp_path / "both", mixture=mixture))
        assert {(case_of(key), count) for key, count in times.items()} == {("s", 3), ("l", 1), ("m", 1)}

    @pytest.mark.parametrize(
        ("mixture", "label_cases", "said"),
        [
            (Mixture(labelled_fraction=0.3), {"a"}, "no whole number of samples; the nearest is 0.25"),
            (Mixture(labelled_fraction=0.25), set(), "no labels may be read"),
            (Mixture(labelled_fraction=0.25), set("abcde"), "fewer than 3 patches without labels"),
            (Mixture(upsampling={"elsewhere": 2.0}), set(), "there is no data set elsewhere; choose among"),
        ],
    )
    def test_a_mixture_that_cannot_be_made_is_refused(self, built, mixture, label_cases, said):
        with pytest.raises(StreamError, match=said):
            stream_of(built, batch_size=4, label_cases=label_cases, mixture=mixture)


class TestPosition:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_counts_what_was_taken_and_not_what_was_read_ahead(self, built, workers):
        stream = stream_of(built, workers=workers, world_size=2, batch_size=6)
        batches = iter(stream)
        for taken in range(4):
            assert stream.position()["slot"] == 6 * taken
            next(batches)
        assert all(isinstance(value, int | str) for value in stream.position().values())

    def test_it_is_the_same_on_every_rank(self, built):
        positions = []
        for rank in range(3):
            stream = stream_of(built, world_size=3, rank=rank)
            keys_of(stream, 5)
            positions.append(stream.position())
        assert positions[0] == positions[1] == positions[2]

    def test_a_stream_taken_up_at_any_step_by_others_goes_on_as_if_never_stopped(self, built):
        epoch = stream_of(built, batch_size=6).samples_per_epoch
        whole = keys_of(stream_of(built, batch_size=6), 2 * epoch // 6 + 2)
        for stop in (0, 1, 2, epoch // 6 - 1, epoch // 6, epoch // 6 + 1, len(whole) - 2):
            stopped = stream_of(built, batch_size=6)
            assert keys_of(stopped, stop) == whole[:stop]
            position = json.loads(json.dumps(stopped.position()))
            for world_size, accumulation_steps in ((1, 1), (2, 1), (3, 2)):
                parts = []
                for rank in range(world_size):
                    resumed = stream_of(
                        built,
                        batch_size=6,
                        rank=rank,
                        world_size=world_size,
                        accumulation_steps=accumulation_steps,
                    )
                    resumed.seek(position)
                    parts.append(keys_of(resumed, 2 * accumulation_steps))
                for step in range(2):
                    of_step = slice(step * accumulation_steps, (step + 1) * accumulation_steps)
                    together = [key for part in zip(*(p[of_step] for p in parts), strict=True) for keys in part
                                for key in keys]  # fmt: skip
                    assert together == whole[stop + step]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 8}, "seed was 7 and is 8"),
            ({"batch_size": 2}, "batch_size was 3 and is 2"),
            ({"cases": {"a", "b"}}, "selection"),
            ({"label_cases": {"a"}}, "selection"),
            ({"mixture": Mixture(upsampling={})}, None),
            ({"label_cases": {"a"}, "mixture": Mixture(labelled_fraction=1 / 3)}, "selection"),
            ({"workers": 2}, None),
            ({"world_size": 3}, None),
        ],
    )
    def test_one_of_another_order_is_refused(self, built, change, named):
        position = stream_of(built).position()
        if named is None:
            stream_of(built, **change).seek(position)
        else:
            with pytest.raises(StreamError, match=named):
                stream_of(built, **change).seek(position)

    def test_one_in_other_shards_or_within_a_step_is_refused(self, built):
        position = stream_of(built).position()
        with pytest.raises(StreamError, match="manifest was other"):
            stream_of(built).seek(position | {"manifest": "other"})
        with pytest.raises(StreamError, match="slot 4 lies within a step"):
            stream_of(built).seek(position | {"slot": 4})


def damage_image(path: Path, key: str) -> str:
    _flip(path, read_index(path).samples[key]["ct.b2"].offset + 60)
    return rf"{key}\.ct\.b2 is damaged"


def damage_label(path: Path, key: str) -> str:
    _flip(path, read_index(path).samples[key]["seg.b2"].offset + 40)
    return rf"{key}\.seg\.b2 is damaged"


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


class TestDamage:
    @pytest.fixture
    def victim(self, copy) -> tuple[Path, str]:
        """A labelled sample, and its shard."""
        path = copy / "shard-000001.tar"
        return path, next(key for key in read_index(path).samples if case_of(key) in "ab")

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("damage", [damage_image, damage_label])
    def test_a_bad_sample_stops_a_small_run_in_one_line_that_names_shard_and_key(
        self, copy, victim, damage: Callable[[Path, str], str], workers
    ):
        cause = damage(*victim)
        with pytest.raises(StreamError, match=rf"shard-000001\.tar: {victim[1]}: {cause}; 1 of \d+ samples") as refused:
            epoch_of(copy, workers=workers, label_cases={"a", "b"})
        assert "\n" not in str(refused.value)

    def test_a_damaged_tar_header_does_no_harm(self, copy, victim, stored):
        """webdataset would end the shard here without a word; `verify` tells."""
        path, key = victim
        _flip(path, read_index(path).samples[key]["ct.b2"].offset - 512)
        assert sorted(epoch_of(copy)) == sorted(stored)

    def test_a_bad_sample_is_replaced_by_the_same_other_on_every_run_logged_and_listed(
        self, built, copy, victim, tmp_path, caplog
    ):
        damage_image(*victim)
        good = epoch_of(built)
        allowed = {"max_bad_fraction": 0.1}
        with caplog.at_level(logging.WARNING):
            runs = [epoch_of(copy, quarantine=tmp_path / "bad.jsonl", workers=n, **allowed) for n in (0, 2)]
        slot = good.index(victim[1])
        assert runs[0] == runs[1] and runs[0][slot] != victim[1]
        assert runs[0][:slot] + runs[0][slot + 1 :] == good[:slot] + good[slot + 1 :]
        listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert [(Path(entry["shard"]).name, entry["key"], entry["slot"]) for entry in listed] == [
            ("shard-000001.tar", victim[1], slot)
        ] * 2
        assert "is damaged" in listed[0]["cause"]
        assert sum(victim[1] in message for message in caplog.messages) == 2

        resumed = stream_of(copy, batch_size=1, **allowed)
        resumed.seek(resumed.position() | {"slot": slot})
        assert keys_in(resumed, 1) == [runs[0][slot]]

    def test_a_replacement_keeps_the_labelled_share(self, copy):
        for path in copy.glob("*.tar"):
            for key in [key for key in read_index(path).samples if case_of(key) == "a"][:1]:
                damage_image(path, key)
        settings = {"label_cases": {"a"}, "mixture": Mixture(labelled_fraction=0.25), "max_bad_fraction": 0.5}
        for keys in keys_of(stream_of(copy, batch_size=4, **settings), 40):
            assert sum(case_of(key) == "a" for key in keys) == 1

    def test_what_may_be_bad_is_counted_once_for_each_sample(self, copy, victim):
        damage_image(*victim)
        one_but_not_two = 1.5 / Manifest.load(copy).patches
        stream = stream_of(copy, batch_size=1, max_bad_fraction=one_but_not_two)
        keys = keys_in(stream, 3 * stream.samples_per_epoch)
        assert len(keys) == 3 * stream.samples_per_epoch and victim[1] not in keys
        path, other = copy / "shard-000000.tar", next(iter(read_index(copy / "shard-000000.tar").samples))
        damage_image(path, other)
        with pytest.raises(StreamError, match=r"2 of \d+ samples cannot be read"):
            epoch_of(copy, max_bad_fraction=one_but_not_two)

    @pytest.mark.parametrize("cut_at", [0, 600, 20_000])
    def test_a_shard_that_is_cut_is_named(self, copy, cut_at):
        os.truncate(copy / "shard-000001.tar", cut_at)
        with pytest.raises(StreamError, match=r"shard-000001\.tar"):
            epoch_of(copy)

    def test_a_missing_shard_is_named(self, copy):
        (copy / "shard-000001.tar").unlink()
        with pytest.raises(StreamError, match=r"shard-000001\.tar"):
            epoch_of(copy)

    def test_an_index_that_is_not_the_manifests_is_refused(self, copy):
        index = copy / "shard-000000.index.json"
        index.write_text(json.dumps(json.loads(index.read_text())))
        with pytest.raises(StreamError, match=r"shard-000000\.index\.json: is not the index that the manifest names"):
            epoch_of(copy)

    def test_a_shard_replaced_under_a_running_stream_is_noticed(self, copy, cohort, small_config, tmp_path):
        batches = iter(stream_of(copy, batch_size=1))
        next(batches)
        build([cohort("x", "y", "z")], tmp_path / "other", small_config)
        for path in (tmp_path / "other").glob("shard-*"):
            os.replace(path, copy / path.name)
        with pytest.raises(StreamError, match=r"is damaged|is not the index|is cut|ends before"):
            for _ in range(200):
                next(batches)


class TestWorkers:
    def test_a_worker_that_dies_is_one_line(self, built):
        batches = iter(stream_of(built, workers=2))
        next(batches)
        for child in _children():
            os.kill(child, signal.SIGKILL)
        with pytest.raises(StreamError, match=r"stream worker stream-\d .* was killed by SIGKILL") as refused:
            for _ in range(200):
                next(batches)
        assert "\n" not in str(refused.value) and not _children()

    def test_none_is_left_when_the_stream_is_let_go(self, built):
        batches = iter(stream_of(built, workers=2))
        next(batches)
        assert len(_children()) == 2
        del batches
        assert not _children()

    def test_a_stream_may_be_iterated_again_and_goes_on(self, built):
        stream = stream_of(built, workers=1)
        parts = keys_of(stream, 3) + keys_of(stream, 4)
        assert parts == keys_of(stream_of(built), 7)


def _children() -> list[int]:
    """Processes of this one that multiprocessing started for streams."""
    import psutil

    return [p.pid for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_batches_cross_to_a_gpu_one_ahead_in_the_same_order(built, monkeypatch):
    """With stand-ins for CUDA: that the next batch crosses while one is used, and none is let go before it has."""
    events = []

    class CopyStream:
        def synchronize(self):
            events.append("arrived")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: CopyStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *region: 0))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Batch, "to", lambda batch, device: events.append(batch.keys) or batch)
    stream, expected = stream_of(built, device=torch.device("cuda")), keys_of(stream_of(built), 7)
    for number, batch in enumerate(islice(stream, 6)):
        assert batch.keys == expected[number]
        assert events[-1] == expected[number + 1] and events.count("arrived") == number + 1
        assert stream.position()["slot"] == 3 * (number + 1), "what crossed ahead is not taken yet"


def test_memory_that_cannot_be_pinned_spoils_no_launch(monkeypatch, caplog):
    """CUDA keeps a failed call's error for the next launch; stand-ins for both."""
    pending = []

    def register(*region):
        pending.append("an error")
        return 1

    def launch(*shape, device):
        if pending:
            raise RuntimeError(pending.pop())

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "ones", launch)
    _pin(SimpleNamespace(memory=bytearray(16)))
    launch(1, device="cuda")
    assert "could not be pinned (CUDA error 1)" in caplog.text
