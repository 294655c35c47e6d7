"""All settings as YAML that explains itself: what each is for, its bounds, and where its value comes from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from mixcl_dist.config import Config, ConfigError, schema, to_dict

WIDTH = 110
HEAD = """# Later wins: defaults, recipe, files, command line. Beside each value: what it may be, and where it is from.
# `mixcl config show SECTION` explains one section in full; this page can be given as --config.
"""


def manual(config: Config, layers: list[tuple[str, dict[str, Any]]], section: str | None = None) -> str:
    """YAML of all sections, or of one in more words; `layers` are what `config` was joined from (`config.layers`).

    Raises `ConfigError` for a section that does not exist.
    """
    tree, parts = to_dict(config), schema()
    if section is not None and section not in tree:
        raise ConfigError(f"there is no section {section}; sections: {', '.join(tree)}")
    origin = {f"{name}.{key}": where for where, layer in layers for name in layer for key in layer[name]}
    pages = []
    for name in [section] if section else tree:
        part = _resolved(parts["properties"][name], parts)
        lines = [*_comment(part["description"], ""), f"{name}:"]
        for key, value in tree[name].items():
            said = _resolved(part["properties"][key], parts) | part["properties"][key]
            lines += _comment(said["description"] if section else _first_sentence(said["description"]), "  ")
            shown = textwrap.indent(_yaml(key, value), "  ").splitlines()
            note = f"  # {_range(said, parts)}; {origin.get(f'{name}.{key}', 'default')}"
            lines += [shown[0] + note, *shown[1:]]
        pages.append("\n".join(lines))
    return "\n\n".join([HEAD.rstrip(), *pages]) + "\n"


def _resolved(part: Mapping[str, Any], parts: Mapping[str, Any]) -> Mapping[str, Any]:
    return parts["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part


def _comment(text: str, indent: str) -> list[str]:
    text = re.sub(r"\bNone\b", "null", " ".join(text.split()))
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!e\.g)\.\s", text)[0].rstrip(".") + "."


def _yaml(key: str, value: Any) -> str:
    flow = None if isinstance(value, dict | list) else False
    return yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=flow, width=10**6, allow_unicode=True)


def _range(part: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """What a value may be, in a few words."""
    part = _resolved(part, parts)
    match part:
        case {"anyOf": choices}:
            return " or ".join(_range(choice, parts) for choice in choices)
        case {"enum": names}:
            return ", ".join(map(str, names))
        case {"const": name}:
            return str(name)
        case {"type": "integer" | "number"}:
            return _interval(part)
        case {"prefixItems": [first, *others]}:
            return f"{1 + len(others)} values, {_range(first, parts)}"
        case {"items": item}:
            return f"list of {_range(item, parts)}"
        case {"additionalProperties": dict() as inner}:
            return f"name: {_range(inner, parts)}"
        case {"properties": inner}:
            return "{" + ", ".join(inner) + "}"
    return {"string": "text", "boolean": "true, false", "null": "null"}.get(part["type"], "name: value")


def _interval(part: Mapping[str, Any]) -> str:
    low = f"{part['minimum']:g}" if "minimum" in part else f"above {part['exclusiveMinimum']:g}"
    high = f"to {part['maximum']}" if "maximum" in part else f"to below {part['exclusiveMaximum']}"
    return f"{low} {high}"
