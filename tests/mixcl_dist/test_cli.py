"""The command line as a user meets it: help at once, one clear line for what is refused."""

import json
import math
import os
import re
import resource
import subprocess
import sys

import pytest

from mixcl_dist import cli
from mixcl_dist.arguments import parse
from mixcl_dist.cli import results
from mixcl_dist.cli.verbs import config_of
from mixcl_dist.config import ConfigError
from mixcl_dist.errors import REFUSALS

VERBS = ["shards build", "shards inspect", "shards verify", "pretrain", "finetune", "tune", "report", "export", "demo",
         "doctor", "config show", "benchmark", "plan"]  # fmt: skip


def mixcl(*arguments):
    command = [sys.executable, "-m", "mixcl_dist", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def shown(capsys):
    """A function that runs a command in this process and returns its exit code, output and errors."""

    def run(*arguments):
        try:
            code = cli.main(arguments)
        except SystemExit as ending:
            code = ending.code
        return code, *capsys.readouterr()

    return run


def test_help_comes_in_half_a_second():
    """Where Python itself is there in 0.02 s: a slower machine, or a busy one, takes longer for both."""
    least = {"mixcl_dist --help": math.inf, "this": math.inf}
    for _ in range(5):
        for module in least:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", *module.split()], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            least[module] = min(least[module], spent)
    assert least["mixcl_dist --help"] < 25 * least["this"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb, shown):
    code, output, _ = shown(*verb.split(), "--help")
    assert code == 0 and f"example:\n  mixcl {verb}" in output


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_in_help_is_accepted_by_the_parser(verb, shown):
    example = re.search(r"example:\n  mixcl (.*)", shown(*verb.split(), "--help")[1]).group(1)
    options = parse(cli._parser(), example.split())
    assert options.verb and config_of(options) if options.takes_settings else options.verb


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "--data", "absent", "--run", "r"], "absent"),
        (["pretrain", "--data", "absent", "--run", "r", "--pretrain.step", "3"], "did you mean pretrain.steps?"),
        (["config", "show", "--recipee", "demo"], "did you mean --recipe?"),
        (["config", "show", "--views.size"], "needs a value"),
        (["config", "show", "data", "stray"], "unexpected argument 'stray'"),
        (["report", "absent"], "absent"),
        (["export", "absent", "--to", "monai", "--out", "o"], "absent"),
        (["shards", "build", "absent", "--out", "s"], "absent"),
        (["shards", "verify", "absent"], "absent"),
        (["shards", "inspect", "absent"], "absent"),
        (["finetune", "--data", "absent", "--from", "none", "--labels", "0.1", "--run", "r"], "absent"),
        (["finetune", "--data", "absent", "--from", "none", "--labels", "5", "--run", "r"], "budget.fraction = 5"),
        (["finetune", "--data", "absent", "--from", "none", "--scans", "0", "--run", "r"], "budget.scans = 0"),
        (
            ["finetune", "--data", "absent", "--from", "none", "--labels", ".5", "--scans", "4", "--run", "r"],
            "fraction 0.5 and scans 4 are both given; set one of them",
        ),
        (
            ["finetune", "--data", "absent", "--from", "none", "--seed", "1", "--budget.seed", "2", "--run", "r"],
            "--seed 1 and --budget.seed 2 are one setting; give one of them",
        ),
        (["finetune", "--data", "absent", "--from", "none", "--scan", "4", "--run", "r"], "unknown option --scan"),
        (["shards", "inspect", "absent", "--window", "40", "40"], "--window 40 40: give the lower HU first"),
        (["probe", "none", "--data", "absent", "--out", "nowhere/p.json"], "--out nowhere/p.json: its folder does not"),
        (["report", "absent", "--pretrain.steps", "3"], "unknown option --pretrain.steps"),
        (["table", "--data", "d", "--shards", "s", "--out", "o", "--budget.scans", "2"], "--budget.scans: table.scans"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(arguments, said, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = shown(*arguments)
    assert code == 2 and said in errors.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


LAUNCHED = ["--", "pretrain", "--data", "shards", "--run", "runs/a", "--pretrain.steps", "5"]


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (["local", "--processes", "2"], "--nproc-per-node=2 --standalone"),
        (["hosts", "--hosts", "a,b"], "ssh -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=5 b"),
        (["slurm", "--nodes", "2", "--gpus-per-node", "8"], "#SBATCH --ntasks-per-node=8"),
        (["kubernetes", "--image", "mixcl", "--claim", "archive"], "kind: Job"),
        (["kubernetes", "--image", "mixcl", "--claim", "archive", "--ray-job"], "kind: RayJob"),
        (["ray", "--nodes", "3"], "3 x 1 processes on auto"),
    ],
)
def test_launch_shows_what_it_would_start(way, said, capsys):
    assert cli.main(["launch", *way, "--dry-run", *LAUNCHED]) == 0
    shown = capsys.readouterr().out
    assert said in shown and "--pretrain.steps 5" in shown


