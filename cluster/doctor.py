"""Is this machine fit for pre-training? Each finding is tried, not guessed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "triton", "webdataset", "monai", "ray")


@dataclass(frozen=True)
class Finding:
    name: str
    fit: bool
    detail: str


def examine() -> list[Finding]:
    """Look at Python, packages, processor, GPU, memory and disk, and take one real engine step."""
    checks = {
        "python": _python,
        "packages": _packages,
        "processor": _processor,
        "gpu": _gpu,
        "shared memory": _shared_memory,
        "disk": _disk,
        "engine step": _engine_step,
        "ray": _ray,
    }
    return [_try(name, check) for name, check in checks.items()]


def _try(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except Exception as error:  # a doctor reports what breaks, whatever it is
        return Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _python() -> tuple[bool, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    return sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)"


def _packages() -> tuple[bool, str]:
    found = {name: version_of(name) for name in PACKAGES}
    needed = [name for name in PACKAGES if name != "triton" or sys.platform == "linux"]  # elsewhere there is none
    return all(found[name] for name in needed), ", ".join(f"{name} {found[name] or 'missing'}" for name in PACKAGES)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[bool, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return True, f"{cores} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"


def _gpu() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return True, "none; training runs on the CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return True, ", ".join(names)


def _shared_memory() -> tuple[bool, str]:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    return free > 2**28, f"{free / 2**30:.1f} GiB free (loader workers pass batches through it; 0.25 is the least)"


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(".").free
    return free > 2**30, f"{free / 2**30:.0f} GiB free here"


def _engine_step() -> tuple[bool, str]:
    import functools

    import torch

    from mixcl_dist.cluster.engine import EngineConfig, launch

    constant = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
    module = torch.nn.Linear(4, 1)
    engine = launch(module, torch.optim.AdamW, constant, micro_batch_size=2, config=EngineConfig())
    engine.backward(engine(torch.ones(2, 4, device=engine.device)).square().mean())
    engine.step()
    finite = bool(torch.isfinite(module.weight).all())
    detail = (
        f"DeepSpeed ZeRO {EngineConfig().stage(engine.world_size)} on {engine.device}, world size {engine.world_size}"
    )
    engine.close()
    return finite, detail


def _ray() -> tuple[bool, str]:
    import ray

    from mixcl_dist.cluster.ray import connection

    with connection("local", option="ray", cpus=1):
        return ray.get(ray.remote(lambda: 42).remote()) == 42, "a task ran on a local cluster"
