"""A folder of scans with nothing that describes them: every file of voxels and every DICOM CT series below it.

Nobody has named these scans for being passed on: their files and folders may be called after patients. So each gets a
pseudonym, made of its path below the folder or, for DICOM, of its series' UID, and the data set is called after the
format. To keep names, list the scans in a `cases.json`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixcl_dist.data_shards.sources.case import VOXEL_ENDINGS, Case, Source, collect
from mixcl_dist.data_shards.sources.classes import ClassMap
from mixcl_dist.data_shards.sources.contours import with_drawings
from mixcl_dist.data_shards.sources.dicom import find_series
from mixcl_dist.data_shards.sources.pseudonym import pseudonym
from mixcl_dist.data_shards.sources.tree import REFUSED, Tree, sort_leftovers
from mixcl_dist.data_shards.sources.voxels import files_of, format_of
from mixcl_dist.data_shards.volume import CaseError


def open_folder(folder: Path, tree: Tree, classes: ClassMap | None) -> Source:
    """The scans below `folder`, whose files are those of `tree`; raises `CaseError` when there are none.

    They are unlabelled but for DICOM series with an RTSTRUCT or SEG, where `classes` tells what its structures are.
    """
    voxels = [file for file in tree.files if file.name.lower().endswith(VOXEL_ENDINGS)]
    cases, problems = [], []
    for file in voxels:
        name = pseudonym(f"{folder.name}/{file.relative_to(folder)}")
        try:
            cases.append(Case(name, format_of(file), "unlabelled", format_of(file), files_of(file)))
        except CaseError as problem:
            problems.append(problem)
    taken = {file for case in cases for file in case.files}.union(voxels)
    found = find_series([file for file in tree.files if file not in taken])
    problems += found.problems
    labelled = with_drawings(found.series, found.drawings, frozenset() if classes is None else classes.names())
    cases += labelled.cases
    problems += labelled.problems if classes else []  # of labels that nobody asked for
    strays, others = sort_leftovers(found.foreign)
    strays += tree.problems
    if not cases and not problems and not strays:
        cure = "give a folder of .nii.gz, .nrrd or .mha files or DICOM series, or of a dataset.json"
        raise CaseError("holds no CT", where=folder, cure=cure)
    refused = {problem.where for problem in problems}
    undrawn = {file: REFUSED if file in refused else "RTSTRUCT or SEG, unread" for file in found.drawings}
    source = collect("folder", folder, cases, problems)
    return replace(
        source,
        labels_from="list the scans with their labels in a dataset.json, or add a classes.yaml for RTSTRUCT and SEG",
        unlisted=tuple(labelled.unlisted),
        strays=tuple(strays),
        others=others | found.companions | undrawn,
    )
