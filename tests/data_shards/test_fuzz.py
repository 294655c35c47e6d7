"""Damaged or forged shards: an error of this project's own or the right bytes, never a crash or other voxels unsaid."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixcl_dist.data_shards.format.codec import decode, digest
from mixcl_dist.data_shards.format.manifest import CASES_FILE, CLASSES_FILE, FINGERPRINTS_FILE, Manifest, ManifestError
from mixcl_dist.data_shards.format.shard import ShardError, index_path, parse_index, read_index, read_sample
from mixcl_dist.data_shards.inspection.verify import verify

fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` with a few bytes changed, lost, put in, moved, or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["flip", "lose", "put", "copy", "cut", "number"])):
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "lose":
                del changed[at : at + length]
            case "put":
                changed[at:at] = draw(st.binary(max_size=20))
            case "copy":
                source = draw(st.integers(0, max(0, len(changed) - 1)))
                changed[at : at + length] = changed[source : source + length]
            case "cut":
                del changed[at:]
            case "number":  # what a size may lie about
                changed[at : at + 4] = draw(
                    st.sampled_from([b"-1", b"99999999999999", b"\xff" * 4, b"\0" * 8, b"1e99"])
                )
    return bytes(changed)


@pytest.fixture(scope="module")
def stored(built) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """A shard and its samples."""
    path = built / "shard-000000.tar"
    return path, {key: read_sample(path, key, members) for key, members in read_index(path).samples.items()}


@fuzz
@given(data=st.data())
def test_an_index(stored, data):
    path, samples = stored
    right = read_index(path)
    try:
        index = parse_index(data.draw(damaged(index_path(path).read_bytes())), "index.json")
    except ShardError as error:
        assert "\n" not in str(error)
        return
    for key, members in index.samples.items():
        try:
            found = read_sample(path, key, members)
        except ShardError as error:
            assert "\n" not in str(error)
            continue
        if members == right.samples.get(key):
            assert found == samples[key]
        else:
            assert all(digest(payload) == members[name].xxh3 for name, payload in found.items())


@fuzz
@given(data=st.data())
def test_a_manifest(built, data):
    content = data.draw(damaged((built / "manifest.json").read_bytes()))
    try:
        manifest = Manifest.parse(content, "manifest.json")
    except ManifestError as error:
        assert "\n" not in str(error)
    else:
        assert manifest.patches == sum(shard["samples"] for shard in json.loads(content)["shards"])


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"version":' * 50_000, b'{"version": 3, "cases": ' + b"9" * 100_000 + b"}"]
)
def test_json_that_is_nested_or_long_beyond_reason(content):
    with pytest.raises(ManifestError):
        Manifest.parse(content, "manifest.json")
    with pytest.raises(ShardError):
        parse_index(content, "index.json")


@pytest.mark.parametrize("name", [CASES_FILE, CLASSES_FILE, FINGERPRINTS_FILE])
@fuzz
@given(data=st.data())
def test_a_table(built, name, data):
    manifest, content = Manifest.load(built), (built / name).read_bytes()
    try:
        table = manifest.check_table(name, data.draw(damaged(content)), name)
    except ManifestError:
        return
    np.testing.assert_array_equal(table, np.load(built / name))


def test_a_pickle_in_a_table_is_not_loaded(built):
    class Deadly:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    content = io.BytesIO()
    np.save(content, np.array([Deadly()], dtype=object))
    with pytest.raises(ManifestError, match="is not a table"):
        Manifest.load(built).check_table(CASES_FILE, content.getvalue(), CASES_FILE)


@fuzz
@given(data=st.data())
def test_a_tar_file(stored, data, tmp_path_factory):
    path, samples = stored
    folder = tmp_path_factory.mktemp("tar")
    copy = folder / path.name
    shutil.copy(index_path(path), index_path(copy))
    content = path.read_bytes()
    changed = data.draw(damaged(content))
    copy.write_bytes(changed)
    for key, members in read_index(path).samples.items():
        try:
            assert read_sample(copy, key, members) == samples[key]
        except ShardError as error:
            assert "\n" not in str(error)


@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_verify_finds_any_damage_to_any_file(built, data, tmp_path_factory):
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("verify") / "shards"))
    path = data.draw(st.sampled_from(sorted(folder.glob("*.tar")) + sorted(folder.glob("*.index.json"))))
    content = path.read_bytes()
    changed = data.draw(damaged(content))
    path.write_bytes(changed)
    problems = verify(folder)
    assert bool(problems) == (changed != content)
    assert not any("\n" in problem for problem in problems)


DECODER = """
    import sys
    import numpy as np
    from mixcl_dist.data_shards.format.codec import decode_into, encode

    rng, member, rounds = np.random.default_rng(int(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    dtype = np.uint8 if member == "seg.b2" else np.int16
    smooth = np.cumsum(rng.integers(-9, 10, (24, 24, 24)), axis=0)
    arrays = [smooth.astype(dtype), rng.integers(0, 200, (24, 24, 24)).astype(dtype), np.full((24, 24, 24), 7, dtype)]
    if member == "seg.b2":
        arrays[0] //= 40
    payloads = [encode(member, array) for array in arrays]
    rows = np.full((3, 24, 24, 24), 111, dtype)  # the middle one is written, its neighbours must not be
    kinds = {"right": 0, "refused": 0, "other": 0}
    for _ in range(rounds):
        number = int(rng.integers(3))
        forged = bytearray(payloads[number])
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(len(forged))) if rng.random() < 0.5 else int(rng.integers(min(96, len(forged))))
            forged[at] = rng.choice([0, 255, 127, 128, int(rng.integers(256))])
        if rng.random() < 0.1:
            del forged[int(rng.integers(len(forged))):]
        try:
            decode_into(member, memoryview(bytes(forged)), rows[1])
        except ValueError as error:
            kinds["refused"] += 1
            assert "\\n" not in str(error), error
        else:
            kinds["right" if (rows[1] == arrays[number]).all() else "other"] += 1
        assert (rows[0] == 111).all() and (rows[2] == 111).all(), "wrote beyond its row"
    print(kinds)
"""


def decode_forged(member: str, seed: int, rounds: int) -> None:
    """In a process of its own, with memory for little more than it holds: a crash is an exit code here."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
    command = [sys.executable, "-c", limit + textwrap.dedent(DECODER), str(seed), member, str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{member}, seed {seed}: exit code {done.returncode}, {done.stderr[-2000:]}"
    assert "refused" in done.stdout


@pytest.mark.parametrize("member", ["ct.b2", "ct.pco", "seg.b2"])
def test_payloads_whose_digest_was_forged_too(member):
    decode_forged(member, seed=0, rounds=300)


@pytest.mark.slow
@pytest.mark.parametrize("member", ["ct.b2", "ct.pco", "seg.b2"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_payloads_whose_digest_was_forged_too(member, seed):
    decode_forged(member, seed, rounds=100_000)


def test_a_payload_of_another_patch_is_noticed_by_its_size(stored):
    _, samples = stored
    payload = next(iter(samples.values()))["ct.b2"]
    with pytest.raises(ValueError, match="are expected"):
        decode(payload, (32, 32, 32), np.int16)
