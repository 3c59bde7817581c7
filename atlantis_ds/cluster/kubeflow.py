"""A recipe as a Kubernetes job: a TrainJob of the Kubeflow Trainer (v2), which the user applies with kubectl.

All stages run in one job, on all of its nodes. A job that is stopped, or loses a node, is created again and resumes
from the run folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from atlantis_ds.config.schema import Recipe

STOPPED = 75
"""Exit code of ranks that were asked to stop and have saved."""
RESTARTS = 3
"""How often a job that fails in another way, such as by a dead node, is created again."""


@dataclass(frozen=True)
class Pods:
    """The options of the command line."""

    image: str
    claim: str
    """PersistentVolumeClaim that all pods share: data, models and the run folder."""
    mount: str
    """Its mount point: the working directory, to which the recipe's paths are relative."""
    nodes: int
    gpus_per_node: int
    """0: request none."""
    ranks_per_node: int
    grace_seconds: int
    """Seconds that a pod has to save when it is asked to stop."""


def kubeflow_job(recipe: Recipe, stage: str, pods: Pods) -> list[dict[str, Any]]:
    """The objects to apply: the recipe as a ConfigMap, a TrainingRuntime, and the TrainJob that uses it.

    Args:
        stage: the `atlantis-ds` command that it runs: ``run`` or ``compare``.
    """
    name = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")[:50].rstrip("-")
    text = yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    api = "trainer.kubeflow.org/v1alpha1"
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"recipe.yaml": text}},
        {
            "apiVersion": api,
            "kind": "TrainingRuntime",
            "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
            "spec": {
                "mlPolicy": {"numNodes": pods.nodes, "torch": {}},
                "template": {"spec": _job_set(name, stage, pods)},
            },
        },
        {
            "apiVersion": api,
            "kind": "TrainJob",
            "metadata": {"name": name},
            "spec": {"runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}},
        },
    ]


def _job_set(name: str, stage: str, pods: Pods) -> dict[str, Any]:
    """For a job with one pod per node. A pod that was stopped, or evicted from its node, does not count as a
    restart."""
    stopped = [
        {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [STOPPED]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    again = {
        "name": "stopped",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    job = {
        "backoffLimit": 0,  # a single rank that is restarted alone cannot join the others
        "podFailurePolicy": {"rules": stopped},
        "template": {"spec": _pod(name, stage, pods)},
    }
    # The Trainer looks for these names, and for the label.
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    return {
        "failurePolicy": {"maxRestarts": RESTARTS, "rules": [again]},
        "replicatedJobs": [{"name": "node", "template": {"metadata": {"labels": labels}, "spec": job}}],
    }


def _pod(name: str, stage: str, pods: Pods) -> dict[str, Any]:
    command = ["python", "-m", "atlantis_ds", stage, "/recipe/recipe.yaml", "--ranks", str(pods.ranks_per_node)]
    container: dict[str, Any] = {
        "name": "node",
        "image": pods.image,
        # torchrun would turn every exit code into 1, including 75, so the package starts the ranks itself.
        "command": command,
        "workingDir": pods.mount,
        "volumeMounts": [
            {"name": "work", "mountPath": pods.mount},
            {"name": "recipe", "mountPath": "/recipe"},
            {"name": "shm", "mountPath": "/dev/shm"},  # the usual 64 MiB are not enough for NCCL
        ],
    }
    if pods.gpus_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(pods.gpus_per_node)}}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace_seconds,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "recipe", "configMap": {"name": name}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
