"""Versions of packages, as builds and runs record them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

NOT_INSTALLED = "not installed"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Package → its version, or `NOT_INSTALLED`: no work needs them all."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
