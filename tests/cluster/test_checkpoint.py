"""A checkpoint is there whole or not at all."""

import os
import signal
import subprocess
import sys

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
