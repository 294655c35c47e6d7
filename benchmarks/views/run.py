"""Two random views of a patch: how fast are ours beside MONAI, TorchIO and batchgeneratorsv2?

    benchmarks/views/environment.sh PEERS                        once: TorchIO and batchgeneratorsv2, some MB
    python benchmarks/views/run.py --out OUT --peers PEERS       five minutes; on a GPU, too, where there is one
    python benchmarks/views/run.py --quick                       a phantom's patches: does everything work here?

A view is a crop of the patch, turned, scaled and moved at random, then blurred, coarsened, given noise and a shift, and
masked. Each contestant runs in a process of its own, one thread, which is stopped while another has its turn; another
one is first in each round, and ratios are taken round by round. Results are in ``results.json``, tables in
``summary.md``. First a gate: scipy has to find the same CT where a contestant took it from, and each degradation has
to do what it says; what fails is left out and named. The exit code is 1 where that is our own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "stream"))

import nibabel as nib
import numpy as np
import torch
from contestants import CONTESTANTS
from machine import describe_machine
from process import ContestantError, Process
from report import spread_text, table

from mixcl_dist.phantom import draw_torso

OURS = "mixcl_dist"
SIZES = {48: 32, 64: 40, 96: 64}
"""Edge of a patch → edge of its views, in voxels."""
PATCHES = 8  #: of each size, a batch for ours
WORKS = {"views": "two views of a patch", "crops": "their crops alone, neither blurred nor masked"}
PEERS = ("torchio", "batchgeneratorsv2")
SHARED_CT = Path(__file__).resolve().parents[3] / "shared" / "ct"
HOST = Path(__file__).with_name("host.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}


def main() -> int:
    options = _parse()
    os.environ |= ONE_THREAD  # for the contestants, whatever library they use
    options.out.mkdir(parents=True, exist_ok=True)
    begin, machine = time.perf_counter(), describe_machine(("torch", "numpy", "monai"))
    machine["versions"] |= peer_versions(options.peers)
    machine["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    results: dict = {"machine": machine, "quick": options.quick, "timings": [], "left_out": []}
    sizes = {48: 32} if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        results["patches"] = write_patches(options.ct, Path(folder), sizes)
        for device in ("cpu", "cuda") if machine["card"] else ("cpu",):
            if not measure(results, device, Path(folder), sizes, options):
                return 1
    machine["load_after"] = os.getloadavg()[0]
    machine["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "summary.md").write_text(summary(results))
    print((options.out / "summary.md").read_text())
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/views"), help="folder of the results (%(default)s)")
    parser.add_argument("--ct", type=Path, help=f"folder with openkbp/ and torso/ ({SHARED_CT}; a phantom by --quick)")
    parser.add_argument("--peers", type=Path, default=Path("runs/peers"), help="what environment.sh made (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="that count, after one that does not (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn, at least (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size, short turns; no figures to quote")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 0.1
    elif options.ct is None:
        options.ct = SHARED_CT
    if options.ct and not (options.ct / "openkbp").is_dir():
        parser.error(f"{options.ct} holds no openkbp/; give the folder with --ct")
    if options.rounds < 1:
        parser.error("--rounds has to be at least 1")
    return options


def peer_versions(folder: Path) -> dict[str, str]:
    """Of what `environment.sh` installed."""
    found = {name: sorted(folder.glob(f"{name}-*.dist-info")) for name in PEERS}
    return {name: paths[0].name.split("-")[1].removesuffix(".dist") for name, paths in found.items() if paths}


def write_patches(ct: Path | None, folder: Path, sizes: Iterable[int]) -> str:
    """(B, 1, X, Y, Z) int16 HU for each size, from the middle of scans; says of what."""
    volumes = [_draw()] * PATCHES if ct is None else [_read(path) for path in _scans(ct)]
    for edge in sizes:
        patches = [_middle(volumes[number % len(volumes)], edge) for number in range(PATCHES)]
        np.save(folder / f"{edge}.npy", np.stack(patches)[:, None])
    return "a phantom" if ct is None else f"{len(volumes)} scans of OpenKBP and of torsos"


def _scans(ct: Path) -> list[Path]:
    torsos = sorted((ct / "torso" / "images").glob("totalseg_*.nii.gz"))[:2]
    return sorted((ct / "openkbp" / "imagesTr").glob("*.nii.gz"))[:: 100 // PATCHES][: PATCHES - len(torsos)] + torsos


def _read(path: Path) -> np.ndarray:
    image = nib.as_closest_canonical(nib.load(path))
    return np.asanyarray(image.dataobj).round().astype(np.int16)


def _draw() -> np.ndarray:
    return draw_torso((96, 96, 96), 3.0, np.random.default_rng(0))[0].astype(np.int16)


def _middle(volume: np.ndarray, edge: int) -> np.ndarray:
    """A cube, with air around the volume where that is smaller."""
    short = [max(edge - size, 0) for size in volume.shape]
    volume = np.pad(volume, [(one // 2, one - one // 2) for one in short], constant_values=-1000)
    begins = [(size - edge) // 2 for size in volume.shape]
    return volume[tuple(slice(begin, begin + edge) for begin in begins)]


def measure(results: dict, device: str, folder: Path, sizes: dict[int, int], options: argparse.Namespace) -> bool:
    """All contestants on a device, size by size; whether our own may be compared."""
    processes: dict[str, Process] = {}
    try:
        for name, kind in CONTESTANTS.items():
            if device not in kind.devices:
                _leave_out(results, name, device, "runs on a CPU alone")
                continue
            command = [sys.executable, HOST, name, device, folder, options.peers.resolve()]
            processes[name] = Process(name, [str(word) for word in command])
        for size in sizes.items():
            for name, process in list(processes.items()):
                if why := _why_not(process, size):
                    _leave_out(results, name, device, why)
                    processes.pop(name).close()
        if OURS not in processes:
            return False
        for size in sizes.items():
            for work in WORKS:
                take_turns(results, device, size, work, processes, options)
        return True
    finally:
        for process in processes.values():
            process.close()


def _why_not(process: Process, size: tuple[int, int]) -> str | None:
    try:
        why = process.ask(f"gate {size[0]} {size[1]}")
    except ContestantError as error:
        return str(error)
    return f"{size[0]}³: {why}" if why else None


def _leave_out(results: dict, name: str, device: str, why: str) -> None:
    results["left_out"].append({"name": name, "device": device, "why": why})
    print(f"{name} is left out on {device}: {why}", flush=True)


def take_turns(
    results: dict,
    device: str,
    size: tuple[int, int],
    work: str,
    processes: dict[str, Process],
    options: argparse.Namespace,
) -> None:
    """Rounds in which each contestant is timed once, after a round that is not counted; each begins with another."""
    rates: dict[str, list[float]] = {name: [] for name in processes}
    names = list(processes)
    for number in range(options.rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            rate = processes[name].ask(f"turn {size[0]} {size[1]} {work} {options.seconds}")
            if number:
                rates[name].append(rate)
    for name, laps in rates.items():
        one = {"name": name, "device": device, "patch": size[0], "view": size[1], "work": work}
        results["timings"].append(one | {"patches_per_second": laps})
        print(f"{device} {size[0]}³ {work:<6} {name:<20} {spread_text(laps, '{:,.1f}')} patches/s", flush=True)


def ratios(results: dict, timing: dict) -> list[float]:
    """How many times as fast as a contestant ours was, round by round."""
    same = ("device", "patch", "work")
    (mine,) = (one for one in results["timings"] if one["name"] == OURS and all(one[k] == timing[k] for k in same))
    return [a / b for a, b in zip(mine["patches_per_second"], timing["patches_per_second"], strict=True)]


def summary(results: dict) -> str:
    """All tables, in Markdown."""
    machine, lacks = results["machine"], {name: kind.lacks for name, kind in CONTESTANTS.items() if kind.lacks}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Two views of a patch, measured",
        "",
        f"{machine['device']}{', ' + machine['card'] if machine['card'] else ''}; Python {machine['python']}, "
        f"{versions}; Linux {machine['kernel']}; {machine['date']}; load {machine['load']:.1f} before and "
        f"{machine['load_after']:.1f} after, {machine['minutes']} minutes.",
        "",
        f"Patches of {results['patches']}" + (". A quick run: no figures to quote." if results["quick"] else "."),
        "",
        "Patches a second and ratios are medians (least to greatest) of the rounds; ratios are taken round by round. "
        "On a CPU a second is one of a core's own, of one thread. Where a contestant took each voxel from, scipy found "
        "the same CT within 3 HU, and each degradation did what it says.",
        "",
        *[f"- {name} has no {' nor '.join(lacking)}, and is timed without." for name, lacking in lacks.items()],
        "",
    ]
    for device, patch, view, work in dict.fromkeys(map(_setting, results["timings"])):
        chosen = [one for one in results["timings"] if _setting(one) == (device, patch, view, work)]
        lines += [f"## {'A core' if device == 'cpu' else 'The GPU'}, {WORKS[work]}: {patch}³ to {view}³", ""]
        rows = [
            (
                one["name"],
                spread_text(one["patches_per_second"], "{:,.1f}"),
                spread_text(ratios(results, one), "{:.2f}"),
            )
            for one in chosen
        ]
        lines += table(("contestant", "patches/s", f"{OURS} is faster by"), rows)
    if results["left_out"]:
        lines += ["## Left out", ""]
        lines += [f"- {one['name']}, {one['device']}: {one['why']}" for one in results["left_out"]] + [""]
    return "\n".join(lines)


def _setting(timing: dict) -> tuple[str, int, int, str]:
    return timing["device"], timing["patch"], timing["view"], timing["work"]


if __name__ == "__main__":
    sys.exit(main())
