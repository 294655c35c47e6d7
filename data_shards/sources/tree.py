"""Every file below a folder, once, and what becomes of those that are no input of a case.

Links are followed, after everything that is no link, so that a scan keeps its path when links to it appear. What could
be a scan and is not used is never passed over without a word.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mixcl_dist.data_shards.sources.case import VOXEL_ENDINGS, Source
from mixcl_dist.data_shards.volume import CaseError

REFUSED = "refused"
UNUSED = "could be scans, not used"
"""What is said of a file that a problem, or a stray, is about."""
HIDDEN = "hidden"
UNREAD_ENDINGS = (".mgh", ".mgz", ".mnc", ".nia", ".par", ".rec", ".gipl", ".vti", ".vtk", ".nii.zst", ".b2nd")
PACKED_ENDINGS = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst", ".tar.gz")
HEADERLESS_ENDINGS = (".img", ".img.gz", ".raw", ".raw.gz", ".zraw")
HEAD_BYTES = 560
"""As far as the marks of all formats reach: 540 bytes are a NIfTI-2 header."""


@dataclass
class Tree:
    """The files below a folder."""

    files: list[Path] = field(default_factory=list)
    """In order; all of those below that are neither hidden nor special."""
    others: dict[Path, str] = field(default_factory=dict)
    """File that is not to be read → why."""
    problems: list[CaseError] = field(default_factory=list)
    """Of folders that cannot be entered and links that lead nowhere."""


def files_below(folder: Path) -> Tree:
    """Every file below `folder`, whose links are followed; loops and second ways to one place are recognised."""
    tree, entered, known = Tree(), set(), set()
    root = folder.resolve()
    folders, links = deque([(folder, False)]), deque[tuple[Path, bool]]()
    while folders or links:
        place, hidden = folders.popleft() if folders else links.popleft()
        try:
            status = place.stat()
            if place.is_dir():
                if (status.st_dev, status.st_ino) in entered or _leads_above(place, root):
                    tree.others[place] = "links to folders that are read elsewhere"
                    continue
                entered.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(place), key=lambda entry: entry.name)
            else:
                _sort_file(place, hidden, (status.st_dev, status.st_ino) in known, tree)
                continue
        except OSError as error:
            _refuse(place, hidden, error, tree)
            continue
        for entry in entries:
            path, concealed = place / entry.name, hidden or entry.name.startswith(".")
            if entry.is_symlink():
                links.append((path, concealed))
            elif entry.is_dir(follow_symlinks=False):
                folders.append((path, concealed))
            else:
                known |= set() if concealed else {(status.st_dev, entry.inode())}
                _sort_file(path, concealed, False, tree)
    tree.files.sort()
    return tree


def _leads_above(place: Path, root: Path) -> bool:
    return place.is_symlink() and root.is_relative_to(place.resolve())


def _sort_file(path: Path, hidden: bool, known: bool, tree: Tree) -> None:
    if hidden:
        tree.others[path] = HIDDEN
    elif known:
        tree.others[path] = "other names of files"
    elif not path.is_file():
        tree.others[path] = "special files"
    else:
        tree.files.append(path)


def _refuse(place: Path, hidden: bool, error: OSError, tree: Tree) -> None:
    """A link that leads nowhere, or a folder that may not be entered."""
    if hidden:
        tree.others[place] = HIDDEN
        return
    link = place.is_symlink()
    what = "is a link that leads nowhere" if link else f"cannot be entered: {error.strerror}"
    cure = "restore what it leads to, or remove it" if link else "give yourself the permission, or move it elsewhere"
    tree.problems.append(CaseError(what, where=place, cure=cure))
    tree.others[place] = UNUSED


def accounted(source: Source, tree: Tree) -> Source:
    """`source` with a word on every file of `tree`; what it says nothing of belongs to what was refused."""
    used = {file for case in source.cases for file in case.inputs}
    others = dict.fromkeys(tree.files, REFUSED) | tree.others | dict(source.others)
    return replace(source, others={file: what for file, what in others.items() if file not in used})


def with_leftovers(source: Source, tree: Tree, known: Mapping[str, str]) -> Source:
    """`source`, which looks for its cases in places of its own, with what else lies in its folder.

    `known` are folders there → what scans and labels in them are that are no input of a case.
    """
    used = {file for case in source.cases for file in case.inputs} | {problem.where for problem in source.problems}
    others, left = {}, []
    for file in (file for file in tree.files if file not in used):
        place = next((known[part] for part in file.parts if part in known), None)
        if place and file.name.lower().endswith(VOXEL_ENDINGS):
            others[file] = place
        else:
            left.append(file)
    strays, kinds = sort_leftovers(left)
    return accounted(replace(source, strays=(*strays, *tree.problems), others=others | kinds), tree)


def sort_leftovers(files: Iterable[Path]) -> tuple[list[CaseError], dict[Path, str]]:
    """One stray for each kind of file in a folder that could be a scan, and of every file what it is."""
    kinds: dict[Path, str] = {}
    alike: dict[tuple[Path, str, str], list[Path]] = defaultdict(list)
    for file in files:
        if suspicion := _suspicion(file):
            alike[(file.parent, *suspicion)].append(file)
            kinds[file] = UNUSED
        else:
            kinds[file] = file.suffix.lower() or "without ending"
    return [_stray(group, what, cure) for (_, what, cure), group in alike.items()], kinds


def _stray(files: Sequence[Path], what: str, cure: str) -> CaseError:
    more = f", and so are {len(files) - 1} others beside it" if len(files) > 1 else ""
    return CaseError(f"could be a scan and is not used: {what}{more}", where=files[0], cure=cure)


def _suspicion(file: Path) -> tuple[str, str] | None:
    """Why `file` could be a scan that is not used, and what to do about it; None for what is none."""
    name = file.name.lower()
    if name.endswith(VOXEL_ENDINGS):
        return "no case here has it", "list it, or move it to where scans are looked for"
    if name.endswith(UNREAD_ENDINGS):
        return f"{file.suffix.lower()} files are not read", "convert it to .nii.gz, or leave it out"
    if name.endswith(PACKED_ENDINGS):
        return f"{file.suffix.lower()} files are not unpacked", "unpack it, or leave it out"
    if name.endswith(HEADERLESS_ENDINGS):
        return "its header (.hdr, .nhdr, .mhd) is missing", "restore the header, or leave it out"
    head = head_of(file)
    if kind := _content(head):
        ending = ".nii, .nii.gz, .nrrd or .mha"
        cure = "unpack it" if kind == "DICOM" else f"give it a name that ends in {ending}"
        return f"it holds {kind}", f"{cure}, or leave it out"
    return None


def head_of(file: Path) -> bytes:
    """The first bytes of a file, unpacked where it is gzip; none where they cannot be read."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(file) as packed:
                head = packed.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return b""
    return head


def _content(head: bytes) -> str | None:
    """The format of voxels that begins so."""
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    if head[:4] == b"NRRD":
        return "NRRD"
    if head.startswith((b"ObjectType", b"NDims")):
        return "MetaImage"
    return "DICOM" if head[128:132] == b"DICM" else None
