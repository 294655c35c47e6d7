"""How a verb is added to the command line, and what several of them read alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = """settings:
  --recipe NAME            start from a named recipe
  --config FILE            read settings from a YAML file (may be given again; the later wins)
  --section.key VALUE      set one value, e.g. --pretrain.steps 2000 --views.size 32,32,32
  `mixcl config show` prints every section, key and value.
"""


def add_verb(
    verbs: Any, name: str, function: Callable, summary: str, example: str, takes_settings: bool = True
) -> Callable[..., argparse.Action]:
    """Add a verb with its one-line summary and example; returns its `add_argument`."""
    parser = verbs.add_parser(
        name,
        allow_abbrev=False,
        help=summary,
        description=summary,
        epilog=(SETTINGS + "\n" if takes_settings else "") + f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=function, parser=parser, takes_settings=takes_settings)
    if takes_settings:
        parser.add_argument("--recipe", metavar="NAME", help=argparse.SUPPRESS)
        parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help=argparse.SUPPRESS)
    return parser.add_argument


def add_verbs(parser: argparse.ArgumentParser, metavar: str = "VERB") -> Any:
    verbs = parser.add_subparsers(title=f"{metavar.lower()}s", metavar=metavar, required=True)
    parser.set_defaults(verbs=verbs)
    return verbs


def config_of(options: argparse.Namespace, recipe: str | None = None) -> Any:
    from mixcl_dist.config import load

    return load(*options.config, recipe=options.recipe or recipe, overrides=options.overrides)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; give 1 or more")
    return int(text)


def check_file(options: argparse.Namespace, name: str) -> None:
    """End where the file that an option names could not be written later on."""
    path = getattr(options, name)
    if path and not path.parent.is_dir():
        options.parser.error(f"--{name} {path}: its folder does not exist; make it first")


def start_of(text: str) -> Path | None:
    return None if text == "none" else Path(text)
