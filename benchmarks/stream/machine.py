"""Where a benchmark ran."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib.metadata import version


def describe_machine(packages: tuple[str, ...] = ("torch", "numpy")) -> dict:
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown CPU")
    return {
        "device": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }
