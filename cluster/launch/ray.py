"""A Ray cluster: Ray Train places the processes, gives each its rank, and starts them anew where one is lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from mixcl_dist.cluster.launch.job import Job, LaunchError
from mixcl_dist.cluster.ray import check_resources, check_shared, connection


def run(job: Job, main: Callable[[Sequence[str]], int], *, address: str, failures: int) -> None:
    """Run `main(arguments of mixcl)` in every process of the job on the cluster at `address`, as one group.

    All machines must see the folder of the run, and its shards, as this one does. Where a process or a machine is lost,
    all processes are started again, at most `failures` times, and go on from the newest checkpoint.
    Raises `RayError` where the cluster cannot do it, `LaunchError` where it was tried and failed.
    """
    if job.command[0] != "pretrain":
        raise LaunchError(f"{job.command[0]} has no run for Ray to keep; start it by mixcl launch hosts, or srun")
    with connection(address, option="--address", variables=job.environment):
        from ray import train
        from ray.train.torch import TorchTrainer

        total = job.nodes * job.processes
        check_resources({"CPUs": ("CPU", total * job.threads), "--gpus-per-node": ("GPU", job.nodes * job.gpus)})
        check_shared(job.run.parent.resolve(), job.read)
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        folder = os.getcwd()
        trainer = TorchTrainer(
            lambda: _process(job, main, folder),
            scaling_config=train.ScalingConfig(
                num_workers=total, use_gpu=job.gpus > 0, resources_per_worker={"CPU": job.threads}
            ),
            run_config=train.RunConfig(
                name=job.name,
                storage_path=str(job.run.parent.resolve() / ".ray"),
                failure_config=train.FailureConfig(max_failures=failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            last = str(error).strip().splitlines()[-1]
            raise LaunchError(f"{job.run}: {last}; the same command goes on from its newest checkpoint") from None


def _process(job: Job, main: Callable[[Sequence[str]], int], folder: str) -> None:
    """What each process does: Ray has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""
    os.chdir(folder)
    resume = ["--resume", "latest"] if (job.run / "run.json").exists() else []
    code = main([*job.command, *resume])
    if code:
        raise RuntimeError(f"mixcl {job.command[0]} ended with {code}")