def test_a_demo_that_cannot_work_is_refused_before_its_folder_is_made(shown, tmp_path):
    for setting in (["--views.size", "18,24,24"], ["--finetune.patch_size", "26,24,24"]):
        code, _, errors = shown("demo", "--out", str(tmp_path / "demo"), *setting)
        assert code == 2 and f"{setting[0][2:]} {setting[1]}: every edge must be a multiple of 4" in errors
        assert not (tmp_path / "demo").exists()


def test_an_error_of_the_project_is_one_line_and_a_defect_keeps_its_traceback(shown, monkeypatch):
    def fail(error):
        def verb(options):
            raise error

        monkeypatch.setattr(results, "_report", verb)

    for refusal in (ConfigError, *REFUSALS):
        fail(refusal("said in one line"))
        assert shown("report", "run") == (2, "", "mixcl: said in one line\n")
    fail(ValueError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        shown("report", "run")


def start_in(folder):
    """What a command reads of a start before anything else."""
    folder.mkdir()
    facts = {"kind": "pretrain", "name": "start", "finished": "2026-01-01", "label_cases": []}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text("network: {filters: [4, 8, 8]}\n")
    network = {"architecture": "dynunet", "filters": [4, 8, 8], "window_hu": [-900, 700], "spacing_mm": None}
    (folder / "network.json").write_text(json.dumps(network | {"classes": []}))
    return str(folder)


@pytest.mark.parametrize(
    ("verb", "setting"),
    [
        (["finetune", "--data", "d", "--run", "r", "--from"], ["--network.filters", "4,8,16"]),
        (["tune", "--data", "d", "--study", "s", "--from"], ["--network.window_hu", "-1000,700"]),
        (["tune", "--data", "d", "--study", "s", "--from"], ["--budget.scans", "4"]),
        (["probe", "--data", "d"], ["--network.filters", "4,8,16"]),
    ],
)
def test_a_setting_that_would_give_way_in_silence_is_refused(shown, tmp_path, verb, setting):
    code, _, errors = shown(*verb, start_in(tmp_path / "start"), *setting)
    assert code == 2 and errors.startswith(f"mixcl: {setting[0]}: ") and errors.endswith("; leave it out\n")


def given(*words):
    options = parse(cli._parser(), list(words))
    return options, config_of(options)


SETTING, OPTION, SOURCES = ["--build.spacing_mm", "2,2,2"], ["--out", "s"], ["data", "more"]


@pytest.mark.parametrize(
    "words",
    [
        [*SETTING, *SOURCES, *OPTION],
        [*SOURCES, *SETTING, *OPTION],
        [*OPTION, *SETTING, *SOURCES],
        [*OPTION, "data", *SETTING, "more"],
        ["data", *OPTION, "more", "--build.spacing_mm=2,2,2"],
    ],
)
def test_settings_options_and_sources_may_stand_in_any_order(words):
    options, config = given("shards", "build", *words)
    assert [str(source) for source in options.source] == SOURCES
    assert str(options.out) == "s" and config.build.spacing_mm == (2, 2, 2)


def test_a_setting_takes_the_next_word_whatever_it_looks_like():
    _, config = given("config", "show", "--network.window_hu", "-160,240", "--pretrain.steps", "3")
    assert config.network.window_hu == (-160, 240) and config.pretrain.steps == 3


def test_lists_given_twice_are_joined():
    options, _ = given("shards", "build", "data", "--out", "s", "--exclude", "a", "b", "--exclude", "c")
    assert [str(path) for path in options.exclude] == ["a", "b", "c"]


TRIAL = ["finetune", "--data", "d", "--from", "none", "--run", "r"]


@pytest.mark.parametrize("words", [["--scans", "4"], ["--budget.scans", "4"], ["--scans", "4", "--budget.scans", "4"]])
def test_both_spellings_of_a_budget_are_one_setting(words):
    _, config = given(*TRIAL, *words, "--recipe", "demo")
    assert (config.budget.scans, config.budget.fraction) == (4, 0)  # the recipe's share gives way


def test_a_terminal_that_shows_few_characters_gets_stand_ins():
    command = [sys.executable, "-m", "mixcl_dist", "shards", "--help"]
    shown = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert shown.returncode == 0 and "CT volumes ? shards of patches" in shown.stdout.decode("latin-1")


def test_a_scheduler_s_warning_that_nothing_heeds_yet_ends_nothing():
    code = """
import os, signal
from mixcl_dist import cli
cli.main(["config", "show"])
os.kill(os.getpid(), signal.SIGUSR1)
print("lives")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("lives\n"), done


WAITS = """
import sys, time
from types import SimpleNamespace
from mixcl_dist import cli
def wait(options):
    print("waits", flush=True)
    while True:  # a signal between two looks at signals would not end a pause
        time.sleep(0.1)
cli.parse = lambda *given: SimpleNamespace(verb=wait)
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize("background", [False, True])
def test_sigterm_interrupts_also_what_a_script_started_in_the_background(background):
    """Behind &, a shell has let it ignore interrupts."""
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); " if background else ""
    start = f"import os, signal, sys; {ignore}os.execv(sys.executable, [sys.executable, '-c', {WAITS!r}])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", start], text=True, **pipes) as process:
        assert process.stdout.readline() == "waits\n"
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.startswith("mixcl: interrupted")
