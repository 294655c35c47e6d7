"""Names for scans of patients: keyed digests that nobody without the key can trace back.

Who has the key may: what it named is kept beside it, readable by its owner alone, and never in shards.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mixcl_dist.data_shards.volume import CaseError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MIXCL_PSEUDONYM_KEY"
PREFIX = "ct-"


def pseudonym(identity: str) -> str:
    """The name, outside the reader, of the scan that `identity` tells apart from all others."""
    text = identity.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8
    return PREFIX + hmac.new(_key(), text, "sha256").hexdigest()[:16]


def _key() -> bytes:
    """The secret of pseudonyms: the environment's, else this user's own, made at first need; raises `CaseError`."""
    if os.environ.get(KEY_VARIABLE):
        return os.environ[KEY_VARIABLE].encode()
    try:
        return _own_key(_folder() / "pseudonym.key")
    except (RuntimeError, OSError) as error:  # no home, as in many a container, or none to write in
        reason = getattr(error, "strerror", None) or "this user has no home folder"
        what = f"the key of pseudonyms cannot be kept here: {reason}"
        cure = f"set {KEY_VARIABLE} to a secret of your own, the same every time"
        raise CaseError(what, where=Path("~/.config/mixcl/pseudonym.key"), cure=cure) from None


def _own_key(file: Path) -> bytes:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent) as draft:  # readable by its owner alone
            draft.write(secrets.token_hex(32).encode())
            draft.flush()
            os.fsync(draft.fileno())
            with suppress(FileExistsError):  # another process was first
                os.link(draft.name, file)
                logger.warning("made the key of pseudonyms: %s (keep it, and keep it secret)", file)
    return file.read_bytes()


def _folder() -> Path:
    return Path.home() / ".config" / "mixcl"


def remember(files: Mapping[str, Path]) -> None:
    """Keep which file each pseudonym stands for, beside this user's own key; where the key is the environment's, this
    machine may not be the place for it, and nothing is kept."""
    known = traced()
    fresh = {name: os.fspath(file) for name, file in files.items() if name.startswith(PREFIX)}
    lines = [json.dumps([name, file]) + "\n" for name, file in fresh.items() if known.get(name) != file]
    if lines and not os.environ.get(KEY_VARIABLE):
        descriptor = os.open(_folder() / "pseudonyms.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w") as log:
            log.write("".join(lines))


def traced() -> dict[str, str]:
    """Pseudonym → the first file of its scan, as far as builds of this user have kept it."""
    with suppress(OSError, RuntimeError):
        return dict(map(json.loads, (_folder() / "pseudonyms.jsonl").read_text().splitlines()))
    return {}
