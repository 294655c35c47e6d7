"""What it costs to take up a run in the middle of an epoch of ten million samples.

    python benchmarks/stream/resume.py --out OUT             under a minute
    python benchmarks/stream/resume.py --samples 100000      small: does everything work here?

Writes the manifest and tables of shards that do not exist (nothing here reads a sample) and measures, each time in a
fresh process: load the manifest, construct the stream, seek to a slot, and name the samples of the batch there. Time
and peak memory are given for the whole process and, apart, for what comes after Python and the imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from machine import describe_machine
from report import spread_text, table

BATCH_SIZE = 32
SLOT = 1_000_000
PER_SHARD, PER_CASE = 250, 200
CLASSES = 15
MOST_SECONDS, MOST_MEGABYTES = 2, 300


def main() -> int:
    options = parse()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    folder = options.out / "index"
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, options.samples)
    in_fresh_process(folder)  # compiles what was not yet compiled and fills the page cache
    results = {
        "machine": describe_machine(),
        "samples": options.samples,
        "runs": [in_fresh_process(folder) for _ in range(options.rounds)],
        "bytes_per_million_patches": bytes_per_million(folder, options.samples),
    }
    (options.out / "resume.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "resume.md").write_text(summary(results))
    print(summary(results))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stream"), help="folder of the results (%(default)s)")
    parser.add_argument("--samples", type=int, default=10_000_000, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes (%(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_index(folder: Path, samples: int) -> None:
    """A manifest as a build would write it, over `samples` patches of `PER_CASE` a case and `PER_SHARD` a shard."""
    import numpy as np

    from mixcl_dist.data_shards.format import manifest as m

    rng = np.random.default_rng(0)
    cases, shards = -(-samples // PER_CASE), -(-samples // PER_SHARD)
    of_case = rng.permutation(np.repeat(np.arange(cases, dtype=np.uint32), PER_CASE))[:samples]
    tables = {
        m.CASES_FILE: of_case,
        m.CLASSES_FILE: rng.integers(0, 256, (samples, -(-CLASSES // 8)), dtype=np.uint8),
        m.FINGERPRINTS_FILE: rng.integers(-128, 128, (cases, 64), dtype=np.int8),
    }
    for name, values in tables.items():
        np.save(folder / name, values)
    classes = tuple(f"organ_{number}" for number in range(CLASSES))
    records = tuple(
        m.CaseRecord(
            name=f"case_{rng.bytes(8).hex()}",
            dataset=f"archive_{number % 20}",
            split="unlabelled" if number % 10 else "training",
            reliable=() if number % 10 else classes[number % 7 :],
            labelled=number % 10 == 0,
            patches=PER_CASE,
            spacing_mm=(0.78125, 0.78125, 2.5),
            source_digest=rng.bytes(16).hex(),
            label_digest=None if number % 10 else rng.bytes(16).hex(),
            shows_face=False,
        )
        for number in range(cases)
    )
    files = tuple(
        m.ShardRecord(
            file=f"shard-{number:06d}.tar",
            samples=min(PER_SHARD, samples - number * PER_SHARD),
            bytes=250_000_000,
            xxh3=rng.bytes(8).hex(),
            index_xxh3=rng.bytes(8).hex(),
        )
        for number in range(shards)
    )
    m.Manifest(
        version=m.FORMAT_VERSION,
        patch_size=(96, 96, 96),
        spacing_mm=None,
        classes=classes,
        cases=records,
        shards=files,
        codec={"ct.b2": "blosc2 lz4hc-5 shuffle, int16", "seg.b2": "blosc2 zstd-5 shuffle, uint8"},
        hu_histogram=tuple(range(64)),
        spacing_histogram=m.spacing_histogram([record.spacing_mm for record in records]),
        annotated=m.annotated_by_dataset(records),
        settings={},
        versions={},
        tables={name: m.table_digest(values) for name, values in tables.items()},
    ).save(folder)


def in_fresh_process(folder: Path) -> dict:
    """What `measure` finds there, and the seconds from the start of the process to its end."""
    begin = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {"process_seconds": time.perf_counter() - begin} | json.loads(done.stdout)


def measure(folder: Path) -> dict:
    """In this process, whose imports are told apart from the work."""
    from mixcl_dist.data_shards.streaming.stream import PatchStream

    imported, before = time.perf_counter(), peak_bytes()
    stream = PatchStream(folder, batch_size=BATCH_SIZE, seed=0, workers=2, label_cases=set())
    constructed = time.perf_counter()
    slot = min(SLOT, stream.samples_per_epoch // 10) // BATCH_SIZE * BATCH_SIZE
    stream.seek(stream.position() | {"slot": slot})
    # The stream tells of samples only with their voxels, which do not exist here.
    samples = stream._order.draw(slot, BATCH_SIZE)
    cases = [stream._manifest.cases[case].name for case in stream._samples.cases_of(samples)]
    return {
        "construct_seconds": constructed - imported,
        "name_seconds": time.perf_counter() - constructed,
        "imports_bytes": before,
        "peak_bytes": peak_bytes(),
        "slot": slot,
        "first_samples": [[int(sample), case] for sample, case in zip(samples[:3], cases, strict=False)],
    }


def peak_bytes() -> int:
    """The most memory this process has held; `getrusage` would count its parent's, too."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def bytes_per_million(folder: Path, samples: int) -> dict[str, float]:
    """Of each file, and of the indices beside the shards, of which one is written to see."""
    from mixcl_dist.data_shards.format.shard import index_path, write_shard

    shard = folder / "one" / "shard-000000.tar"
    shard.parent.mkdir(exist_ok=True)
    write_shard(shard, ((f"case_{n:016x}_0000", {"ct.b2": b"", "seg.b2": b"", "json": b""}) for n in range(PER_SHARD)))
    sizes = {file.name: file.stat().st_size * 1e6 / samples for file in folder.iterdir() if file.is_file()}
    return sizes | {"indices of shards": index_path(shard).stat().st_size * 1e6 / PER_SHARD}


