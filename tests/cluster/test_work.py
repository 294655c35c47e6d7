"""Work under a real Ray: each item once, what dies is told, and machines that see other files are refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from mixcl_dist.cluster.ray import RayError
from mixcl_dist.cluster.work import on_ray

from ..ports import free_port


def square(item: int) -> int:
    return item * item


class TestOnOneCluster:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        out = tmp_path_factory.mktemp("work") / "out"
        with on_ray("local", written=out, read=[out.parent]) as run:
            assert list(out.iterdir()) == [], "no probe is left behind"
            yield run
        assert not ray.is_initialized()

    def test_each_item_is_worked_on_elsewhere_and_comes_back_with_its_result(self, run):
        assert sorted(run(square, range(20))) == [(n, n * n, None) for n in range(20)]
        assert os.getpid() not in {pid for _, pid, _ in run(lambda item: os.getpid(), range(4))}

    def test_a_worker_that_dies_is_tried_again_then_told_and_the_others_are_done(self, run, tmp_path):
        def work(item: str) -> str:
            with (tmp_path / item).open("a") as file:
                file.write("tried\n")
            if item == "deadly" or (item == "once" and (tmp_path / item).read_text().count("\n") == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return item.upper()

        found = {item: (result, death) for item, result, death in run(work, ["a", "deadly", "once", "b"])}
        assert found.pop("deadly") == (None, "a fault in a decoder, or killed")
        assert found == {"a": ("A", None), "b": ("B", None), "once": ("ONCE", None)}
        assert (tmp_path / "deadly").read_text() == "tried\n" * 2 and (tmp_path / "a").read_text() == "tried\n"

    def test_what_the_work_raises_comes_out_as_it_was(self, run):
        def work(item: int) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            list(run(work, [1, 2]))


def test_a_path_that_a_machine_does_not_have_is_refused(tmp_path):
    told = r"gone: is not the same on machine .*; give paths on a file system"
    with pytest.raises(RayError, match=told), on_ray("local", written=tmp_path, read=[tmp_path / "gone"]):
        pass
    assert not ray.is_initialized() and list(tmp_path.iterdir()) == []


def test_without_a_ray_there_it_says_so(tmp_path):
    told = r"--ray 127.0.0.1:1: .*start Ray there"
    with pytest.raises(RayError, match=told), on_ray("127.0.0.1:1", written=tmp_path, read=[]):
        pass


LOOK_AROUND = """
import sys
from pathlib import Path
from mixcl_dist.cluster.ray import RayError
from mixcl_dist.cluster.trials import TrialsConfig, run_trials
from mixcl_dist.cluster.work import on_ray

address, out = sys.argv[1], Path(sys.argv[2])
try:
    with on_ray(address, written=out, read=[]):
        print("a second one did not join")
except RayError as error:
    print(error)
try:
    options = {"storage": out / "study", "config": TrialsConfig(address=address), "ended": print}
    run_trials(lambda trial, report: {}, [{"id": "one"}], **options)
except RayError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_machine_with_a_file_system_of_its_own_is_refused_by_name(tmp_path):
    """A second Ray node in a name space where the folder is another disk: for work, and for the trials of a study."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user name space to mount another disk in; sysctl kernel.unprivileged_userns_clone=1")
    ray_command = str(Path(sys.executable).with_name("ray"))
    out = tmp_path / "out"
    out.mkdir()
    port = free_port()
    # In a folder of its own, with a short name for its sockets, so that no other Ray here takes it for its own.
    temporary = tempfile.mkdtemp(prefix="ray-")
    head = [ray_command, "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    head += ["--include-dashboard=false", f"--temp-dir={temporary}"]
    other = f"mount -t tmpfs tmpfs {out} && exec {ray_command} start --address=127.0.0.1:{port} --block --num-cpus=1"
    # Whether Ray asks for a token depends on what ran on this machine before.
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    nodes = []
    try:
        for command in (head, ["unshare", "-rm", "sh", "-c", other]):
            nodes.append(subprocess.Popen(command, **told, env=environment, start_new_session=True))
            assert any("Ray runtime started" in line for line in nodes[-1].stdout), "a node did not come up"
        driver = [sys.executable, "-c", LOOK_AROUND, f"127.0.0.1:{port}", str(out)]
        done = subprocess.run(driver, env=environment, capture_output=True, text=True)
        refused = re.findall("^(.*): is not the same on machine .*; give paths on a file system", done.stdout, re.M)
        assert refused == [str(out), str(out / "study")], (done.stdout, done.stderr)
    finally:
        started = [child for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
        for one in [*nodes, *started]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs([*nodes, *started])
        shutil.rmtree(temporary, ignore_errors=True)
