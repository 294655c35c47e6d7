"""Manifests that the published schemas accept, and that say what the job says."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml

from mixcl_dist.cluster.launch.job import Job, LaunchError
from mixcl_dist.cluster.launch.kubernetes import Cluster, manifests, ray_job

JOB = Job(("pretrain", "--data", "shards", "--run", "runs/Big_One"), nodes=3, processes=8, gpus=8, threads=12)
CLUSTER = Cluster(image="registry/mixcl:0.1", claim="archive", namespace="imaging", memory_gib=512)
VERSION = "1.32"


def test_the_published_schemas_accept_them():
    for one in yaml.safe_load_all(manifests(JOB, CLUSTER)):
        kubernetes_validate.validate(one, VERSION, strict=True)


def test_a_misspelt_field_would_not_pass():
    _, job = yaml.safe_load_all(manifests(JOB, CLUSTER))
    job["spec"]["completionModus"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


def test_every_pod_finds_the_first_and_knows_its_place():
    service, job = yaml.safe_load_all(manifests(JOB, CLUSTER))
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert name == service["metadata"]["name"] == pod["subdomain"] == "mixcl-big-one"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    container = pod["containers"][0]
    line = container["command"][-1]
    assert f"--master-addr={name}-0.{name}" in line and "--node-rank" not in line
    place = next(one for one in container["env"] if one["name"] == "PET_NODE_RANK")["valueFrom"]["fieldRef"][
        "fieldPath"
    ]
    assert place == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert "--nproc-per-node=8" in line and "runs/Big_One" in line
    assert container["resources"]["limits"] == {"cpu": "96", "memory": "512Gi", "nvidia.com/gpu": "8"}


def test_torchrun_takes_its_place_from_the_pods_environment(monkeypatch):
    from torch.distributed.run import parse_args

    monkeypatch.setenv("PET_NODE_RANK", "2")
    command = manifests(JOB, CLUSTER).partition("torch.distributed.run ")[2].partition(" --no-python")[0]
    assert parse_args([*command.split(), "program"]).node_rank == 2


def test_a_ray_job_has_the_jobs_nodes():
    """KubeRay publishes no schema to the validator: its fields one by one, and the pods in it by Kubernetes' own."""
    ray = yaml.safe_load(ray_job(JOB, CLUSTER))
    assert (ray["apiVersion"], ray["kind"]) == ("ray.io/v1", "RayJob")
    spec = ray["spec"]
    assert set(spec) == {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
    assert spec["entrypoint"].endswith("-- pretrain --data shards --run runs/Big_One")
    assert "--nodes=3 --processes=8 --gpus-per-node=8" in spec["entrypoint"]
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 3
    for pod in (head["template"], workers["template"]):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod["spec"]}
        kubernetes_validate.validate(whole, VERSION, strict=True)
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_a_name_that_no_label_may_have_is_refused():
    with pytest.raises(LaunchError, match=r"give --run a shorter name"):
        manifests(Job(("pretrain", "--run", "x" * 60)), CLUSTER)
