"""Where files lie: a folder or a URL, read by spans of bytes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from mixcl_dist.data_shards.storage.folder import FolderStore
from mixcl_dist.data_shards.storage.store import CacheConfig, StorageError, Store, without_credentials

_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}


def open_store(url: str | Path, cache: CacheConfig | None = None) -> Store:
    """The store at a folder or a http, https, s3 or gs URL; nothing is read yet. A folder needs and uses no cache.

    Credentials, endpoints and proxies come from where aiohttp, s3fs and gcsfs find them: `~/.netrc`, `HTTPS_PROXY`;
    `AWS_*` and `~/.aws`; Google's default credentials; and fsspec's own configuration.

    Raises `StorageError` for another scheme, for a package that is not installed and for an unusable cache folder.
    """
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        if re.match(rf"({'|'.join(_PACKAGES)}):/", text):
            raise StorageError(f"{text} lacks a slash after its scheme; give the URL as text, not as a path")
        return FolderStore(Path(url))
    if scheme not in _PACKAGES:
        known = "give a folder or a http, https, s3 or gs URL"
        raise StorageError(f"scheme {scheme} of {without_credentials(text)} is unknown; {known}")
    try:
        importlib.import_module(_PACKAGES[scheme])
    except ImportError:
        raise StorageError(f"{scheme}:// needs {_PACKAGES[scheme]}; pip install 'mixcl-dist[remote]'") from None
    # Imports aiohttp, which only that extra installs.
    from mixcl_dist.data_shards.storage.remote import RemoteStore

    return RemoteStore(text, cache)
