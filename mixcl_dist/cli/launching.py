"""`mixcl launch`: one command on several machines."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixcl_dist.cli.verbs import add_verb, add_verbs, positive


def add_launch(verbs: Any) -> None:
    from mixcl_dist.cluster.launch.job import PORT

    launch = verbs.add_parser(
        "launch", allow_abbrev=False, help="pre-train on several machines: hosts, SLURM, Kubernetes, Ray"
    )
    on_launch = add_verbs(launch, "WHERE")
    behind = "-- pretrain --data shards --run runs/a"

    def way(name: str, function: Callable, summary: str, example: str) -> Callable[..., argparse.Action]:
        add = add_verb(on_launch, name, _launch, summary, f"mixcl launch {example} {behind}", takes_settings=False)
        on_launch.choices[name].set_defaults(launch=function)
        add("--gpus-per-node", dest="gpus", type=int, default=0, metavar="N", help="default 0: on CPUs")
        add("--processes", type=positive, metavar="N", help="processes of a node (default: one for each GPU, or 1)")
        add("--threads", type=positive, default=1, metavar="N", help="CPU cores of each process (default 1)")
        add("--dry-run", action="store_true", help="print what would be started")
        return add

    def nodes(add: Callable[..., argparse.Action]) -> None:
        add("--nodes", type=positive, default=1, metavar="N", help="machines (default 1)")

    def command(add: Callable[..., argparse.Action]) -> None:
        add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="a mixcl command, its settings with it")

    add = way("local", _launch_hosts, "this machine", "local --processes 2")
    on_launch.choices["local"].set_defaults(nodes=1, hosts=None, port=PORT, failures=0)
    command(add)

    add = way("hosts", _launch_hosts, "hosts that ssh reaches", "hosts --hosts a,b --gpus-per-node 8")
    add("--hosts", required=True, metavar="A,B|FILE", help="which see the same folders; all meet at the first")
    add("--port", type=positive, default=PORT, metavar="PORT", help=f"where the first host listens (default {PORT})")
    add("--failures", type=int, default=3, metavar="N", help="how often to go on without hosts that are lost (3)")
    on_launch.choices["hosts"].set_defaults(nodes=1)
    command(add)

    add = way("slurm", _launch_slurm, "a SLURM cluster", "slurm --nodes 2 --gpus-per-node 8 --time 1-0")
    nodes(add)
    add("--time", metavar="TIME", help="of one turn; a run that is not done by then gets another")
    add("--partition", metavar="NAME", help="see sbatch")
    add("--account", metavar="NAME", help="see sbatch")
    add("--warning", type=positive, default=120, metavar="S", help="seconds for saving before a turn's end (120)")
    add("--container", metavar="IMAGE", help="image to run in (pyxis)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="a further option, as --sbatch=--constraint=x")
    command(add)

    add = way(
        "kubernetes", _launch_kubernetes, "a Kubernetes cluster", "kubernetes --image I --claim archive --nodes 2"
    )
    nodes(add)
    add("--image", required=True, metavar="IMAGE", help="with mixcl-dist in it")
    add("--claim", required=True, metavar="NAME", help="PersistentVolumeClaim of shards and runs, ReadWriteMany")
    add("--mounted", default="/data", metavar="FOLDER", help="where pods see it, and start (default /data)")
    add("--namespace", metavar="NAME", help="default: kubectl's")
    add("--memory-gib", type=positive, default=32, metavar="GIB", help="memory of a node's pod (default 32)")
    add("--ray-job", action="store_true", help="as a RayJob of the KubeRay operator")
    command(add)

    add = way("ray", _launch_ray, "a Ray cluster that is there", "ray --address auto --nodes 2 --gpus-per-node 8")
    nodes(add)
    add("--address", default="auto", metavar="ADDRESS", help="auto or host:port (default auto)")
    add("--failures", type=int, default=3, metavar="N", help="how often to start again where a machine is lost (3)")
    command(add)


def _launch(options: argparse.Namespace) -> int:
    import secrets
    import socket

    from mixcl_dist.cluster.launch.job import Job

    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    size = {"nodes": options.nodes, "processes": options.processes or options.gpus or 1, "gpus": options.gpus}
    job = Job(tuple(words), **size, threads=options.threads, id=f"{socket.gethostname()}-{secrets.token_hex(4)}")
    return options.launch(options, job)


def _launch_hosts(options: argparse.Namespace, job: Any) -> int:
    import shlex

    from mixcl_dist.cluster.launch import hosts

    names = hosts.read_hosts(options.hosts) if options.hosts else []
    if options.dry_run:
        commands = hosts.commands(dataclasses.replace(job, nodes=len(names) or 1), names, port=options.port)
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    return hosts.run(job, names, port=options.port, failures=options.failures)


def _launch_slurm(options: argparse.Namespace, job: Any) -> int:
    from mixcl_dist.cluster.launch.slurm import Allocation, script, submit

    known = {"time": options.time, "partition": options.partition, "account": options.account}
    site = Allocation(**known, warning_s=options.warning, options=tuple(options.sbatch), container=options.container)
    text = script(job, site)
    if options.dry_run:
        print(text, end="")
    else:
        number = submit(text, Path.cwd())
        print(f"job {number}; its log: {job.name}-{number}.log; next: squeue --job {number}")
    return 0


def _launch_kubernetes(options: argparse.Namespace, job: Any) -> int:
    from mixcl_dist.cluster.launch.kubernetes import Cluster, apply, manifests, ray_job

    place = {"mounted": options.mounted, "namespace": options.namespace, "memory_gib": options.memory_gib}
    cluster = Cluster(image=options.image, claim=options.claim, **place)
    text = ray_job(job, cluster) if options.ray_job else manifests(job, cluster)
    print(text if options.dry_run else apply(text), end="")
    return 0


def _launch_ray(options: argparse.Namespace, job: Any) -> int:
    from mixcl_dist.cluster.launch import ray

    if options.dry_run:
        print(f"{job.nodes} x {job.processes} processes on {options.address}: mixcl {' '.join(job.command)}")
    else:
        from mixcl_dist.cli import main

        ray.run(job, main, address=options.address, failures=options.failures)
    return 0
