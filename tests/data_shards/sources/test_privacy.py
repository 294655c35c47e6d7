"""Not one byte that a build leaves tells who was scanned: real series, every file, several encodings."""

from __future__ import annotations

import base64
import itertools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.misc import is_dicom

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.format.shard import read_index

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDENTIFYING_VR = ("PN", "UI", "DA", "TM", "DT", "LO", "SH", "AE", "ST", "LT", "UT", "AS", "UN")
SAID_OF_MANY = {"AXIAL", "ORIGINAL", "PRIMARY", "Liver", "RTstruct"}
NUMBER = re.compile(r"[-\d.]*")
"""Dates, UIDs and long numbers are looked for; shorter ones stand in any JSON."""
CONFIG = BuildConfig(patch_size=(24, 24, 16), spacing_mm=(4.0, 4.0, 4.0), min_body_fraction=0.02)


def series_folders(ct: Path) -> list[Path]:
    parts = ["liver_seg", "totalseg_j2k/ct", "mixed_series", "qa_ge_head"]
    return [*(ct / "dicom" / part for part in parts), *(ct / f"sarcoma/STS_00{n}/dicom" for n in (1, 2))]


def texts(dataset: pydicom.Dataset) -> Iterator[str]:
    """Every string of an identifying kind, in sequences and private tags as well, but for those of UIDs of DICOM."""
    for element in dataset.iterall():
        values = element.value if isinstance(element.value, pydicom.multival.MultiValue) else [element.value]
        for value in values if element.VR in IDENTIFYING_VR else ():
            text = value.decode(errors="ignore") if isinstance(value, bytes) else str(value)
            if not text.startswith("1.2.840.10008."):
                yield text.strip("\0 ")


@pytest.fixture(scope="module")
def identifiers(ct) -> set[str]:
    found = {"STS_001", "STS_002", "GTV_Mass_CT"}
    for file in itertools.chain.from_iterable(folder.rglob("*") for folder in series_folders(ct)):
        if file.is_file() and is_dicom(file):
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            found |= {part for text in texts(dataset) for part in (text, *text.split("^"))}
    return {text for text in found - SAID_OF_MANY if len(text) >= (8 if NUMBER.fullmatch(text) else 4)}


def encoded(text: str) -> set[bytes]:
    """As it stands, in UTF-16, and wherever base64 may have put it."""
    raw = text.encode()
    forms = {raw, text.lower().encode(), raw.hex().encode(), text.encode("utf-16-le"), text.encode("utf-16-be")}
    for shift in range(3):
        determined = slice(-(-8 * shift // 6), 8 * (shift + len(raw)) // 6)
        form = base64.b64encode(b"\0" * shift + raw)[determined]
        forms |= {form} if len(form) >= 6 else set()  # fewer stand in any bytes
    return forms


def found_in(content: bytes, identifiers: set[str]) -> list[str]:
    return sorted(text for text in identifiers if any(form in content for form in encoded(text)))


def published(out: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in out.iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def neutral(ct, tmp_path_factory) -> list[Path]:
    """The series under paths that tell nothing, with their contours as labels, a broken file and a copy."""
    root = tmp_path_factory.mktemp("neutral")
    for number, folder in enumerate(series_folders(ct)):
        (root / f"{number}").mkdir()
        for count, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
            shutil.copyfile(file, root / f"{number}" / f"{count}.dcm")
    (root / "0/classes.yaml").write_text("organ: {source: Liver}")
    for number in (4, 5):
        (root / f"{number}/classes.yaml").write_text("mass: {source: gtv_mass_ct}")
    broken = root / "1/3.dcm"
    broken.write_bytes(broken.read_bytes()[:-2000])
    shutil.copytree(root / "4", root / "6")
    return sorted(path for path in root.iterdir())


def test_the_search_finds_what_is_there(identifiers):
    assert len(identifiers) > 500 and any(text.startswith("1.3.6.1.4.1.14519") for text in identifiers)
    for text in ("STS_001", "1.3.6.1.4.1.14519.5.2.1", "20041231", "SMITH"):
        for wrapped in (text, f"a{text}", f"ab{text}c", f"abc{text}de"):
            for hidden in (wrapped.encode(), base64.b64encode(wrapped.encode()), wrapped.encode("utf-16-be")):
                assert found_in(b"xx" + hidden + b"yy", {text}), (text, hidden)
    assert not found_in(b"nothing of the kind", identifiers)


def test_no_published_byte_holds_an_identifier_even_where_the_paths_do(ct, identifiers, tmp_path):
    """Folders here are called after patients, and files after UIDs."""
    sources = [ct / "dicom/totalseg_j2k/ct", *(ct / f"sarcoma/STS_00{n}/dicom" for n in (1, 2))]
    built = build(sources, tmp_path / "out", CONFIG)
    assert len(built.manifest.cases) == 3
    files = published(tmp_path / "out")
    assert any(path.suffix == ".tar" for path in files) and any(path.suffix == ".json" for path in files)
    assert {path.name: found for path, content in files.items() if (found := found_in(content, identifiers))} == {}


def test_nothing_that_a_build_leaves_or_says_holds_an_identifier(neutral, identifiers, tmp_path, caplog, capfd):
    """Shards with labels, index, manifest, the folder .build, log, messages, output."""
    caplog.set_level(logging.DEBUG)
    out = tmp_path / "out"
    built = build(neutral, out, CONFIG)
    said = [*map(str, built.quarantined), caplog.text, *capfd.readouterr()]
    assert {case.reliable for case in built.manifest.cases} == {(), ("organ",), ("mass",)}
    assert len(built.quarantined) >= 5, "broken, PET, single slice, uneven gaps, copy"
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert any(".build" in file.parts for file in files) and out / "manifest.json" in files
    assert any("quarantine" in file.name for file in files)
    for file, content in files.items():
        assert found_in(content, identifiers) == [], file
    assert [found_in(text.encode(), identifiers) for text in said] == [[]] * len(said)


def test_samples_hold_what_the_reader_lets_through_and_nothing_else(neutral, tmp_path):
    built = build(neutral[4:5], tmp_path / "out", CONFIG)
    (case,) = Manifest.load(tmp_path / "out").cases
    assert case.name.startswith("ct-") and case.dataset == "dicom"
    for shard in built.manifest.shards:
        for key, members in read_index(tmp_path / "out" / shard.file).samples.items():
            assert key.startswith(case.name)
            assert {"ct", "seg", "json"} >= {member.split(".")[0] for member in members}
