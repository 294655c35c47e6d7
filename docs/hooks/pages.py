"""Pages that MkDocs makes of what stands elsewhere, so that nothing is written twice: the folders' READMEs, the help of
each verb, the settings with their docstrings, and the messages in the sources."""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from messages import ALTERNATIVE, error_classes, messages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
COPIED = {
    "README.md": "overview.md",
    "kernels/README.md": "design/kernels.md",
    "data_shards/README.md": "design/data_shards.md",
    "benchmarks/README.md": "design/benchmarks.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "design/contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository → page."""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
PYTHON, WIDTH = "mixcl_dist/", "96"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {page: copied(source) for source, page in COPIED.items()}
    made |= {"reference/commands.md": commands(), "reference/settings.md": settings(), "messages.md": all_messages()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def copied(source: str) -> str:
    """A file's text with its links led to pages of the site; what is no page is named instead."""
    here, page = posixpath.dirname(source), posixpath.dirname(COPIED[source])

    def led(link: re.Match) -> str:
        text, target, anchor = link[1], posixpath.normpath(posixpath.join(here, link[2])), link[3] or ""
        if target.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(target.removeprefix('docs/'), page or '.')}{anchor})"
        if target in COPIED:
            return f"[{text}]({posixpath.relpath(COPIED[target], page or '.')}{anchor})"
        return f"{text} (`{target}`)"

    return LINK.sub(led, (ROOT / source).read_text())


def commands() -> str:
    """The help of every verb."""
    from mixcl_dist.cli import _parser

    os.environ["COLUMNS"] = WIDTH  # argparse fills lines to it
    lines = ["# Commands", "", "What `mixcl VERB --help` prints, for every verb.", ""]
    for name, parser in verbs(_parser()):
        lines += [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser that runs something, by the words that lead to it."""
    inner = parser.get_default("verbs")
    if not inner:
        yield parser.prog, parser
        return
    for one in inner.choices.values():
        yield from verbs(one)


def settings() -> str:
    """Every section of settings, explained in full by `mixcl config show`."""
    from mixcl_dist.config import load, to_dict
    from mixcl_dist.manual import HEAD, manual

    lines = ["# Settings", "", "What `mixcl config show SECTION` prints, for every section. Give a setting as"]
    lines += ["`--section.key value`, in a YAML file (`--config`) or by a recipe (`--recipe`); the later wins.", ""]
    for section in to_dict(load()):
        page = manual(load(), [], section).removeprefix(HEAD.rstrip()).strip()
        lines += [f"## {section}", "", "```yaml", page, "```", ""]
    return "\n".join(lines)


def all_messages() -> str:
    """Every message, by its class."""
    classes, found = error_classes(ROOT / "mixcl_dist"), messages(ROOT / "mixcl_dist")
    lines = [
        "# Every message",
        "",
        "Read from the sources when this page is built. What a run fills in is in *italics*; of a part that depends on",
        "the case, the forms stand behind one another. [What to do first](wrong.md) is on its own page.",
        "",
    ]
    for name, says in classes.items():
        rows = [message for message in found if message.error == name]
        if rows:
            lines += [f"## {name}", "", says, ""]
            lines += [f"- {_inline(row.text)} <span class=where>{_short(row.file)}</span>" for row in rows] + [""]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """As text of a page: nothing in it is markup."""
    plain = re.sub(r"([\\`*_{}\[\]<>#|~^=!$&])", lambda found: f"&#{ord(found[0])};", text.replace(ALTERNATIVE, "\0"))
    return re.sub("‹([^›]*)›", r"<var>\1</var>", plain).replace("\0", " <b>or</b> ")


def _short(file: str) -> str:
    return file.removeprefix(PYTHON).removesuffix(".py").removesuffix("/__init__")  # whose _ would be markup
