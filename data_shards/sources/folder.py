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
from mixcl_dist.data_shards.sources.voxels import files_of, format_of
from mixcl_dist.data_shards.volume import CaseError


def open_folder(folder: Path, classes: ClassMap | None) -> Source:
    """The scans below `folder`; raises `CaseError` when there are none.

    They are unlabelled but for DICOM series with an RTSTRUCT or SEG, where `classes` tells what its structures are.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    voxels = [file for file in files if file.name.endswith(VOXEL_ENDINGS)]
    cases, problems = [], []
    for file in voxels:
        name = pseudonym(f"{folder.name}/{file.relative_to(folder)}")
        try:
            cases.append(Case(name, format_of(file), "unlabelled", format_of(file), files_of(file)))
        except CaseError as problem:
            problems.append(problem)
    series, drawings, unusable = find_series([file for file in files if not file.name.endswith(VOXEL_ENDINGS)])
    problems += unusable
    labelled = with_drawings(series, drawings, frozenset() if classes is None else classes.names())
    cases += labelled.cases
    problems += labelled.problems if classes else []  # of labels that nobody asked for
    if not cases and not problems:
        cure = "give a folder of .nii.gz, .nrrd or .mha files or DICOM series, or of a dataset.json"
        raise CaseError("holds no CT", where=folder, cure=cure)
    source = collect("folder", folder, cases, problems)
    labels_from = "list the scans with their labels in a dataset.json, or add a classes.yaml for RTSTRUCT and SEG"
    return replace(source, labels_from=labels_from, unlisted=tuple(labelled.unlisted))
