"""Kubernetes: an indexed Job of torchruns, a headless Service by which they meet, and the same as a KubeRay RayJob."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mixcl_dist.cluster.launch.job import PORT, Job, LaunchError, torchrun

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
"""Which of the job's pods one is."""
MAX_NAME = 50
"""Of the 63 letters of a label, less what Kubernetes puts behind a Job's name."""


@dataclass(frozen=True)
class Cluster:
    """Where the pods run and what they see."""

    image: str
    """With mixcl-dist in it."""
    claim: str
    """A PersistentVolumeClaim that all nodes can write to (ReadWriteMany): shards and runs lie below `mounted`."""
    mounted: str = "/data"
    namespace: str | None = None
    retries: int = 3
    """How often a pod that failed is started again; one that was told to stop and has saved is not counted."""
    memory_gib: int = 32
    """Memory of a node's pod; half of it may be shared memory, through which batches pass."""


def manifests(job: Job, cluster: Cluster) -> str:
    """The Service and the Job as YAML, for `kubectl apply -f -`."""
    name = _name(job)
    service = _object("v1", "Service", name, cluster) | {
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they have to meet before any is ready
            "selector": {"job-name": name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        }
    }
    where = [f"--nnodes={job.nodes}", f"--master-addr={name}-0.{name}", f"--master-port={PORT}"]
    pod = _pod(job, cluster, ["sh", "-c", job.shell(torchrun(job, where, python="python"))])
    # torchrun takes its --node-rank from there.
    rank = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    pod["spec"]["containers"][0]["env"].append(rank)
    pod["spec"] |= {"restartPolicy": "Never", "subdomain": name}
    spec = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": cluster.retries * job.nodes,
        # A pod that was moved away has done nothing wrong.
        "podFailurePolicy": {
            "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        },
        "template": pod,
    }
    return _yaml([service, _object("batch/v1", "Job", name, cluster) | {"spec": spec}])


def ray_job(job: Job, cluster: Cluster) -> str:
    """A RayJob of the KubeRay operator as YAML: a Ray cluster of the job's nodes for the time of the job."""
    name = _name(job)
    size = [f"--nodes={job.nodes}", f"--processes={job.processes}", f"--gpus-per-node={job.gpus}"]
    entry = ["python", "-m", "mixcl_dist", "launch", "ray", "--address=auto", *size, "--", *job.command]
    head = _pod(job, cluster, None, gpus=0)
    workers = {
        "groupName": "workers",
        "replicas": job.nodes,
        "minReplicas": job.nodes,
        "maxReplicas": job.nodes,
        "rayStartParams": {},
        "template": _pod(job, cluster, None),
    }
    spec = {
        "entrypoint": shlex.join(entry),
        "shutdownAfterJobFinishes": True,
        "backoffLimit": cluster.retries,
        "rayClusterSpec": {
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
            "workerGroupSpecs": [workers],
        },
    }
    return _yaml([_object("ray.io/v1", "RayJob", name, cluster) | {"spec": spec}])


def apply(text: str) -> str:
    """Hand manifests to kubectl, and return what it says; raises `LaunchError` where it refuses them."""
    if shutil.which("kubectl") is None:
        raise LaunchError("there is no kubectl here; install it, or look at the manifests with --dry-run")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        cure = "mend that, or choose another cluster by kubectl config use-context"
        raise LaunchError(f"kubectl: {' '.join(done.stderr.split())}; {cure}")
    return done.stdout


def _pod(job: Job, cluster: Cluster, command: Sequence[str] | None, gpus: int | None = None) -> dict[str, Any]:
    gpus = job.gpus if gpus is None else gpus
    amount: dict[str, Any] = {"cpu": str(job.threads * job.processes), "memory": f"{cluster.memory_gib}Gi"}
    container: dict[str, Any] = {
        "name": "mixcl",
        "image": cluster.image,
        "workingDir": cluster.mounted,
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "resources": {"requests": amount, "limits": amount | ({"nvidia.com/gpu": str(gpus)} if gpus else {})},
        "volumeMounts": [
            {"name": "data", "mountPath": cluster.mounted},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if command is not None:
        container["command"] = list(command)
    memory = {"medium": "Memory", "sizeLimit": f"{max(1, cluster.memory_gib // 2)}Gi"}
    volumes = [
        {"name": "data", "persistentVolumeClaim": {"claimName": cluster.claim}},
        {"name": "shared-memory", "emptyDir": memory},
    ]
    return {"metadata": {"labels": {"app": "mixcl"}}, "spec": {"containers": [container], "volumes": volumes}}


def _object(version: str, kind: str, name: str, cluster: Cluster) -> dict[str, Any]:
    namespace = {"namespace": cluster.namespace} if cluster.namespace else {}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name} | namespace}


def _name(job: Job) -> str:
    """A DNS label, as names of pods end in it."""
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if len(name) > MAX_NAME:
        raise LaunchError(f"run {job.run.name}: {name} is longer than {MAX_NAME} letters; give --run a shorter name")
    return name


def _yaml(objects: Sequence[dict[str, Any]]) -> str:
    return yaml.safe_dump_all(objects, sort_keys=False)
