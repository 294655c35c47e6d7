"""Ports for programs that listen at one that they are told."""

from __future__ import annotations

import itertools
import os
import socket

from mixcl_dist.cluster.group import PORTS

_numbers = itertools.count()


def free_port() -> int:
    """One that is free, and still is when it is used: the system gives none of these away by itself, other processes of
    tests begin elsewhere, and this one is told of none again for a long time."""
    for number in _numbers:
        port = PORTS[(97 * os.getpid() + number) % len(PORTS)]
        with socket.socket() as one:
            try:
                one.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is always another number")
