"""What is refused of a store, a cache or a lock can be mended as its message says: each cure is followed here."""

from __future__ import annotations

import os
import re

import pytest

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.cache import SpanCache
from mixcl_dist.data_shards.storage.publishing import HeldError, exclusive
from mixcl_dist.data_shards.storage.store import CacheConfig, StorageError


@pytest.mark.parametrize(
    ("url", "said", "cured"),
    [
        ("https:/server/set", "lacks a slash .*; give the URL as text", "https://server/set"),
        ("ftp://server/set", "give a folder or a (http), https, s3 or gs URL", "{}://server/set"),
        ("https://", "give one like (https://server/path) or", "{}"),
        ("https://", "or (s3://bucket/path)$", "{}"),
        ("s3://key:secret@bucket/set", "(s3://bucket/set): .*; set them in the environment", "{}"),
        ("s3://bucket/set?versionId=3", "(s3://bucket/set): .*; set them in the environment", "{}"),
    ],
)
def test_a_url_is_mended_as_it_is_said(url, said, cured):
    with pytest.raises(StorageError) as error:
        open_store(url)
    found = re.search(said, str(error.value))
    assert found and "secret" not in str(error.value)
    open_store(cured.replace("{}", found[1] if found.groups() else ""))


def test_another_folder_makes_a_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: cannot be made for the cache: .*; give one that you may write"):
        SpanCache(CacheConfig(tmp_path / "file", 10**6))
    SpanCache(CacheConfig(tmp_path / "folder", 10**6))


def test_a_lock_is_free_once_its_holder_has_ended_or_its_file_is_deleted(tmp_path):
    lock = tmp_path / "lock"
    with exclusive(lock), pytest.raises(HeldError, match="is working here; wait for it"), exclusive(lock):
        pass
    with exclusive(lock):
        pass
    lock.write_text(f"not-{os.uname().nodename} 17")
    with pytest.raises(HeldError) as error, exclusive(lock):
        pass
    (path,) = re.findall("if it runs no more, delete (.*)$", str(error.value))
    os.unlink(path)
    with exclusive(lock):
        pass
