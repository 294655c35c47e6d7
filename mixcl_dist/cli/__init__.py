"""`mixcl`: verbs → functions. Everything heavy is imported inside the verb that needs it."""

from __future__ import annotations

import argparse
import atexit
import getpass
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mixcl_dist.arguments import parse
from mixcl_dist.cli.launching import add_launch
from mixcl_dist.cli.profiling import add_profiling
from mixcl_dist.cli.results import add_results
from mixcl_dist.cli.shards import add_shards
from mixcl_dist.cli.training import add_training
from mixcl_dist.cli.verbs import add_verbs
from mixcl_dist.cluster.group import ToldError, leave
from mixcl_dist.errors import REFUSALS


def command() -> NoReturn:
    """`mixcl`, as a process."""
    leave(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code.

    0 done, 1 done with problems, 2 refused, 130 interrupted, be it by SIGTERM; 75 (sysexits.h: try again) asked to
    stop, and to be put into a scheduler's queue again.
    """
    _print_anything()
    _stand_in_for_a_user()
    options = parse(_parser(), list(sys.argv[1:] if arguments is None else arguments))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # else nothing would be said
        # A scheduler's warning that comes before a run heeds it would end it by a code that asks for no other turn.
        signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        return options.verb(options) or 0
    except KeyboardInterrupt:
        print("mixcl: interrupted; run the same command again (pretrain: with --resume latest)", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"mixcl: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except REFUSALS as error:  # any other exception is a defect and keeps its traceback
        if not isinstance(error, ToldError):
            print(f"mixcl: {error}", file=sys.stderr)
        return 2


def _interrupt(*_: object) -> None:
    """End as by Ctrl-C, which a shell lets those ignore that a script starts with &."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def _stand_in_for_a_user() -> None:
    """Give a user without an entry in passwd, as of `docker run --user 45678`, the name and the folder for caches that
    libraries ask for when they are imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is None or not os.access(home, os.W_OK):
        caches = {"MPLCONFIGDIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"} - os.environ.keys()
        folder = tempfile.TemporaryDirectory(prefix="mixcl-", ignore_cleanup_errors=True)  # nobody else's to write in
        os.environ |= dict.fromkeys(caches, folder.name)
        atexit.register(folder.cleanup)


def _print_anything() -> None:
    """On a terminal that cannot show a character, print a stand-in rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _parser() -> argparse.ArgumentParser:
    from mixcl_dist import __version__

    parser = argparse.ArgumentParser(
        prog="mixcl",
        allow_abbrev=False,
        description="Pre-train 3D segmentation networks on large CT archives; measure whether it helped.",
        epilog="example:\n  mixcl demo --out runs/demo        the whole path on a phantom cohort, a few minutes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mixcl {__version__}")
    verbs = add_verbs(parser)
    add_shards(verbs)
    add_training(verbs)
    add_results(verbs)
    add_profiling(verbs)
    add_launch(verbs)
    return parser
