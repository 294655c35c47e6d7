"""Names for scans of patients: keyed digests that nobody without the key can trace back."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from mixcl_dist.data_shards.volume import CaseError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MIXCL_PSEUDONYM_KEY"


def pseudonym(identity: str) -> str:
    """The name, outside the reader, of the scan that `identity` tells apart from all others."""
    text = identity.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8
    return "ct-" + hmac.new(_key(), text, "sha256").hexdigest()[:16]


def _key() -> bytes:
    """The secret of pseudonyms: the environment's, else this user's own, made at first need; raises `CaseError`."""
    if os.environ.get(KEY_VARIABLE):
        return os.environ[KEY_VARIABLE].encode()
    try:
        return _own_key(Path.home() / ".config" / "mixcl" / "pseudonym.key")
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
