"""`mixcl demo` as a newcomer runs it, and its page as a browser shows it."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    command = [
        sys.executable,
        "-m",
        "mixcl_dist",
        "demo",
        "--out",
        out,
        "--pretrain.steps",
        "6",
        "--finetune.steps",
        "6",
    ]
    made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert made.returncode == 0, made.stderr
    return out, made.stdout


def test_it_prints_the_dice_table_and_where_the_report_is(demo):
    out, printed = demo
    page = out / "study" / "report" / "index.html"
    assert f"report: {page.resolve()}" in printed
    assert printed.count("pretrained") == 2 and printed.count("scratch") == 3  # two fractions, and the headline


def test_every_trial_of_the_table_is_in_the_report(demo):
    rows = list(csv.DictReader((demo[0] / "study" / "report" / "report.csv").open()))
    trials = {row["id"] for row in rows if row["status"] == "done"}
    assert len(trials) == 2 * 2 * 2  # starts × fractions × seeds


def test_it_never_overwrites(demo):
    again = subprocess.run(
        [sys.executable, "-m", "mixcl_dist", "demo", "--out", demo[0]], capture_output=True, text=True
    )
    assert again.returncode == 2
    assert "is not empty" in again.stderr and len(again.stderr.strip().splitlines()) == 1


def test_a_browser_shows_the_page_without_a_network(demo, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to look at the page with; apt-get install chromium")
    picture = tmp_path / "page.png"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    address = f"file://{demo[0]}/study/report/index.html"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--window-size=1200,3000"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", address]
    subprocess.run([*command, *profile], check=True, capture_output=True, timeout=120, env=dict(os.environ))
    colours = Image.open(picture).convert("RGB").resize((120, 300)).getcolors(maxcolors=36_000)
    assert len(colours) > 300  # figures and slices, not an empty page
