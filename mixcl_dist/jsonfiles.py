"""JSON files, and files of a JSON value a line: written whole or not at all, read strictly, refused in one line.

What is missing, of another type, out of its bounds, not finite, cut short or of a newer version is refused with the
file, the key and the cure. For a number that is not finite null is written.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixcl_dist.data_shards.storage.publishing import publish
from mixcl_dist.errors import RunError

FORMAT = 1
"""Version of all these files; a file that names none is of the first."""
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Kind = TypeVar("Kind")


def read_json(file: Path, kind_of: Callable[[Mapping[str, Any]], type[Kind]], cure: str, missing: str) -> Kind:
    """The value in a file, of the type that `kind_of` makes of its content; raises `RunError` with `cure`, or with
    `missing` where there is no file."""
    return _parsed(kind_of, _bytes_of(file, missing), str(file), cure)


def read_lines(file: Path, kind: type[Kind], cure: str) -> list[Kind]:
    """A JSON value of every line; none where there is no file. What follows the last end of line was left by a killed
    process, and out. Raises `RunError`."""
    if not file.exists():
        return []
    *lines, _unfinished = _bytes_of(file, cure).split(b"\n")
    return [_parsed(lambda _: kind, line, f"{file}: line {number}", cure) for number, line in enumerate(lines, start=1)]


def append_line(file: Path, value: Any) -> None:
    """Add a JSON value to a file of lines; raises `RunError` where there is no room for it."""
    with _named(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(finite(value)) + "\n")


def write_lines(file: Path, values: Iterable[Any]) -> None:
    write_atomic(file, "".join(json.dumps(finite(value)) + "\n" for value in values).encode())


def write_json(file: Path, value: Any) -> None:
    write_atomic(file, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def write_atomic(file: Path, content: bytes) -> None:
    """Publish a file whole or not at all; raises `RunError` where there is no room for it."""
    with _named(file), publish(file) as stream:
        stream.write(content)


def finite(value: Any) -> Any:
    """`value` with null for every number in it that is not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What the system says of a file that cannot be written, in one line with the cure."""
    try:
        yield
    except OSError as error:
        cure = "make room there, or give a folder that you may write, and give the command again"
        raise RunError(f"{file}: {error.strerror or error}; {cure}") from None


def _bytes_of(file: Path, missing: str) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{file}: no such file; {missing}") from None
    except OSError as error:
        raise RunError(f"{file}: {error.strerror}; give a folder that you may read") from None


def _parsed(kind_of: Callable[[Mapping[str, Any]], type[Kind]], text: bytes, where: str, cure: str) -> Kind:
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        if isinstance(content, dict) and isinstance(version := content.get("format"), int) and version > FORMAT:
            cure = f"read it with that, or {cure}"
            raise ValueError(f"is of format {version}, written by a newer mixcl-dist")
        kind: Any = kind_of(content if isinstance(content, dict) else {})
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise RunError(f"{where}: {_first(error)}; {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunError(f"{where}: cannot be read ({' '.join(str(error).split())}); {cure}") from None
    except ValueError as error:
        raise RunError(f"{where}: {' '.join(str(error).split())}; {cure}") from None


def plain(record: Any, exclude_defaults: bool = False) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    kind: Any = type(record)
    return _adapter(kind).dump_python(record, mode="json", exclude_defaults=exclude_defaults)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    own = hasattr(kind, "__pydantic_config__") or is_dataclass(kind)
    return TypeAdapter(kind, config=None if own else STRICT)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong with a file, with the key."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} is {shown(first['input'])}: {message}" if key else message


def shown(value: Any) -> str:
    """In a message, in brief."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")
