"""What has been done with which sources and settings: a line of JSON an item, so that the next call goes on."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, ConfigDict
from typing_extensions import TypedDict

from mixcl_dist.jsonfiles import finite, read_lines
from mixcl_dist.records import Count, Dice, Length, TrialRecord, told


def _as_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class LedgerRecord(TypedDict, total=False):
    """A line of a ledger; further figures may stand in it."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")  # type: ignore[misc]

    item: Required[str]
    digest: Required[str]
    status: Required[Literal["begun", "partial", "failed", "barred", "stopped", "done"]]
    text: str
    seconds: Length
    steps: Count
    mean: Dice | None
    linear: Dice
    knn: Dice
    machine: dict[str, str | int | float | None]
    card: str
    date: Annotated[str, AfterValidator(_as_time)]
    """UTC, ISO 8601."""
    trial: TrialRecord
    """Of a study, its row."""
    gpus: Length
    """Of a study's probe, the share of a GPU that one trial needs."""
    step: Count
    """Of a study's partial record, to which `mean` belongs."""


STATES = ("missing", "stale", "begun", "partial", "failed", "barred", "stopped", "done")
"""How an item stands, in the order in which items are run; those that are "done" are not."""


class Ledger:
    """The newest record of every item.

    A record has `item`, `digest` (of the sources and settings that matter for it), `status` (one of the later
    `STATES`) and figures. `path` is appended to and synced item by item. With a `card` records of other cards do not
    count, and the file begins with what `earlier` ones hold of this card, so that it is whole by itself.
    """

    def __init__(self, path: Path, card: str | None = None, earlier: Iterable[Path] = ()) -> None:
        self.path, self.card = path, card
        self.records: dict[str, LedgerRecord] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        for source in (*earlier, path):
            for record in read(source):
                if card is None or record.get("card") == card:
                    self.records[record["item"]] = record
        if not path.exists():
            self._write(self.records.values())

    def state(self, item: str, digest: str) -> str:
        """One of `STATES`."""
        record = self.records.get(item)
        if record is None:
            return "missing"
        return record["status"] if record["digest"] == digest else "stale"

    def add(self, item: str, digest: str, status: str, **figures: Any) -> LedgerRecord:
        record = LedgerRecord(item=item, digest=digest, status=status, **figures)  # type: ignore[typeddict-item]
        if self.card is not None:
            record["card"] = self.card
        with self._lock:
            self.records[item] = record
            self._write([record])
        return record

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(finite(record), default=told) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[LedgerRecord]:
    """The records of a file, without a last line that a killed process left unfinished; raises `RunError`."""
    return read_lines(path, LedgerRecord, "remove the line, and its item is made again")


def digest_of(root: Path, patterns: Iterable[str], *settings: object) -> str:
    """Of the contents of all files that match, and of settings."""
    total = hashlib.sha256(repr(settings).encode())
    for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
