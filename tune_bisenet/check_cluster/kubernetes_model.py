"""KubeRay's RayCluster and RayJob (ray.io/v1), and what a pod of theirs may have: every key known, no other taken.

A subset of the definitions that Kubernetes and KubeRay 1.6 publish: what a cluster of ours has a use for. The API
server silently drops a key it does not know; here it is refused.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)]


class Strict(BaseModel):
    """camelCase keys, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Name | None = None
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Resources(Strict):
    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}


class Capabilities(Strict):
    add: list[str] = []
    drop: list[str] = []


class Seccomp(Strict):
    type: Literal["RuntimeDefault", "Unconfined", "Localhost"]
    localhost_profile: str | None = None


class ContainerSecurity(Strict):
    allow_privilege_escalation: bool | None = None
    capabilities: Capabilities | None = None
    privileged: bool | None = None
    read_only_root_filesystem: bool | None = None
    run_as_non_root: bool | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    seccomp_profile: Seccomp | None = None


class PodSecurity(Strict):
    run_as_non_root: bool | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    fs_group: int | None = None
    seccomp_profile: Seccomp | None = None


class KeyOf(Strict):
    name: str
    key: str
    optional: bool | None = None


class EnvSource(Strict):
    secret_key_ref: KeyOf | None = None
    config_map_key_ref: KeyOf | None = None


class Env(Strict):
    name: str
    value: str | None = None
    value_from: EnvSource | None = None


class Port(Strict):
    name: Name
    container_port: int
    protocol: Literal["TCP", "UDP"] | None = None


class VolumeMount(Strict):
    name: Name
    mount_path: str
    sub_path: str | None = None
    read_only: bool | None = None


class Container(Strict):
    name: Name
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    command: list[str] = []
    args: list[str] = []
    env: list[Env] = []
    ports: list[Port] = []
    resources: Resources = Resources()
    security_context: ContainerSecurity = ContainerSecurity()
    volume_mounts: list[VolumeMount] = []


class EmptyDir(Strict):
    medium: Literal["", "Memory"] | None = None
    size_limit: Quantity | None = None


class Claim(Strict):
    claim_name: Name
    read_only: bool | None = None


class SecretVolume(Strict):
    secret_name: Name
    default_mode: int | None = None
    optional: bool | None = None


class Volume(Strict):
    name: Name
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None
    secret: SecretVolume | None = None


class Toleration(Strict):
    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class LocalName(Strict):
    name: str


class PodSpec(Strict):
    service_account_name: Name | None = None
    automount_service_account_token: bool | None = None
    restart_policy: Literal["Always", "OnFailure", "Never"] | None = None
    termination_grace_period_seconds: int | None = None
    priority_class_name: str | None = None
    runtime_class_name: str | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    image_pull_secrets: list[LocalName] = []
    security_context: PodSecurity = PodSecurity()
    init_containers: list[Container] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []


class PodTemplate(Strict):
    metadata: Metadata = Metadata()
    spec: PodSpec


class HeadGroup(Strict):
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enable_ingress: bool | None = None
    ray_start_params: dict[str, str] = {}
    template: PodTemplate


class WorkerGroup(Strict):
    group_name: str
    replicas: Annotated[int, Field(ge=0)] | None = None
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=0)]
    num_of_hosts: Annotated[int, Field(ge=1)] | None = None
    idle_timeout_seconds: Annotated[int, Field(ge=0)] | None = None
    ray_start_params: dict[str, str] = {}
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"] | None = None
    secret_name: Name | None = None


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    idle_timeout_seconds: Annotated[int, Field(ge=0)] | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    env: list[Env] = []
    resources: Resources | None = None
    security_context: ContainerSecurity | None = None


class RayClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions = AuthOptions()
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup] = []
    suspend: bool | None = None


class SubmitterConfig(Strict):
    backoff_limit: Annotated[int, Field(ge=0)] | None = None


class RayJobSpec(Strict):
    entrypoint: str
    active_deadline_seconds: Annotated[int, Field(gt=0)] | None = None
    backoff_limit: Annotated[int, Field(ge=0)] | None = None
    job_id: str | None = None
    metadata: dict[str, str] = {}
    runtime_env_yaml: Annotated[str | None, Field(alias="runtimeEnvYAML")] = None
    shutdown_after_job_finishes: bool | None = None
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] | None = None
    submitter_config: SubmitterConfig | None = None
    submitter_pod_template: PodTemplate | None = None
    suspend: bool | None = None
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    ray_cluster_spec: RayClusterSpec


class RayCluster(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
