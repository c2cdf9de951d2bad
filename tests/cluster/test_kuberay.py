"""kuberay.yaml: misspelt keys are refused at every depth, and so is what leaves a cluster open or paid for."""

import copy
import json
import re
from typing import Any

import pytest
import yaml
from changes import Change, dropping, renaming, replacing, setting
from files import filled_text

from tune_bisenet.check_cluster.kubernetes import problems

HEAD = "spec.headGroupSpec"
WORKER = "spec.workerGroupSpecs.0"
POD = f"{WORKER}.template.spec"
CONTAINER = f"{POD}.containers.0"

CLUSTER_RULES: dict[str, tuple[Change, str]] = {
    "a kind that is unknown": (setting("kind", "RayClusters"), "kind RayClusters is not known"),
    "another version of the API": (setting("apiVersion", "ray.io/v1alpha1"), "apiVersion: Input should be 'ray.io/v1'"),
    "another Ray": (setting("spec.rayVersion", "2.59.0"), "2.59.0 is not requirements.lock's 2.60.0"),
    "no token": (dropping("spec.authOptions"), "authOptions: needs mode: token"),
    "a token that is off": (setting("spec.authOptions.mode", "disabled"), "authOptions: needs mode: token"),
    "no autoscaling": (dropping("spec.enableInTreeAutoscaling"), "enableInTreeAutoscaling: must be true"),
    "a head open to the world": (setting(f"{HEAD}.serviceType", "LoadBalancer"), "needs serviceType: ClusterIP"),
    "an ingress": (setting(f"{HEAD}.enableIngress", True), "no ingress"),
    "trials on the head": (dropping(f"{HEAD}.rayStartParams.num-cpus"), 'needs num-cpus: "0"'),
    "a number where a text is wanted": (setting(f"{HEAD}.rayStartParams.num-cpus", 0), "should be a valid string"),
    "no workers": (setting("spec.workerGroupSpecs", []), "no trial would ever run"),
    "more replicas than allowed": (setting(f"{WORKER}.replicas", 9), "replicas must lie between"),
    "replicas below none": (setting(f"{WORKER}.minReplicas", -1), "minReplicas: Input should be greater than or equal"),
    "root": (dropping(f"{POD}.securityContext.runAsNonRoot"), "needs runAsNonRoot: true"),
    "root by number": (setting(f"{POD}.securityContext.runAsUser", 0), "a runAsUser that is not 0"),
    "more rights by sudo": (
        dropping(f"{CONTAINER}.securityContext.allowPrivilegeEscalation"),
        "needs allowPrivilegeEscalation: false",
    ),
    "all rights": (setting(f"{CONTAINER}.securityContext.privileged", True), "must not be privileged"),
    "no limit of memory": (dropping(f"{CONTAINER}.resources.limits.memory"), "no limit of memory"),
    "no GPU": (setting(f"{CONTAINER}.resources.limits", {"cpu": "4"}), r"no container has a limit of nvidia\.com/gpu"),
    "an amount that is none": (setting(f"{CONTAINER}.resources.limits.memory", "14 GB"), "memory: String should match"),
    "any node": (dropping(f"{POD}.nodeSelector"), "needs a nodeSelector"),
    "no toleration": (dropping(f"{POD}.tolerations"), "needs a toleration"),
    "a volume that is not there": (renaming(f"{POD}.volumes.0.emptyDir", "emptydir"), "emptydir: Extra inputs"),
    "a mount of no volume": (setting(f"{CONTAINER}.volumeMounts.0.name", "cash"), "there is no volume cash"),
    "an image that is not fixed": (
        setting(f"{CONTAINER}.image", "rayproject/ray:nightly-py311"),
        "another image tomorrow",
    ),
    "an image that hides its Ray": (setting(f"{CONTAINER}.image", "registry.example/ours:1"), "must say its Ray"),
}

JOB_RULES: dict[str, tuple[Change, str]] = {
    "pods that stay": (dropping("spec.shutdownAfterJobFinishes"), "shutdownAfterJobFinishes: must be true"),
    "a retry that collides": (
        replacing("spec.entrypoint", "cluster/search.sh", "cluster/other.sh"),
        "goes on with it",
    ),
    "a mode that is unknown": (setting("spec.submissionMode", "k8sJobMode"), "submissionMode: Input should be"),
    "a token that is off, inside": (
        dropping("spec.rayClusterSpec.authOptions"),
        "RayJob.spec.rayClusterSpec.authOptions: needs mode: token",
    ),
}


DOCUMENTS: list[Any] = list(yaml.safe_load_all(filled_text("kuberay.yaml")))
CLUSTER, JOB = (json.loads(json.dumps(document)) for document in DOCUMENTS)  # without the parts that anchors share


def refused(document: Any, change: Change) -> list[str]:
    """What is said of a document once it is changed."""
    changed = copy.deepcopy(document)
    change(changed)
    return list(problems([changed]))


@pytest.mark.parametrize("rule", CLUSTER_RULES)
def test_a_raycluster_is_refused_for(rule: str) -> None:
    change, expected = CLUSTER_RULES[rule]
    found = refused(CLUSTER, change)
    assert any(re.search(expected, problem) for problem in found), found


@pytest.mark.parametrize("rule", JOB_RULES)
def test_a_rayjob_is_refused_for(rule: str) -> None:
    change, expected = JOB_RULES[rule]
    found = refused(JOB, change)
    assert any(re.search(expected, problem) for problem in found), found


FREE = {"labels", "annotations", "limits", "requests", "nodeSelector", "rayStartParams", "metadata"}
"""What holds keys of the user's own; `metadata` itself is fixed, and tried apart."""


def keys(value: object, path: tuple[str, ...] = ()) -> list[str]:
    """The path of every key in a tree whose name is not the user's own."""
    if isinstance(value, list):
        return [found for number, inner in enumerate(value) for found in keys(inner, (*path, str(number)))]
    if not isinstance(value, dict):
        return []
    own = [] if path and path[-1] in FREE - {"metadata"} else [".".join((*path, key)) for key in value]
    return own + [found for key, inner in value.items() for found in keys(inner, (*path, key))]


@pytest.mark.parametrize("document", [CLUSTER, JOB], ids=["RayCluster", "RayJob"])
def test_every_key_misspelt_is_refused(document: Any) -> None:
    paths = keys(document)
    assert len(paths) > 80
    taken = [path for path in paths if not refused(document, renaming(path, f"{path.rpartition('.')[2]}x"))]
    assert not taken
