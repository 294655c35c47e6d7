"""Streams from real servers: the samples of the folder, through faults and caches, and one line where they end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from mixcl_dist.data_shards.storage.store import CacheConfig
from mixcl_dist.data_shards.streaming.stream import PatchStream, StreamError

from .. import servers

BATCHES = 20


def stream_of(shards: Path | str, workers: int = 0, **settings) -> PatchStream:
    return PatchStream(shards, batch_size=4, seed=7, workers=workers, label_cases={"a"}, **settings)


def shown(stream: PatchStream) -> list[tuple[list[str], int, int]]:
    return [(batch.keys, int(batch.image.sum()), int(batch.label.sum())) for batch in islice(stream, BATCHES)]


@pytest.fixture(scope="module")
def expected(built) -> list:
    return shown(stream_of(built))


@pytest.fixture(scope="module")
def nginx(built, tmp_path_factory) -> Iterator[servers.Nginx]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed; make install")
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as nginx:
        for path in built.iterdir():
            if path.is_file():
                shutil.copy(path, nginx.root)
        yield nginx


@pytest.fixture
def proxy(nginx, monkeypatch) -> Iterator[servers.Proxy]:
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.ATTEMPTS", 3)
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.FIRST_PAUSE_S", 0.01)
    with servers.proxy(nginx.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def s3(built) -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed; make install")
    with pytest.MonkeyPatch.context() as environment, servers.s3() as endpoint:
        unset = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        for name, value in {**unset, **servers.ACCESS, "AWS_ENDPOINT_URL": endpoint}.items():
            environment.setenv(name, value)
        client = servers.s3_client(endpoint)
        client.create_bucket(Bucket=servers.BUCKET)
        for path in built.iterdir():
            if path.is_file():
                client.upload_file(str(path), servers.BUCKET, f"set/{path.name}")
        yield f"s3://{servers.BUCKET}/set"


@pytest.mark.parametrize("workers", [0, 2])
def test_from_http_and_s3_come_the_same_samples_as_from_the_folder(nginx, s3, expected, workers):
    assert shown(stream_of(nginx.url, workers)) == expected
    assert shown(stream_of(s3, workers)) == expected


def test_a_sample_and_its_label_cost_one_request(nginx):
    nginx.seen()
    stream = stream_of(nginx.url)
    keys = [key for batch in islice(stream, 5) for key in batch.keys]
    asked = [line for line in nginx.seen() if ".tar" in line]
    assert len(asked) <= len(keys)
    assert all("206" in line and "bytes=" in line for line in asked)


def test_faults_on_the_way_change_nothing(proxy, expected):
    proxy.faults[:] = ["", "", "reset", "", "cut", 503, "", "", "reset", 503, "", "cut"]
    assert shown(stream_of(proxy.url)) == expected
    assert not proxy.faults


def test_a_cache_serves_the_second_epoch_and_damage_in_it_does_no_harm(nginx, expected, tmp_path):
    cache = CacheConfig(tmp_path / "cache", 1 << 26)
    assert shown(stream_of(nginx.url, 2, cache=cache)) == expected
    first = set(nginx.seen())
    assert shown(stream_of(nginx.url, 2, cache=cache)) == expected
    twice = {line for line in nginx.seen() if ".tar" in line and "bytes=0-0" not in line} & first
    assert len(twice) <= 2, "a worker may have been stopped while it fetched one"
    for path in cache.folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    assert shown(stream_of(nginx.url, cache=cache)) == expected


@pytest.mark.parametrize(("status", "said"), [(503, r"HTTP 503, tried 3 times .*"), (403, "access is refused .*")])
def test_a_server_that_goes_away_stops_the_run_in_one_line_and_replaces_nothing(proxy, tmp_path, status, said):
    stream = stream_of(proxy.url, quarantine=tmp_path / "bad.jsonl", max_bad_fraction=1.0)
    batches = iter(stream)
    first = next(batches)
    proxy.faults[:] = [status] * 1000
    with pytest.raises(StreamError, match=said + "; when it is there again, run again") as refused:
        for _ in range(BATCHES):
            next(batches)
    assert "\n" not in str(refused.value) and not (tmp_path / "bad.jsonl").exists()
    proxy.faults.clear()
    position = stream.position()
    assert position["slot"] % 4 == 0 and first.keys
    resumed = stream_of(proxy.url)
    resumed.seek(position)
    again = stream_of(proxy.url)
    again.seek(position | {"slot": 0})
    skipped = list(islice(again, int(position["slot"]) // 4 + 1))[-1]
    assert torch.equal(next(iter(resumed)).image, skipped.image)
