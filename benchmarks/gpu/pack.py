"""Make the pack: all that a bare GPU machine without a network needs beside the repository.

    python benchmarks/gpu/pack.py                 into .pack/, from real CT in MIXCL_TEST_CT or ../shared/ct

Three parts, each made anew only where what it is made from has changed: `site`, the wheels that such a machine lacks,
unzipped; `ct`, OpenKBP losslessly; `cache`, the kernels compiled for Hopper, where an environment with the machine's
own Triton is at hand (`make gpu-emulate` makes it). Fails where pack and repository together are over 64 MiB.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import posixpath
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 64 * 2**20  #: bytes of the pack and the repository
GROUPS = 16  #: archives of CT, which the machine's 16 cores unpack side by side
STAMPS = "parts.json"  #: of each part the digest of what it was made from
WHEELS = (
    "annotated-types==0.8.0", "blosc2==4.14.1", "braceexpand==0.1.7", "hjson==3.1.0", "monai==1.6.1",
    "ndindex==1.10.1", "nibabel==5.4.2", "numexpr==2.14.2", "pcodec==1.1.0", "pydantic==2.14.3",
    "pydantic_core==2.50.4", "typing-inspection==0.4.5", "webdataset==1.0.2",
)  # fmt: skip
DEEPSPEED = "deepspeed==0.19.8"  #: has no wheel; without compiled operators it is pure Python
PLATFORMS = ("manylinux2014", *(f"manylinux_2_{n}" for n in (17, 24, 26, 27, 28)))
UNUSED = ("**/tests", "**/test_files", "*.data", "blosc2/include", "blosc2/lib")
#: For 16-bit voxels: the position within a pair of bytes tells more than the byte before.
VOXELS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1}]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.pack.mkdir(parents=True, exist_ok=True)
    parts = {
        "site": (digest(WHEELS, DEEPSPEED, UNUSED), lambda: make_site(options.pack)),
        "ct": (
            digest((options.ct / "dataset.json").read_bytes(), options.cases),
            lambda: make_ct(options.ct, options.pack, options.cases),
        ),
    }
    if options.compiler.exists():
        parts["cache"] = digest_of_kernels(), lambda: make_cache(options.pack, options.compiler)
    else:
        print(f"no compiled kernels: {options.compiler} is missing; make gpu-emulate makes it")
    for name, (key, make) in parts.items():
        make_part(options.pack, name, key, make)
    return complain(options.pack)


def parse(argv: list[str] | None) -> argparse.Namespace:
    ct = Path(os.environ.get("MIXCL_TEST_CT", ROOT.parent / "shared" / "ct")) / "openkbp"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=ROOT / ".pack", help="(%(default)s)")
    parser.add_argument("--ct", type=Path, default=ct, help="folder with OpenKBP's dataset.json (%(default)s)")
    parser.add_argument("--cases", type=int, help="at most so many of each split, where the size asks for it")
    compiler = ROOT / ".venv-gpu" / "bin" / "python"
    parser.add_argument("--compiler", type=Path, default=compiler, help="Python with that Triton (%(default)s)")
    return parser.parse_args(argv)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def make_part(pack: Path, name: str, key: str, make) -> None:
    """Make a part unless it is there and current; it counts as made only once it is whole."""
    stamps = read_stamps(pack)
    if stamps.get(name) == key and list(pack.glob(f"{name}*.tar.xz")):
        return print(f"{name}: current")
    for old in pack.glob(f"{name}*.tar.xz"):
        old.unlink()
    make()
    (pack / STAMPS).write_text(json.dumps(stamps | {name: key}, indent=1) + "\n")
    print(f"{name}: made")


def read_stamps(pack: Path) -> dict[str, str]:
    stamps = pack / STAMPS
    return json.loads(stamps.read_text()) if stamps.exists() else {}


def make_site(pack: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder, "wheels"), Path(folder, "site")
        pip = [sys.executable, "-m", "pip", "-q"]
        platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
        kind = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
        subprocess.run([*pip, "download", "-d", wheels, *kind, *WHEELS], check=True)
        without_operators = os.environ | {"DS_BUILD_OPS": "0"}
        subprocess.run([*pip, "wheel", "-w", wheels, "--no-deps", DEEPSPEED], check=True, env=without_operators)
        for wheel in sorted(wheels.glob("*.whl")):
            shutil.unpack_archive(wheel, site, "zip")
        for unused in [path for pattern in UNUSED for path in site.glob(pattern)]:
            shutil.rmtree(unused, ignore_errors=True)
        write_archive(pack / "site.tar.xz", ((path, f"site/{path.relative_to(site)}") for path in files_in(site)))


def make_ct(source: Path, pack: Path, cases: int | None) -> None:
    """The very bytes of the NIfTI files, without gzip: xz over whole groups of cases takes a quarter less."""
    listed = json.loads((source / "dataset.json").read_text())
    for split in ("training", "validation"):
        listed[split] = listed[split][:cases]
    entries = [entry for split in ("training", "validation") for entry in listed[split]]
    jobs = [(source, pack / f"ct-{n:02}.tar.xz", entries[n::GROUPS]) for n in range(min(GROUPS, len(entries)))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_cases, *zip(*jobs, strict=True)))
    text = json.dumps(listed, indent=1).replace(".nii.gz", ".nii").encode()
    write_archive(pack / "ct-list.tar.xz", [(text, "ct/dataset.json")])


def write_cases(source: Path, archive: Path, entries: list[dict]) -> None:
    files = [posixpath.normpath(entry[kind]) for kind in ("image", "label") for entry in entries]
    members = ((gzip.decompress((source / name).read_bytes()), f"ct/{name.removesuffix('.gz')}") for name in files)
    write_archive(archive, members, VOXELS)


def make_cache(pack: Path, compiler: Path) -> None:
    """Kernels compiled for the card; without them the machine spends its time compiling, and is no less right."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, ROOT / "benchmarks" / "gpu" / "precompile.py"]
        environment = os.environ | {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=environment)
        made = [path for path in files_in(Path(folder)) if path.suffix in (".json", ".cubin")]  # all that loading reads
        write_archive(pack / "cache.tar.xz", ((path, f"cache/{path.relative_to(folder)}") for path in made))


