"""The wheel holds one import name and brings the foundations along."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mixcl_dist

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """An sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    made = subprocess.run(build, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return out


def test_the_wheel_from_the_sdist_holds_mixcl_dist_alone(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mixcl_dist"}
    for module in ("kernels/loss.py", "data_shards/streaming/stream.py", "cluster/engine.py", "recipes/demo.yaml"):
        assert f"mixcl_dist/{module}" in names
    assert "mixcl_dist/py.typed" in names  # type checkers read the annotations of an installed package only with it
    assert wheel.name.startswith(f"mixcl_dist-{mixcl_dist.__version__}-")


def test_the_sdist_holds_files_not_links_to_nowhere(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        assert [member.name for member in tar if member.issym() and not member.linkname] == []


def test_the_installed_wheel_is_found_beside_another_package_named_kernels(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("raise ImportError('the other kernels')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import mixcl_dist.kernels, mixcl_dist.data_shards, mixcl_dist.cluster\n"
        "assert mixcl_dist.kernels.__file__.startswith(sys.argv[1]), mixcl_dist.kernels.__file__\n"
    )
    subprocess.run([sys.executable, "-I", "-c", program, str(site)], check=True, cwd=tmp_path)
