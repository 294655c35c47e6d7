"""What a command line says: a verb, its options, and settings among them (`--section.key value`), in any order."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixcl_dist.config import Config


def parse(root: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The verb's options, with the settings among them as `overrides`; all of them may stand in any order."""
    overrides, others, unfinished = _take_settings(words)
    parser, others = _find_verb(root, others)
    if parser.get_default("verbs"):
        parser.parse_args(others)  # prints help, or says which verbs there are
    if parser.get_default("launch"):  # its settings are those of the command behind it
        return parser.parse_args(_find_verb(root, words)[1])
    options, rest = parser.parse_known_intermixed_args(others)
    if not options.takes_settings:
        rest += [f"--{key}" for key, _ in overrides]
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(rest[0], known, n=1)
        problem = f"unknown option {rest[0]}" if rest[0].startswith("-") else f"unexpected argument {rest[0]!r}"
        parser.error(problem + (f"; did you mean {close[0]}?" if close else ""))
    if unfinished:
        parser.error(f"{unfinished} needs a value")
    options.overrides = _with_short_forms(options, overrides)
    return options


def _find_verb(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the verb that the words begin with, and the words behind it."""
    while (verbs := parser.get_default("verbs")) and words and words[0] in verbs.choices:
        parser, words = verbs.choices[words[0]], words[1:]
    return parser, words


def _take_settings(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str], str]:
    """Keys and values of `--section.key value` and `--section.key=value`, the other words, and a key without a value.

    A key takes the next word, whatever it looks like: `--network.window_hu -160,240`.
    """
    settings: list[tuple[str, str]] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            return settings, [*others, word, *left], ""
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            others.append(word)
            continue
        if not equals and not (value := next(left, "")):
            return settings, others, word
        settings.append((key, value))
    return settings, others, ""


def _with_short_forms(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The settings with those that the verb has a short option for; an error where both are given and differ."""
    given = dict(overrides)
    short = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    for key, value in short.items():
        if given.get(key, value) != value:
            (name,) = (action.option_strings[0] for action in options.parser._actions if action.dest == key)
            options.parser.error(f"{name} {value} and --{key} {given[key]} are one setting; give one of them")
    return [*overrides, *short.items()]


def refuse_lost(options: argparse.Namespace, config: Config, used: Config, why: str) -> None:
    """Raise `ConfigError` where a setting of the command line would give way in silence."""
    from mixcl_dist.config import ConfigError, differences  # not for `mixcl --help`, which it would make slow

    for key in differences(config, used):
        if key in dict(options.overrides):
            raise ConfigError(f"--{key}: {why}; leave it out")
