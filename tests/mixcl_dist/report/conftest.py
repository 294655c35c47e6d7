"""A browser for pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def width_on_a_telephone(tmp_path):
    """Width in pixels that a page takes up on a screen of 420."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to look at the page with; install chromium")

    def width(index: Path) -> int:
        # In a frame, as a headless window is never narrower than 500 px.
        frame = tmp_path / "frame.html"
        script = "document.title = f.contentDocument.documentElement.scrollWidth"
        frame.write_text(
            f'<iframe id=f src="{index}" width=420 height=900 style="border:0" onload="{script}"></iframe>'
        )
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        command = [browser, *quiet, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=3000", "--dump-dom", f"file://{frame}"]
        dom = subprocess.run(command, check=True, capture_output=True, timeout=300, text=True).stdout
        return int(re.findall("<title>(.*?)</title>", dom)[0])

    return width
