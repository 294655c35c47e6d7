"""Every image that a data set names, whatever it is for: what scans are held against that must not be trained on.

Of JSON all lists count (`training`, `validation`, `test`, …), of nnU-Net's folders all `images*`. Labels, class names
and splits are not looked at, so that nothing about them can hide an image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixcl_dist.data_shards.catalogue import sanitised
from mixcl_dist.data_shards.sources.case import VOXEL_ENDINGS, Case, Source, file_stem
from mixcl_dist.data_shards.sources.decathlon import list_file, read_json
from mixcl_dist.data_shards.sources.folder import open_folder
from mixcl_dist.data_shards.sources.masks import APART, IMAGE, is_masks
from mixcl_dist.data_shards.sources.nnunet import is_nnunet
from mixcl_dist.data_shards.sources.tree import files_below
from mixcl_dist.data_shards.sources.voxels import files_of, format_of
from mixcl_dist.data_shards.volume import CaseError

OTHER_CHANNEL = re.compile(r"_(?!0000)\d{4}$")


def open_images(path: Path) -> Source:
    """The images of the data set at `path` (see `open_source`), as cases without labels.

    Raises `CaseError` where there are none; one that is named and missing is in the source's `problems`.
    """
    path = Path(os.path.abspath(path))
    file = list_file(path)
    if file is None and not is_masks(path):
        return open_folder(path, files_below(path), None)
    folder = path if file is None else file.parent
    content = {} if file is None else read_json(file)
    if file is None:
        images = sorted((folder / APART[0] if (folder / APART[0]).is_dir() else folder).glob(f"*/{IMAGE}"))
    elif isinstance(content, dict) and is_nnunet(folder, content):
        images = _of_nnunet(folder, str(content.get("file_ending", ".nii.gz")))
    else:
        images = [folder / image for image in _named(content)]
    source = _unlabelled(folder, images)
    if not source.cases and not source.problems:
        cure = 'name images, as in {"test": ["ct.nii.gz"]}, or give a folder of them'
        raise CaseError("names no image", where=path, cure=cure)
    return source


def _of_nnunet(folder: Path, ending: str) -> list[Path]:
    files = sorted(file for file in folder.glob(f"images*/*{ending}") if not file.name.startswith("."))
    return [file for file in files if not OTHER_CHANNEL.search(file.name.removesuffix(ending))]


def _named(content: Any) -> Iterator[str]:
    """The images in a list of cases, or in every such list of a mapping."""
    lists = content.values() if isinstance(content, Mapping) else [content]
    for entry in (entry for listed in lists if isinstance(listed, list) for entry in listed):
        image = entry.get("image") if isinstance(entry, Mapping) else entry
        if isinstance(image, str) and (isinstance(entry, Mapping) or image.endswith(VOXEL_ENDINGS)):
            yield image


def _unlabelled(folder: Path, images: Iterable[Path]) -> Source:
    """Each of `images` once, under a name of its own."""
    cases: dict[str, Case] = {}
    problems = []
    for image in dict.fromkeys(Path(os.path.normpath(image)) for image in images):
        name = sanitised(file_stem(image))
        name = sanitised(os.path.relpath(image, folder)) if name in cases else name
        while name in cases:
            name += "-"
        try:
            if not image.is_file():
                cure = "restore it, or take it from the list"
                raise CaseError("is named and is no file", where=image, cure=cure)
            cases[name] = Case(name, folder.name, "unlabelled", format_of(image), files_of(image))
        except CaseError as problem:
            problems.append(problem)
    return Source(folder.name, tuple(cases.values()), (), tuple(problems))
