"""How far does pre-training scale? From what a step's parts cost to the efficiency at 8 to 1,024 GPUs.

python benchmarks/scaling/run.py --out OUT                 OUT/scaling.md, .json and .png, in seconds
python benchmarks/scaling/run.py --check --out OUT         OUT/check.txt, too: predicted and real steps of 1, 2 and 4
                                                           ranks on this machine, which has to be idle; ten minutes

The costs of a GPU are no measurement: none has run this yet. They are what its data sheet allows, less a usual share.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

from mixcl_dist.profiling.scaling import CURES, Contrast, Costs, Network, efficiency, most_ranks, predict

#: An H100 at 4 patches of 96³, two views each: 7 TFLOP of convolutions at 100 TFLOP/s and what is around them; in the
#: loss 770 FLOP and two exponentials for a pair of rows of 128 bfloat16 features, at 40 % of 800 TFLOP/s.
GPU = Costs(
    compute_s=0.1,
    own_pair_s=2e-12,
    other_pair_s=4e-12,
    parameters=30_000_000,
    width=128,
    element_bytes=2,
    sample_bytes=700_000,
    patches=4,
)
NETWORKS = (
    Network("InfiniBand, 400 Gbit/s a GPU", 8, 350e9, 40e9, 3e-6, 8e-6, storage=100e9),
    Network("Ethernet, 100 Gbit/s a node", 8, 350e9, 1.3e9, 3e-6, 3e-5, storage=5e9),
)
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROWS = (8192, 16384, 32768, 65536)
STAGES = (1, 2, 3)
CONTRASTS: tuple[Contrast, ...] = ("gather", "ring")
LEAST = 0.8
BAR = 0.15


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder to write to")
    options.add_argument("--check", action="store_true", help="measure on this machine, too")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    text = tables()
    print(text, end="")
    (given.out / "scaling.md").write_text(text)
    (given.out / "scaling.json").write_text(json.dumps(efficiencies(), indent=1) + "\n")
    plot(given.out / "scaling.png")
    return check(given.out) if given.check else 0


def efficiencies() -> dict[str, float]:
    """Every cell of the tables at ZeRO 1, by name."""
    return {
        f"{network.name}, {rows:,} rows, {contrast}, {ranks} GPUs": efficiency(
            GPU, network, ranks=ranks, rows=rows, stage=1, contrast=contrast
        )
        for network, rows, contrast, ranks in itertools.product(NETWORKS, ROWS, CONTRASTS, RANKS)
    }


def tables() -> str:
    lines = ["# Predicted efficiency of pre-training", "", *_assumptions()]
    for network in NETWORKS:
        lines += ["", f"## {network.name}", "", "Efficiency in %, at ZeRO 1; gathered / on a ring", ""]
        lines += [
            "| rows a rank | " + " | ".join(f"{ranks:,}" for ranks in RANKS) + " |",
            "|---" * (len(RANKS) + 1) + "|",
        ]
        for rows in ROWS:
            cells = [
                f"{_share(network, ranks, rows, 'gather')} / {_share(network, ranks, rows, 'ring')}" for ranks in RANKS
            ]
            lines.append(f"| {rows:,} | " + " | ".join(cells) + " |")
        lines += ["", f"ZeRO stages at {ROWS[0]:,} rows, gathered; all scatter the batch alike:", ""]
        lines += [
            f"- ZeRO {stage}: "
            + ", ".join(f"{_share(network, ranks, ROWS[0], 'gather', stage)} at {ranks:,}" for ranks in RANKS)
            for stage in STAGES
        ]
        lines += ["", *limits(network)]
    return "\n".join(lines) + "\n"


def _assumptions() -> list[str]:
    networks = [
        f"- {network.name}: {network.inside / 1e9:g} GB/s a GPU inside a node of {network.ranks_per_node}, "
        f"{network.between / 1e9:g} between nodes, {network.between_latency_s * 1e6:g} µs a hop, shards at "
        f"{network.storage / 1e9:g} GB/s for all"
        for network in NETWORKS
    ]
    return [
        "From `benchmarks/scaling/run.py`. The costs of a GPU are assumed (see there), not measured: "
        f"{GPU.compute_s * 1e3:g} ms of network, views and optimizer for {GPU.patches} patches, "
        f"{GPU.other_pair_s * 1e12:g} ps for a pair of rows of {GPU.width} features, {GPU.parameters / 1e6:g} million "
        f"parameters, {GPU.sample_bytes / 1e6:g} MB a stored patch. Every rank keeps its patches and rows.",
        "",
        *networks,
    ]


def limits(network: Network) -> list[str]:
    """Where the design stops scaling on a network, and what would lift that, in words."""
    lines = []
    for rows in ROWS:
        contrast: Contrast = "ring" if rows * RANKS[-1] * GPU.width * GPU.element_bytes > 2**29 else "gather"
        most = most_ranks(GPU, network, rows=rows, stage=1, contrast=contrast, least=LEAST)
        step = predict(GPU, network, ranks=2 * most, rows=rows, stage=1, contrast=contrast)
        lines.append(
            f"- {rows:,} rows: {LEAST:.0%} or more up to {most:,} GPUs. Beyond it the {step.limit} cost most, "
            f"{getattr(step, step.limit) * 1e3:.0f} of {step.seconds * 1e3:.0f} ms at {2 * most:,}: "
            f"{CURES[step.limit]}."
        )
    return lines


def _share(network: Network, ranks: int, rows: int, contrast: Contrast, stage: int = 1) -> str:
    return f"{100 * efficiency(GPU, network, ranks=ranks, rows=rows, stage=stage, contrast=contrast):.0f}"


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(NETWORKS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, network in zip(axes, NETWORKS, strict=True):
        for number, rows in enumerate(ROWS):
            for contrast, line in (("gather", "-"), ("ring", "--")):
                shares = [
                    efficiency(GPU, network, ranks=ranks, rows=rows, stage=1, contrast=contrast)  # type: ignore[arg-type]
                    for ranks in RANKS
                ]
                axis.plot(RANKS, shares, line, color=f"C{number}", label=f"{rows:,} rows, {contrast}")
        axis.set(xscale="log", xlabel="GPUs", ylim=(0, 1.02), title=network.name)
        axis.set_xticks(RANKS, [f"{ranks:,}" for ranks in RANKS], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency (predicted)")
    axes[-1].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def check(out: Path) -> int:
    """Measure here; 1 where a prediction is off by more than the bar."""
    from measure import PATCHES, ROWS, checks

    from mixcl_dist.run import machine

    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        found = checks(Path(folder), (1, 2, 4))
    on = machine()
    lines = [
        f"Steps of mixcl pretrain over gloo, {PATCHES} patches and {ROWS:,} rows a rank, ZeRO 1",
        f"{on.cpu}, {on.cores} cores",
        "ranks  by itself, ms   predicted, ms   measured, ms   off by",
    ]
    for one in found:
        times = [f"{seconds * 1e3:>13.1f}" for seconds in (one.compute_s, one.predicted_s, one.measured_s)]
        lines.append(f"{one.ranks:>5}  " + "   ".join(times) + f"   {one.error:>+6.1%}")
    worst = max(abs(one.error) for one in found)
    lines.append(f"the worst is off by {worst:.1%}: {'within' if worst <= BAR else 'ABOVE'} the bar of {BAR:.0%}")
    print("\n".join(lines))
    (out / "check.txt").write_text("\n".join(lines) + "\n")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