def summary(results: dict) -> str:
    """Tables and bars, in Markdown."""
    runs, machine = results["runs"], results["machine"]
    whole = [run["process_seconds"] for run in runs], [run["peak_bytes"] / 1e6 for run in runs]
    work = (
        [run["construct_seconds"] + run["name_seconds"] for run in runs],
        [(run["peak_bytes"] - run["imports_bytes"]) / 1e6 for run in runs],
    )
    rows = []
    for name, (seconds, megabytes) in (
        ("the whole process, with Python, torch and all other imports", whole),
        ("beyond the imports: load the manifest, construct, seek, name 32 samples", work),
    ):
        met = statistics.median(seconds) < MOST_SECONDS and statistics.median(megabytes) < MOST_MEGABYTES
        rows.append(
            (name, spread_text(seconds, "{:.2f}"), spread_text(megabytes, "{:.0f}"), "met" if met else "MISSED")
        )
    sizes = results["bytes_per_million_patches"]
    return "\n".join(
        [
            f"# Resuming at slot {runs[0]['slot']:,} of an index of {results['samples']:,} samples",
            "",
            f"{machine['device']}; Python {machine['python']}; load {machine['load']:.1f}; {machine['date']}; "
            f"{len(runs)} fresh processes, median (least to greatest). Naming the samples alone took "
            f"{1000 * statistics.median([run['name_seconds'] for run in runs]):.0f} ms.",
            "",
            *table(
                ("", "seconds", "peak MB", f"< {MOST_SECONDS} s and < {MOST_MEGABYTES} MB"),
                rows,
            ),
            *table(
                ("file", "MB per million patches"),
                [(name, f"{size / 1e6:.1f}") for name, size in sizes.items()],
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
