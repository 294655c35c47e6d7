"""Build every Triton kernel of the tuning table ahead of time, without a GPU, and look at what came out.

    python benchmarks/kernel/builds.py                      build all, print a table, compare it with the committed one
    python benchmarks/kernel/builds.py --write              … and put what was built into the committed one
    python benchmarks/kernel/builds.py --only sm_90 bf16 128

A build fails the check with a spilled register, without tensor-core instructions, with more shared memory than the
target has, or with more instructions in its main loop than the committed table says (by the same version of Triton).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixcl_dist.kernels import backward, forward, fused, index, plan, small, triangle, tuning
from mixcl_dist.kernels.implementation import is_interpreted

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "kernel" / "builds.csv"
TOLERATED = 1.02  #: instructions in the main loop, as a multiple of the committed number

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
#: Bytes of shared memory a program may have; sm_80's tiles are kept small enough for its relatives 8.6 and 8.9.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "hip": 64 * 1024}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA|UTCQMMA", "hip": "v_mfma"}
#: The kernels' arguments that are no compile-time constants, as Triton's signatures name their types; all others are
#: integers.
ARGUMENTS = {
    **dict.fromkeys(("row_keys", "column_keys", "keys", "tiles", "counts", "packed_relations", "packed"), "*i32"),
    **dict.fromkeys(("pairs", "pair_counts", "rest_tiles", "rest_counts"), "*i32"),
    **dict.fromkeys(("numbers", "positives", "first_equal", "count", "row_count", "column_count", "taken"), "*i32"),
    **dict.fromkeys(("place", "places", "areas", "is_relation"), "*i32"),
    **dict.fromkeys(("sorted_key", "sort_key", "order", "in_order", "links", "identity", "candidate_set"), "*i64"),
    **dict.fromkeys(("group", "anchors"), "*i64"),
    **dict.fromkeys(("present", "linked", "kinds", "set_table"), "*u8"),
    **dict.fromkeys(("out", "row_scalars", "column_scalars", "scalars", "products", "norm", "common"), "*fp32"),
    **dict.fromkeys(("own_sums", "strip_sums"), "*fp32"),
    **dict.fromkeys(("temperature", "row_norm", "column_norm", "upstream", "row_weight"), "*fp32"),
    **dict.fromkeys(("loss", "losses", "floors", "similarities", "of_temperature"), "*fp32"),
    **dict.fromkeys(("totals", "earlier", "weights", "lse", "parts", "sums"), "*fp64"),
    **dict.fromkeys(("identity_weight", "label_weight"), "fp32"),
}
#: Of a few kernels an argument of the same name has another type.
EXCEPTIONS = {
    ("_key_kernel", "keys"): "*i64",
    ("_gather_kernel", "count"): "i32",
    ("_gather_kernel", "embeddings"): "*bf16",
    ("_gather_kernel", "in_order"): "*bf16",
    ("_finish_kernel", "count"): "i32",
    ("_small_kernel", "embeddings"): "*bf16",
    ("_small_kernel", "gradient"): "*fp32",
}
#: Compile-time constants of the small kernels, as a call with groups has them.
CONSTANTS = {
    "BLOCK_ROWS": 128, "BLOCK_COLUMNS": 64, "ACTIVE": 3, "CHUNK": 512, "D": 128, "WIDTH": 128, "KINDS": 2,
    "BLOCK": 128, "RATIO": 2, "STRIPS": triangle.STRIPS, "PARTS": triangle.PARTS,
}  # fmt: skip


KERNELS = {
    "forward": forward.forward_kernel,
    "backward": backward.backward_kernel,
    "triangle": triangle.triangle_kernel,
}


class Entry(NamedTuple):
    """One build: an entry of the tuning table at one width, for one dtype and range of similarities."""

    architecture: str
    kernel: str
    dtype: str
    width: int
    range: str


class Build(NamedTuple):
    architecture: str
    kernel: str
    dtype: str
    width: int
    range: str
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: int  #: instructions in the whole kernel
    loop: int  #: instructions of the main loop, which makes one bulk tile
    loop_tensor_core: int
    loop_exponential: int
    triton: str


def entries() -> list[Entry]:
    """Everything in the table, at the widest rows that each entry serves, and at 64 features."""
    found = []
    for (architecture, kernel, size), by_width in tuning.TILES.items():
        if architecture != "interpreter":
            dtypes = [name for name, dtype in DTYPES.items() if dtype.itemsize == size]
            widths = sorted({64, *by_width})
            ranges = ("narrow",) if kernel == "triangle" else ("narrow", "wide")
            found += [Entry(architecture, kernel, *rest) for rest in itertools.product(dtypes, widths, ranges)]
    return found


def build(entry: Entry) -> Build:
    """Compile one entry, with groups, which need the most registers."""
    dtype = DTYPES[entry.dtype]
    by_width = tuning.TILES[entry.architecture, entry.kernel, dtype.itemsize]
    tile = next(tile for width, tile in by_width.items() if entry.width <= width)
    launch = tuning.fit(tile, entry.width, dtype, entry.architecture)
    function = KERNELS[entry.kernel]
    options = launch.options()
    constants = {name: value for name, value in options.items() if name.isupper()}
    types = ARGUMENTS | dict.fromkeys(("rows", "columns", "embeddings", "gradient"), f"*{entry.dtype}")
    if entry.kernel == "triangle":
        constants |= {"STRIPS": triangle.STRIPS, "PARTS": triangle.PARTS, "POLYNOMIAL": tile.polynomial}
        if tile.descriptor:
            types["streamed"] = f"tensordesc<{entry.dtype}[{tile.columns}, {launch.head}]>"
        else:
            constants["streamed"] = None
    else:
        constants |= {"HAS_GROUP": True, "WIDE": entry.range == "wide"}
    if entry.kernel == "backward":
        constants |= {"OUT": launch.out, "WEIGHT": backward.WEIGHTS[dtype], "D": entry.width}
    signature = signature_of(function, constants, types)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in ("R", "C")
    }
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(
        source,
        target=TARGETS[entry.architecture],
        options={name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")},
    )
    inspect = _inspect_hip if entry.architecture == "hip" else _inspect_cuda
    registers, spills, code = inspect(compiled)
    tensor_core, loop = re.compile(TENSOR_CORES[entry.architecture]), main_loop(code, entry.architecture)
    return Build(
        *entry,
        registers,
        spills,
        compiled.metadata.shared,
        sum(bool(tensor_core.search(line)) for line in code),
        len(loop),
        sum(bool(tensor_core.search(line)) for line in loop),
        sum("MUFU.EX2" in line or "v_exp_f32" in line for line in loop),
        triton.__version__,
    )


def signature_of(function, constants: dict, types: dict) -> dict[str, str]:
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}


def build_small(architecture: str) -> str:
    """Compile the kernels around the sweeps; they have nothing to measure."""
    for module in (index, plan, forward, triangle, backward, fused, small):
        for name, function in vars(module).items():
            if name.startswith("_") and name.endswith("_kernel"):
                defaults = {parameter.name: parameter.default for parameter in function.params if parameter.has_default}
                constants = defaults | {key: value for key, value in CONSTANTS.items() if key in function.arg_names}
                if module is small:
                    constants["BLOCK"] = small.LARGEST
                types = ARGUMENTS | {argument: kind for (owner, argument), kind in EXCEPTIONS.items() if owner == name}
                source = ASTSource(function, signature_of(function, constants, types), constants, {})
                options = {"num_warps": small.WARPS} if module is small else {}
                triton.compile(source, target=TARGETS[architecture], options=options)
    return architecture


def _inspect_cuda(compiled) -> tuple[int, int, list[str]]:
    """Registers, spilled words and the machine code, a label or an instruction a line."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    lines = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/|\.L_x_\d+:", line)]
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in lines)
    return registers, max(spills, stack // 4), lines


def _inspect_hip(compiled) -> tuple[int, int, list[str]]:
    """The same of an AMD build; scalar registers that move to vector registers are no spills to memory."""
    assembly = compiled.asm["amdgcn"]
    registers, spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spills, [line for line in assembly.splitlines() if re.match(r"\t[a-z]|\.LBB\w+:", line)]


def main_loop(code: list[str], architecture: str) -> list[str]:
    """The first of the smallest loops that hold a product and an exponential: the one over bulk tiles."""
    labels, loops = {}, []
    branch = re.compile(
        r"BRA\S* .*`\((\.L_x_\d+)\)" if architecture != "hip" else r"s_cbranch\S+ (\.LBB\w+)|s_branch (\.LBB\w+)"
    )
    for number, line in enumerate(code):
        if line.startswith("."):
            labels[line.split(":")[0]] = number
        elif found := branch.search(line):
            label = next(group for group in found.groups() if group)
            if label in labels:
                loops.append(code[labels[label] + 1 : number + 1])
    exponential = re.compile(r"MUFU\.EX2|v_exp_f32")
    tensor_core = re.compile(TENSOR_CORES[architecture])
    whole = [loop for loop in loops if any(map(exponential.search, loop)) and any(map(tensor_core.search, loop))]
    return [line for line in whole[0] if not line.startswith(".")] if whole else []


def complaints(made: Build, committed: dict[Entry, Build]) -> list[str]:
    """What is wrong with a build, in words."""
    found = []
    if made.spills:
        found.append(f"spills {made.spills} registers")
    if not made.tensor_core:
        found.append("has no tensor-core instruction")
    if made.shared_bytes > SHARED[made.architecture]:
        found.append(f"needs {made.shared_bytes} bytes of shared memory of {SHARED[made.architecture]}")
    before = committed.get(Entry(*made[:5]))
    if before and before.triton == made.triton and made.loop > TOLERATED * before.loop:
        found.append(f"has {made.loop} instructions in its main loop, {before.loop} in the committed table")
    return found


def read_committed() -> dict[Entry, Build]:
    if not COMMITTED.exists():
        return {}
    with COMMITTED.open() as file:
        rows = list(csv.DictReader(file))
    numbers = [name for name, kind in get_type_hints(Build).items() if kind is int]
    builds = [Build(**row | {name: int(row[name]) for name in numbers}) for row in rows]
    return {Entry(*made[:5]): made for made in builds}


def write_committed(builds: dict[Entry, Build]) -> None:
    """Builds of entries that the table has no more are left out."""
    COMMITTED.parent.mkdir(parents=True, exist_ok=True)
    with COMMITTED.open("w", newline="") as file:
        rows = [builds[entry] for entry in entries() if entry in builds]
        csv.writer(file, lineterminator="\n").writerows([Build._fields, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="words that an entry must have, e.g. sm_90 backward 128")
    parser.add_argument("--write", action="store_true", help=f"write {COMMITTED.relative_to(ROOT)}")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    wanted = [entry for entry in entries() if set(options.only) <= set(map(str, entry))]
    if not wanted:
        parser.error(f"--only {' '.join(options.only)}: no entry of the tuning table has all of these words")
    committed, builds, failed = read_committed(), [], 0
    print(" ".join(f"{name:>12}" for name in Build._fields[:-1]))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        planned = pool.map(build_small, sorted({entry.architecture for entry in wanted}))
        for made in pool.imap(build, wanted):
            builds.append(made)
            wrong = complaints(made, {} if options.write else committed)
            failed += bool(wrong)
            print(" ".join(f"{value:>12}" for value in made[:-1]), "; ".join(wrong), flush=True)
    if options.write:
        write_committed(committed | {Entry(*made[:5]): made for made in builds})
    print(f"the small kernels: built for {', '.join(planned)}")
    print(f"{len(builds)} builds by triton {triton.__version__}, {failed} with complaints")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
