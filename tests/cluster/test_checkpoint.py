"""A checkpoint is there whole or not at all."""

import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from mixcl_dist.cluster import checkpoint


def save(folder, step, keep=3, **state):
    with checkpoint.publish(folder, step, keep=keep, state=state) as path:
        (path / "weights.bin").write_bytes(bytes(range(256)) * step)
        (path / "nested").mkdir()
        (path / "nested" / "optimizer.bin").write_bytes(b"moments")


def test_the_newest_is_found_with_its_state(tmp_path):
    for step in (5, 12, 100):
        save(tmp_path, step, position=step * 8)
    found = checkpoint.newest(tmp_path)
    assert found.name == "step_00000100"
    assert checkpoint.read_state(found) == {"position": 800}
    assert (found / "nested" / "optimizer.bin").read_bytes() == b"moments"


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "seal"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    victim = tmp_path / "step_00000002" / "weights.bin"
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[7] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-1])
    elif damage == "remove":
        victim.unlink()
    else:
        victim = tmp_path / "step_00000002"
        (victim / checkpoint.SEAL).write_text("{")
    (problem,) = checkpoint.verify(tmp_path / "step_00000002")
    assert str(victim) in problem
    assert checkpoint.newest(tmp_path).name == "step_00000001"


def spoil(checkpoint):
    (checkpoint / "weights.bin").write_bytes(b"spoilt")


def test_what_is_passed_over_is_told_in_one_line_each(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    spoil(tmp_path / "step_00000003")
    (tmp_path / "step_00000002" / checkpoint.SEAL).unlink()
    lines = []
    assert checkpoint.newest(tmp_path, lines.append).name == "step_00000001"
    assert ["step_00000003 is passed over" in lines[0], "step_00000002 is passed over" in lines[1]] == [True] * 2
    assert "weights.bin: content differs" in lines[0] and "checkpoint.json: cannot be read" in lines[1]
    assert not any("\n" in line for line in lines)


def test_without_a_whole_one_a_person_decides_and_the_advice_works(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step)
        spoil(folder / f"step_{step:08d}")
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint is whole .* move this folder away"):
        checkpoint.newest(folder)
    folder.rename(tmp_path / "away")
    assert checkpoint.newest(folder) is None


def test_damaged_checkpoints_of_later_steps_never_push_out_whole_ones(tmp_path):
    for step in (8, 9):
        save(tmp_path, step, keep=2)
        spoil(tmp_path / f"step_{step:08d}")
    save(tmp_path, 1, keep=2)
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    assert len(list(tmp_path.iterdir())) == 3, "as long as there is one whole one, nothing is removed"
    save(tmp_path, 2, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_the_only_whole_one_is_never_removed(tmp_path):
    save(tmp_path, 1, keep=2)
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
        spoil(tmp_path / f"step_{step:08d}")
    assert checkpoint.newest(tmp_path).name == "step_00000001"


@pytest.mark.parametrize(
    "seal", ["", "[]", '{"files": 3, "state": {}}', '{"files": {}}', '{"files": {"a": 1}, "state": []}', "[" * 100_000]
)
def test_a_seal_that_says_nothing_is_a_problem_in_one_line(tmp_path, seal):
    save(tmp_path, 1)
    (tmp_path / "step_00000001" / checkpoint.SEAL).write_text(seal)
    (problem,) = checkpoint.verify(tmp_path / "step_00000001")
    assert "checkpoint.json: cannot be read" in problem and "\n" not in problem


def test_only_files_of_the_checkpoint_are_ever_read(tmp_path):
    """A seal may name /dev/zero, which has no end, or a file of somebody else."""
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / checkpoint.SEAL
    path.write_text('{"state": {}, "files": {"/dev/zero": "", "../other": ""}}')
    assert any("/dev/zero: missing" in problem for problem in checkpoint.verify(path.parent))
    (path.parent / "added.bin").write_bytes(b"")
    assert any("added.bin: not in the seal" in problem for problem in checkpoint.verify(path.parent))


def test_an_error_while_writing_publishes_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="full"), checkpoint.publish(tmp_path, 2, keep=2, state={}) as path:
        (path / "half").write_bytes(b"x")
        raise OSError("disk full")
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    save(tmp_path, 2)
    assert not (tmp_path / "step_00000002" / "half").exists()


def test_a_process_killed_while_writing_publishes_nothing(tmp_path):
    save(tmp_path, 1)
    program = f"""
import sys, time
from pathlib import Path
from mixcl_dist.cluster import checkpoint
with checkpoint.publish(Path({str(tmp_path)!r}), 2, keep=2, state={{}}) as path:
    (path / "half").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.newest(tmp_path).name == "step_00000001"


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None


def write(size):
    return lambda folder: (folder / "weights.bin").write_bytes(bytes(size)) and None


def test_a_checkpoint_is_written_beside_the_steps_and_published_once_whole(tmp_path):
    writer, go_on = checkpoint.Writer(tmp_path, keep=2), threading.Event()

    def slowly(folder):
        (folder / "weights.bin").write_bytes(b"half")
        assert go_on.wait(60)

    writer.begin(1, state={"position": 8}, write=slowly, size=4)
    assert checkpoint.newest(tmp_path) is None and not writer.failed
    go_on.set()
    writer.wait()
    assert checkpoint.read_state(checkpoint.newest(tmp_path)) == {"position": 8}
    writer.close()


def test_one_is_written_at_a_time_and_leaving_waits_for_it(tmp_path):
    writer, writing = checkpoint.Writer(tmp_path, keep=9), []

    def alone(folder):
        writing.append(folder.name)
        (folder / "weights.bin").write_bytes(b"x")
        assert [path.name for path in tmp_path.glob(".step_*")] == writing[-1:]

    for step in range(1, 6):
        writer.begin(step, state={}, write=alone, size=1)
    writer.close()
    assert len(writing) == len(list(tmp_path.glob("step_*"))) == 5


def test_a_full_disk_is_told_with_folder_and_bytes_and_leaves_the_last_good_one(tmp_path):
    """The kernel refuses a file that is too large as it refuses one on a full disk."""
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.begin(1, state={}, write=write(1000), size=1000)
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        writer.begin(2, state={}, write=write(1_234_567), size=1_234_567)
        writer.close()
        assert writer.failed
        with pytest.raises(checkpoint.CheckpointError, match="File too large; make room there") as refused:
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refused.value).startswith(f"{tmp_path}: step 2 could not be saved, which needs 1,234,567 bytes (")
    assert "\n" not in str(refused.value) and not writer.failed
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert not checkpoint.verify(tmp_path / "step_00000001")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".step_00000002.tmp"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    checkpoint.Writer(tmp_path, keep=2).close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
