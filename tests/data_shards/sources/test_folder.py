"""A folder of scans becomes unlabelled cases that name nobody."""

from __future__ import annotations

from mixcl_dist.data_shards.sources import open_source

from .small_cases import ct_values, write


def test_a_folder_of_scans_is_unlabelled_and_names_nobody(tmp_path, monkeypatch):
    """Neither file nor folder names, which are those of patients in many an archive."""
    root = tmp_path / "SMITH_JOHN"
    for path in ("p1/DOE_JANE.nii.gz", "p2/DOE_JANE.nii", "p2/MILLER.nii.gz", "p2/.hidden.nii.gz"):
        write(root / path, ct_values())
    source = open_source(root)
    said = [source.name, *(text for case in source.cases for text in (case.name, case.dataset))]
    assert not [text for text in said for name in ("SMITH", "DOE", "MILLER", "p1", "p2") if name in text]
    assert len({case.name for case in source.cases}) == 3 and {case.split for case in source.cases} == {"unlabelled"}
    assert [case.name for case in open_source(root).cases] == [case.name for case in source.cases]
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "another key")
    assert not {case.name for case in open_source(root).cases} & {case.name for case in source.cases}
