"""Names for scans of patients: keyed digests that nobody without the key can trace back."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MIXCL_PSEUDONYM_KEY"


def pseudonym(identity: str) -> str:
    """The name, outside the reader, of the scan that `identity` tells apart from all others."""
    return "ct-" + hmac.new(_key(), identity.encode(), "sha256").hexdigest()[:16]


def _key() -> bytes:
    """The secret of pseudonyms: the environment's, else this user's own, made at first need."""
    if os.environ.get(KEY_VARIABLE):
        return os.environ[KEY_VARIABLE].encode()
    file = Path.home() / ".config" / "mixcl" / "pseudonym.key"
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
