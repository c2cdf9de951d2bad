"""Rules for KubeRay's manifests: a strict parse, and what makes a cluster closed, locked and cheap."""

from collections.abc import Iterator, Sequence
from typing import Final

from pydantic import ValidationError

from tune_bisenet.check_cluster import pins
from tune_bisenet.check_cluster.kubernetes_model import Container, PodTemplate, RayCluster, RayClusterSpec, RayJob
from tune_bisenet.check_cluster.reading import PLACEHOLDER, Document

KINDS: Final[dict[str, type[RayCluster] | type[RayJob]]] = {"RayCluster": RayCluster, "RayJob": RayJob}

GPU: Final = "nvidia.com/gpu"

LIMITS: Final = ("cpu", "memory", "ephemeral-storage")


def problems(documents: Sequence[Document]) -> Iterator[str]:
    """Everything wrong with the manifests of one file."""
    for document in documents:
        kind = document.get("kind")
        model = KINDS.get(str(kind))
        if model is None:
            yield f"kind {kind} is not known here; RayCluster and RayJob are."
            continue
        try:
            manifest = model.model_validate(document)
        except ValidationError as error:
            for detail in error.errors():
                yield f"{kind}.{'.'.join(map(str, detail['loc']))}: {detail['msg']}."
            continue
        if isinstance(manifest, RayJob):
            yield from _job(manifest)
            yield from _cluster("RayJob.spec.rayClusterSpec", manifest.spec.ray_cluster_spec)
        else:
            yield from _cluster("RayCluster.spec", manifest.spec)


def _job(job: RayJob) -> Iterator[str]:
    if not job.spec.shutdown_after_job_finishes:
        yield "RayJob.spec.shutdownAfterJobFinishes: must be true, or the pods are paid for after the search."
    if job.spec.backoff_limit and "search.sh" not in job.spec.entrypoint and "--resume" not in job.spec.entrypoint:
        yield "RayJob.spec.entrypoint: a retry finds the search begun. `bash cluster/search.sh` goes on with it."


def _cluster(place: str, cluster: RayClusterSpec) -> Iterator[str]:
    head, workers = cluster.head_group_spec, cluster.worker_group_specs
    if cluster.ray_version != pins.locked("ray"):
        yield f"{place}.rayVersion: {cluster.ray_version} is not requirements.lock's {pins.locked('ray')}."
    if cluster.auth_options.mode != "token":
        yield f"{place}.authOptions: needs mode: token, or every pod that reaches a port runs code here."
    if not cluster.enable_in_tree_autoscaling:
        yield f"{place}.enableInTreeAutoscaling: must be true, or no worker comes or goes."
    if head.service_type != "ClusterIP" or head.enable_ingress:
        yield f"{place}.headGroupSpec: needs serviceType: ClusterIP and no ingress; `kubectl port-forward` leads there."
    for resource in ("num-cpus", "num-gpus"):
        if head.ray_start_params.get(resource) != "0":
            yield f'{place}.headGroupSpec.rayStartParams: needs {resource}: "0", or trials run beside the driver.'
    yield from _pod(f"{place}.headGroupSpec", head.template)
    if not workers:
        yield f"{place}.workerGroupSpecs: none, so no trial would ever run."
    for group in workers:
        at = f"{place}.workerGroupSpecs.{group.group_name}"
        if not group.min_replicas <= (group.replicas or 0) <= group.max_replicas:
            yield f"{at}: replicas must lie between minReplicas and maxReplicas."
        yield from _pod(at, group.template)
        yield from _gpu(at, group.template)


def _pod(place: str, template: PodTemplate) -> Iterator[str]:
    pod = template.spec
    for container in (*pod.init_containers, *pod.containers):
        at = f"{place}.{container.name}"
        user = container.security_context.run_as_user or pod.security_context.run_as_user
        if not (container.security_context.run_as_non_root or pod.security_context.run_as_non_root) or not user:
            yield f"{at}: needs runAsNonRoot: true and a runAsUser that is not 0."
        if container.security_context.allow_privilege_escalation is not False or container.security_context.privileged:
            yield f"{at}: needs allowPrivilegeEscalation: false, and must not be privileged."
        for limit in LIMITS:
            if limit not in container.resources.limits:
                yield f"{at}: has no limit of {limit}."
        if PLACEHOLDER not in container.image.partition("/")[0]:
            yield from pins.image_problems(at, container.image)
        if f"ray{pins.locked('ray')}" not in container.image and "rayproject/ray:" not in container.image:
            yield f"{at}: the tag of {container.image} must say its Ray, as in 0.1.0-ray{pins.locked('ray')}."
    mounted = {mount.name for container in pod.containers for mount in container.volume_mounts}
    missing = mounted - {volume.name for volume in pod.volumes}
    if missing:
        yield f"{place}: there is no volume {', '.join(sorted(missing))}."


def _gpu(place: str, template: PodTemplate) -> Iterator[str]:
    pod = template.spec
    if not any(_gpus(container) for container in pod.containers):
        yield f"{place}: no container has a limit of {GPU}."
        return
    if not pod.node_selector:
        yield f"{place}: needs a nodeSelector that finds nodes with GPUs."
    if not any(toleration.key == GPU or toleration.key is None for toleration in pod.tolerations):
        yield f"{place}: needs a toleration of {GPU}; nodes with GPUs are usually kept free by that taint."


def _gpus(container: Container) -> int:
    return int(container.resources.limits.get(GPU, "0"))
