"""The stream over the network's protocols: nginx and an S3 server on loopback beside the same shards on local disk.

    python benchmarks/stream/remote.py --out OUT       some two minutes; needs nginx, moto, s3fs and aiohttp

The servers share the two cores with the stream, so the figures are what client and server cost together, not what a
storage system far away would deliver. moto is written in Python for tests: slower than any real S3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from corpus import prepare
from host import digests, run
from machine import describe_machine
from report import corpus_text, spread_text, table
from run import SHARED_CT

from mixcl_dist.data_shards.storage.store import CacheConfig
from mixcl_dist.data_shards.streaming.stream import PatchStream
from tests.data_shards import servers
from tests.ports import free_port

WORKERS, BATCH_SIZE, ROUNDS, SECONDS = 2, 32, 5, 2.0
PACKAGES = ("torch", "aiohttp", "s3fs", "moto")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stream"), help="folder of the results (%(default)s)")
    parser.add_argument("--ct", type=Path, default=SHARED_CT, help="folder with openkbp/ and torso/ (%(default)s)")
    parser.add_argument("--data", type=Path, help="where run.py keeps its corpus (OUT/corpus)")
    parser.add_argument("--quick", action="store_true", help="a small corpus; no figures to quote")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = (options.data or options.out / "corpus") / ("quick" if options.quick else "full")
    corpus = prepare(options.ct, data, options.quick, None, print)
    results = {"machine": describe_machine(PACKAGES), "corpus": corpus.facts}
    with ExitStack() as stack:
        home = Path(stack.enter_context(TemporaryDirectory(dir=options.out)))
        places = stack.enter_context(served(corpus.folder / "shards", home.resolve()))
        streams = {name: PatchStream(url, **settings) for name, (url, settings) in places.items()}
        images = {name: stack.enter_context(delivering(stream)) for name, stream in streams.items()}
        for name, batches in images.items():
            check(name, batches, corpus.digests)
        results["patches_per_second"] = take_turns(images, 0.3 if options.quick else SECONDS)
    (options.out / "remote.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "remote.md").write_text(summary(results))
    print(summary(results))
    return 0


@contextmanager
def served(shards: Path, home: Path) -> Iterator[dict[str, tuple[Path | str, dict]]]:
    """Name → where the shards are, and settings of the stream."""
    common = {"batch_size": BATCH_SIZE, "seed": 0, "workers": WORKERS, "label_cases": set()}
    cached = common | {"cache": CacheConfig(home / "cache", 1 << 33)}
    with servers.nginx(home) as nginx, s3(shards) as endpoint:
        os.environ |= {**servers.ACCESS, "AWS_ENDPOINT_URL": endpoint}
        for file in shards.iterdir():
            if file.is_file():
                (nginx.root / file.name).hardlink_to(file.resolve())
        yield {
            "local disk": (shards, common),
            "nginx": (nginx.url, common),
            "nginx, cached on local disk": (nginx.url, cached),
            "S3 (moto)": (f"s3://{servers.BUCKET}", common),
        }


@contextmanager
def s3(shards: Path) -> Iterator[str]:
    """moto in a process of its own, which the trainer's would otherwise slow down, with the shards in its bucket."""
    import boto3

    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        servers.wait_for(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        credentials = {argument: servers.ACCESS[name] for argument, name in names.items()}
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **credentials)
        client.create_bucket(Bucket=servers.BUCKET)
        for file in shards.iterdir():
            if file.is_file():
                client.put_object(Bucket=servers.BUCKET, Key=file.name, Body=file.read_bytes())
        yield endpoint
    finally:
        process.terminate()
        process.wait()


@contextmanager
def delivering(stream: PatchStream) -> Iterator[Iterator[torch.Tensor]]:
    """The stream's images; its workers stand still once they are a few batches ahead."""
    batches = iter(stream)
    try:
        yield (batch.image for batch in batches)
    finally:
        batches.close()


def check(name: str, images: Iterator[torch.Tensor], wanted: list[str]) -> None:
    """End the benchmark unless the first epoch shows every sample of the corpus once."""
    found: list[str] = []
    while len(found) < len(wanted):
        found += digests(next(images))
    if sorted(found[: len(wanted)]) != wanted:
        sys.exit(f"{name}: an epoch shows other samples than the corpus holds; nothing is timed")


def take_turns(streams: dict[str, Iterator[torch.Tensor]], seconds: float) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(ROUNDS):
        for name, images in streams.items():
            run(images, 0, 4)  # what lay ready when its turn began
            lap = run(images, seconds, 4 * WORKERS)
            rates[name].append(lap["patches"] / lap["seconds"])
            print(f"{name:28} {rates[name][-1]:8,.0f} patches/s", flush=True)
    return rates


def summary(results: dict) -> str:
    machine, rates = results["machine"], results["patches_per_second"]
    megabytes = results["corpus"]["bytes_per_voxel"] * 96**3 / 1e6
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = []
    for name, laps in rates.items():
        shares = [lap / local for lap, local in zip(laps, rates["local disk"], strict=True)]
        traffic = [megabytes * lap for lap in laps]
        rows.append(
            [name, spread_text(laps, "{:,.0f}"), spread_text(traffic, "{:,.0f}"), spread_text(shares, "{:.0%}")]
        )
    return "\n".join(
        [
            "# The stream from servers on loopback",
            "",
            f"{machine['device']}; Python {machine['python']}, {versions}; load {machine['load']:.1f}; "
            f"{machine['date']}. {WORKERS} workers, batches of {BATCH_SIZE}. Medians (least to greatest) of {ROUNDS} "
            "rounds.",
            "",
            corpus_text(results["corpus"]),
            "",
            *table(("shards on", "patches/s", "stored MB/s", "of local disk"), rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