def digest_of_kernels() -> str:
    sources = sorted([*(ROOT / "kernels").glob("*.py"), Path(__file__).with_name("precompile.py")])
    return digest([path.read_bytes() for path in sources])


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_archive(path: Path, members: Iterable[tuple[Path | bytes, str]], filters: list[dict] | None = None) -> None:
    """The same members give the same bytes: no owner, no time."""
    preset = None if filters else 9
    partial = path.with_suffix(".partial")
    with lzma.open(partial, "wb", preset=preset, filters=filters) as out, tarfile.open(fileobj=out, mode="w|") as tar:
        for content, name in members:
            content = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    partial.replace(path)


def complain(pack: Path, root: Path = ROOT) -> int:
    """Print what there is; 1 where pack and repository together are over the limit."""
    parts, total = sum(path.stat().st_size for path in files_in(pack)), size(pack, root)
    print(f"pack {parts:,} bytes, with the repository {total:,} of {LIMIT:,}")
    if total > LIMIT:
        print(f"over by {total - LIMIT:,} bytes: give --cases", file=sys.stderr)
    return int(total > LIMIT)


def size(pack: Path, root: Path = ROOT) -> int:
    """Bytes that travel: the pack, and the repository's files that git does not ignore."""
    return sum(path.lstat().st_size for path in [*files_in(pack), *repository(root)])


def repository(root: Path = ROOT) -> Iterator[Path]:
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, text=True)
    paths = [root / name for name in listed.split("\0") if name]
    return (
        path for path in paths if path.is_symlink() or path.is_file()
    )  # not what is deleted, nor other repositories


def unpack(pack: Path, work: Path) -> None:
    """Lay the pack out in a folder, every archive by a thread of its own, unless it lies there already."""
    stamps = (pack / STAMPS).read_text()
    laid = work / STAMPS
    if laid.exists() and laid.read_text() == stamps:
        return
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # lzma lets the others run
        list(pool.map(lambda archive: extract(archive, work), sorted(pack.glob("*.tar.xz"))))
    relocate(work / "cache")
    laid.write_text(stamps)


def relocate(cache: Path) -> None:
    """Triton's lists of what belongs together have whole paths, and it compiles again what is not found there."""
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.resolve().parent / name) for name in names}}))


def extract(archive: Path, into: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            (into / member.name).parent.mkdir(parents=True, exist_ok=True)  # others make the same ones at this moment
            tar.extract(member, into, filter="data")


if __name__ == "__main__":
    sys.exit(main())
