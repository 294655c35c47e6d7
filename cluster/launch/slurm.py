"""SLURM: a batch script whose step is the ranks themselves, which read SLURM's variables.

Before its time is up, or before it is preempted, every rank gets SIGUSR1, saves and ends with `REQUEUE`; the script
then asks for another turn, and each turn goes on from the newest checkpoint. So it does where a machine was lost, which
the other ranks notice sooner than SLURM does. Any other failure ends the job, and so does scancel. A rank whose step
outlasts the warning still has SLURM's KillWait once time is up. The first rank that ends does not end the others, which
do so by themselves: one that SLURM had ended a second before its own end would hide that there is another turn to ask.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mixcl_dist.cluster.launch.job import ID_VARIABLE, REQUEUE, Job, LaunchError

ANSWER_S = 60
"""Seconds that the machines of a job whose step failed may take to answer, before one is taken for lost."""
TIME = re.compile(r"\d+(-\d+)?(:\d+){0,2}")


@dataclass(frozen=True)
class Allocation:
    """What the site wants to know."""

    time: str | None = None
    """Longest time of one turn, as sbatch has it: minutes, hours:minutes:seconds or days-hours."""
    partition: str | None = None
    account: str | None = None
    warning_s: int = 120
    """Seconds before the end of a turn at which every rank is told to save."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as "--constraint=a100"."""
    container: str | None = None
    """Image that ranks run in, by the pyxis plugin's `--container-image`."""

    def __post_init__(self) -> None:
        if self.time is not None and not TIME.fullmatch(self.time):
            raise LaunchError(f"time {self.time}: give minutes, hours:minutes:seconds or days-hours")
        for option in self.options:
            if not option.startswith("--"):
                raise LaunchError(f"sbatch option {option}: give it as --name=value")


def script(job: Job, allocation: Allocation, *, python: str = sys.executable) -> str:
    """The batch script."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes,
        "cpus-per-task": job.threads,
        "gpus-per-node": job.gpus or None,
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "signal": f"USR1@{allocation.warning_s}",
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines += ["--requeue", *allocation.options]
    container = f"--container-image={shlex.quote(allocation.container)} " if allocation.container else ""
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items())
    line = job.shell([python, "-m", "mixcl_dist", *job.command])
    directives = "\n".join(f"#SBATCH {line}" for line in lines)
    return f"""\
#!/bin/bash
{directives}
{exports}
export {ID_VARIABLE}=slurm-$SLURM_JOB_ID
export MASTER_ADDR=$(hostname)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
trap : TERM  # which ends this script, too, when its time is up
srun --kill-on-bad-exit=0 --wait=60 {container}sh -c {shlex.quote(line)}
code=$?
lost_machine() {{ ! timeout {ANSWER_S} srun --overlap --ntasks-per-node=1 true; }}
state=$(scontrol show job "$SLURM_JOB_ID")
case $code in
    0) ;;
    {REQUEUE}) [[ $state =~ JobState=RUNNING|Reason=TimeLimit ]] && again=true ;;  # else it has been cancelled
    *) [[ $state =~ JobState=RUNNING ]] && lost_machine && again=true ;;
esac
if [ "$again" = true ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def submit(text: str, folder: Path) -> str:
    """Hand the script to sbatch from `folder`; returns the job's number. Raises `LaunchError` where it is refused."""
    if shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch here; log in to a node of the cluster, or look at it with --dry-run")
    done = subprocess.run(["sbatch", "--parsable"], input=text, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[0]
        cure = "give the options that this site knows, as sinfo and its guide tell them"
        raise LaunchError(f"sbatch: {reason.removeprefix('sbatch: error: ')}; {cure}")
    return done.stdout.strip().partition(";")[0]
