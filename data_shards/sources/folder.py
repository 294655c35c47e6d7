"""A folder of scans with nothing that describes them: every NIfTI file and every DICOM CT series below it."""

from __future__ import annotations

from pathlib import Path

from mixcl_dist.data_shards.sources.case import NIFTI_ENDINGS, Case, Source, collect, nifti_stem
from mixcl_dist.data_shards.sources.dicom import find_series
from mixcl_dist.data_shards.volume import CaseError


def open_folder(folder: Path) -> Source:
    """The scans below `folder`, all of them unlabelled; raises `CaseError` when there are none."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    nifti = [file for file in files if file.name.endswith(NIFTI_ENDINGS)]
    cases = [Case(nifti_stem(file), folder.name, "unlabelled", "nifti", (file,)) for file in nifti]
    series, problems = find_series([file for file in files if not file.name.endswith(NIFTI_ENDINGS)])
    if not cases and not series and not problems:
        cure = "give a folder of .nii.gz files or DICOM series, or of a dataset.json"
        raise CaseError("holds no CT", where=folder, cure=cure)
    return collect(folder.name, folder, cases + series, problems)
