"""One file in a folder and on real servers, sound and broken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import Store

from .. import servers
from .reading import CONTENT


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture(scope="session")
def running_nginx(tmp_path_factory) -> Iterator[servers.Nginx]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed; make install")
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as nginx:
        yield nginx


@pytest.fixture
def nginx(running_nginx) -> servers.Nginx:
    """With a.tar alone, and nothing seen yet."""
    shutil.rmtree(running_nginx.root)
    running_nginx.root.mkdir()
    (running_nginx.root / "a.tar").write_bytes(CONTENT)
    running_nginx.seen()
    return running_nginx


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Few attempts at short intervals."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed; make install")
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.ATTEMPTS", 3)
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.FIRST_PAUSE_S", 0.01)


@pytest.fixture
def impatient(hasty, monkeypatch) -> None:
    """Where no answer comes in time anyway."""
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.ANSWER_TIMEOUT_S", 0.7)


@pytest.fixture
def less_patient(hasty, monkeypatch) -> None:
    """Where an answer comes in time, from a busy machine too, once another was waited for in vain."""
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.ANSWER_TIMEOUT_S", 3)


@pytest.fixture
def proxy(nginx, hasty) -> Iterator[servers.Proxy]:
    with servers.proxy(nginx.url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed; make install")
    with servers.s3() as endpoint:
        client = servers.s3_client(endpoint)
        client.create_bucket(Bucket=servers.BUCKET)
        client.put_object(Bucket=servers.BUCKET, Key="set/a.tar", Body=CONTENT)
        yield endpoint


@pytest.fixture
def s3(s3_endpoint, hasty, monkeypatch) -> str:
    """The URL of a folder with a.tar; its endpoint is in the environment."""
    unset = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_PROFILE": "default"}
    environment = {**unset, **servers.ACCESS, "AWS_ENDPOINT_URL": s3_endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE")
    return f"s3://{servers.BUCKET}/set"


@pytest.fixture
def gs(hasty, monkeypatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed; make install")
    with servers.google_storage() as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        servers.upload_to_google_storage(endpoint, "set/a.tar", CONTENT)
        yield f"gs://{servers.BUCKET}/set"


@pytest.fixture(params=["folder", "nginx", "s3", "gs"])
def anywhere(request) -> Store:
    """A store with a.tar."""
    place = request.getfixturevalue(request.param)
    return open_store(place.url if request.param == "nginx" else place)
