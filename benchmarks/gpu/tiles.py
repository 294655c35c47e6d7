"""Which tile is fastest? Every candidate has to be right first; then all take turns, and the table gets a proposal."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from worker import work  # first, as it makes what follows importable

# isort: split
import gate
import timing
import torch
from inputs import Rows, make_rows
from prepared import SWEEPS, in_force, prepared

from mixcl_dist.kernels import tuning
from mixcl_dist.kernels.tuning import Tile

ROWS, CHECKED_ROWS, TINY_ROWS = 65_536, 513, 65
FLOP = {"forward": 2, "backward": 4}  #: times N²D, of what is nominal
COMPILERS = 12  #: processes that compile side by side
SECONDS = 4.0  #: of measuring an item


def measure(item: str, options: argparse.Namespace) -> dict:
    """Of `tiles/KERNEL-DTYPE-WIDTH` the time of every candidate, the fastest, and what the table would get."""
    kernel, dtype, width = item.partition("/")[2].rsplit("-", 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = draw(TINY_ROWS if options.tiny else ROWS, int(width), dtype, device)
    now = tuning.launch_for(rows.embeddings, SWEEPS[kernel].table).tile
    tiles = list(dict.fromkeys([now, *candidates(kernel, rows)]))[: 2 if options.tiny else None]
    found = objections(kernel, int(width), dtype, tiles, device)
    calls = {tile: prepared(kernel, rows, tile) for tile in tiles if not found[tile]}
    passed_over = {label(tile): reason for tile, reason in found.items() if reason}
    return report(kernel, rows, now, take_turns(calls, device), passed_over)


def draw(count: int, width: int, dtype: str, device: torch.device) -> Rows:
    chosen = next(d for d in (*gate.HALF, torch.float32) if gate.dtype_name(d) == dtype)
    return make_rows("realistic", count, width, chosen, device)


def candidates(kernel: str, rows: Rows) -> list[Tile]:
    """On Hopper those with 8 warps alone, where products are chained, as the table says."""
    chained = tuning.architecture_of(rows.embeddings.device) == "sm_90" and kernel != "forward-triangle"
    return [tile for tile in SWEEPS[kernel].candidates if tile.warps == 8 or not chained]


def objections(kernel: str, width: int, dtype: str, tiles: list[Tile], device: torch.device) -> dict[Tile, str]:
    """Of each tile why it is not to be timed, or "".

    On a GPU by processes side by side, which fill Triton's cache. Where a tile makes one of them fault, another times.
    """
    if device.type == "cpu":
        return {tile: objection(kernel, draw(TINY_ROWS, width, dtype, device), tile) for tile in tiles}
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        jobs = {tile: pool.submit(try_out, kernel, width, dtype, tile) for tile in tiles}
        return {tile: str(job.exception() or job.result()) for tile, job in jobs.items()}


def try_out(kernel: str, width: int, dtype: str, tile: Tile) -> str:
    reason = objection(kernel, draw(CHECKED_ROWS, width, dtype, torch.device("cuda")), tile)
    if not reason:
        prepared(
            kernel, draw(512, width, dtype, torch.device("cuda")), tile
        )()  # compiled as for any number that 16 divides
        torch.cuda.synchronize()
    return reason


def objection(kernel: str, rows: Rows, tile: Tile) -> str:
    """A tile does not compile, does not fit, or is wrong."""
    try:
        with in_force(kernel, rows, tile):
            result = gate.check(gate.Case("realistic", rows), "triton")
    except Exception as error:  # the compiler has many of its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[-160:]}"
    return "" if result["passed"] else f"wrong: gradient error {result['gradient_error']:.1e}"


def take_turns(calls: dict, device: torch.device) -> dict[Tile, float]:
    """Median ms of every call, measured in rounds."""
    stopwatch = timing.Stopwatch(device)
    laps = stopwatch.rounds({tile: lap_of(call) for tile, call in calls.items()}, SECONDS, most=30) if calls else {}
    return {tile: statistics.median(itertools.chain(*found)) for tile, found in laps.items()}


def lap_of(call) -> timing.Work:
    def lap() -> Iterator[None]:
        call()
        yield

    return lap


def report(kernel: str, rows: Rows, now: Tile, ms: dict[Tile, float], passed_over: dict[str, str]) -> dict:
    if not ms:
        return {"passed": False, "passed_over": passed_over, "text": "no tile is right"}
    best = min(ms, key=ms.__getitem__)
    count, width = rows.embeddings.shape
    rate = FLOP[kernel.partition("-")[0]] * count**2 * width / ms[best] / 1e9
    key = tuning.architecture_of(rows.embeddings.device), SWEEPS[kernel].table, rows.embeddings.element_size()
    before = f"{ms[now]:.4g} ms" if now in ms else f"not measured: {passed_over.get(label(now))}"
    proposal = (
        f"{key}: {{{width}: {label(best)}}},  # {ms[best]:.4g} ms, {label(now)} {before}; the kernel alone, N {count:,}"
    )
    return {
        "proposal": proposal.replace("'", '"'),
        "milliseconds": {label(tile): time for tile, time in sorted(ms.items(), key=lambda pair: pair[1])},
        "passed_over": passed_over,
        "teraflops": rate,
        "text": f"{kernel}: {proposal}, {rate:.3g} TFLOP/s".replace("'", '"'),
    }


def label(tile: Tile) -> str:
    """As the table's source has it."""
    defaults = Tile._field_defaults
    rest = [f"{name}={value}" for name, value in tile._asdict().items() if name in defaults and value != defaults[name]]
    return f"Tile({', '.join([*map(str, tile[:4]), *rest])})"


if __name__ == "__main__":
    work(__doc__, measure)
