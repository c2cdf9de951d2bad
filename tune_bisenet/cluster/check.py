"""Say what is wrong with a cluster file before it costs money.

    python -m tune_bisenet.cluster.check cluster/gpu.yaml

Ray itself checks the shape of a file for `ray up`, and botocore that of an EC2 node. The rules below are about what
both accept although it opens a port, gives out rights, keeps costing money or brings another version. No cloud is
asked.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import botocore.session
import click
import jsonschema
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT: Final = Path(__file__).parents[2]
PLACEHOLDER: Final = re.compile(r"(?<![A-Z])EDIT(?![A-Z])")
TOKEN: Final = "~/.ray/auth_token"
RESOURCES: Final = {"cpu": "CPU", "gpu": "GPU", "memory": "memory", "object_store_memory": "object_store_memory"}
NOT_TO_MOUNT: Final = (".git", ".venv", ".uv", "results", "leftImg8bit")

REPLACED: Final = {
    "setup_commands": "Ray's default installs a nightly Ray",
    "head_start_ray_commands": "Ray's default opens the dashboard to everyone",
    "worker_start_ray_commands": "Ray's default uses no token",
    "idle_timeout_minutes": "it says how long an idle node is paid for",
    "max_workers": "it is the upper bound of the bill",
}
START_FLAGS: Final = {
    "head_start_ray_commands": ("--head", "--dashboard-host=127.0.0.1", "--autoscaling-config="),
    "worker_start_ray_commands": ("--address=$RAY_HEAD_IP:",),
}
Rules = Mapping[str, tuple[object, str]]
"""By the path of a key, the value that it must have, and why."""

SPOT: Final = {"aws": ("InstanceMarketOptions.MarketType", "spot"), "gcp": ("scheduling.provisioningModel", "SPOT")}
NO_SPARE_DISKS: Final[Rules] = {
    "cache_stopped_nodes": (False, "spot nodes cannot be stopped, and kept disks cost money")
}
EC2_NODE: Final[Rules] = {
    "MetadataOptions.HttpTokens": ("required", "or any page that a node fetches can read its keys")
}
EC2_DISK: Final[Rules] = {
    "Encrypted": (True, "frames and weights are on it"),
    "DeleteOnTermination": (True, "or it is paid for after its machine has gone"),
}
GCP_DISK: Final[Rules] = {"autoDelete": (True, "or it is paid for after its machine has gone")}
GCP_GPU: Final[Rules] = {"scheduling.onHostMaintenance": ("TERMINATE", "a machine with a GPU cannot be moved")}
RAY_JOB: Final[Rules] = {"shutdownAfterJobFinishes": (True, "or the pods are paid for after the search")}
RAY_CLUSTER: Final[Rules] = {
    "authOptions.mode": ("token", "or every pod that reaches a port can run code"),
    "enableInTreeAutoscaling": (True, "or no worker comes or goes"),
    "headGroupSpec.serviceType": ("ClusterIP", "`kubectl port-forward` reaches it"),
    "headGroupSpec.rayStartParams.num-cpus": ("0", "trials run on workers, since the driver must outlive them"),
    "headGroupSpec.rayStartParams.num-gpus": ("0", "trials run on workers, since the driver must outlive them"),
}
CONTAINER_SECURITY: Final[Rules] = {
    "runAsNonRoot": (True, "a job runs what its user sends"),
    "allowPrivilegeEscalation": (False, "a job runs what its user sends"),
}
AWS_IDS: Final = {"ImageId": "ami-", "SubnetIds": "subnet-", "SecurityGroupIds": "sg-"}
GPU_MACHINES: Final = ("g2-", "g4-", "a2-", "a3-")
"""Compute Engine's machines that have GPUs of their own."""

Problems = Iterator[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Print all problems of the given files. Return 0 if there are none, else 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.cluster.check",
        description="Say what is wrong with files for `ray up` or KubeRay, and what is still to be filled in. Run it "
        "in the folder in which you run `ray up`. No cloud is asked.",
        epilog="exit codes: 0 nothing is wrong; 2 something is",
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    files = parser.parse_args(argv).files
    problems = [f"{name}: {problem}" for name in files for problem in check(Path(name))]
    summary = f"{len(problems)} to fix." if problems else "Nothing is wrong."
    sys.stdout.write("".join(f"{line}\n" for line in [*problems, summary]))
    return 2 if problems else 0


def check(path: Path) -> Problems:
    """Yield a sentence for each problem of a file."""
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        yield f"cannot be read: {error}"
        return
    if not documents or not all(isinstance(document, dict) for document in documents):
        yield "is neither a file for `ray up` nor a Kubernetes manifest: it has no keys."
        return
    for document in documents:
        # What `metadata` defines for use further down is reported there alone.
        defined = {text for _, text in _strings(document.get("metadata"))}
        for where, text in _strings(document):
            if PLACEHOLDER.search(text) and (where.startswith("metadata") or text not in defined):
                yield f"{where}: `{text}` is still to be filled in."
        rules = _kuberay if "apiVersion" in document else _launcher
        try:
            yield from rules(document)
        except (AttributeError, KeyError, TypeError) as error:
            yield f"{document.get('kind', 'the file')} does not have the expected keys ({error!r})."


def _strings(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a tree of mappings and lists, after its path."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{index}]")


def _wrong(where: str, document: Mapping[str, Any], rules: Rules) -> Problems:
    """Yield a sentence for each key whose value is not what the rules want."""
    for path, (wanted, reason) in rules.items():
        if _value(document, path) != wanted:
            yield f"{where}.{path}: must be {json.dumps(wanted)}; {reason}."


def _value(document: Any, path: str) -> Any:
    """Return what is at a path such as `authOptions.mode`; None if nothing is."""
    for key in path.split("."):
        document = (document or {}).get(key)
    return document


# --- versions -------------------------------------------------------------------------------------------------------

_IMAGE: Final = re.compile(r"(?P<name>[^:@]+)(?::(?P<tag>[\w.-]+))?(?P<digest>@sha256:[0-9a-f]{64})?")
_MOVING: Final = re.compile(r"nightly|ray-wheels|\blatest\b|\.dev\d", re.IGNORECASE)
_RAY: Final = re.compile(r"\bray(?:\[[\w,]+\])?\s*(?P<version>[=<>!~]=?\s*[\w.*]+)")


def locked_ray() -> str:
    """Return the version of Ray in requirements.lock."""
    match = re.search(r"^ray==(\S+)", (PROJECT / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert match, "requirements.lock has no Ray"
    return match[1]


def check_image(where: str, image: str) -> Problems:
    """Yield what could bring other versions with a container's image than requirements.lock has."""
    parts = _IMAGE.fullmatch(image)
    tag = parts["tag"] or "" if parts else ""
    if parts is None or (not parts["digest"] and (not tag or _MOVING.search(tag))):
        yield f"{where}: {image} can be another image tomorrow. Give it a fixed tag, or a digest."
    elif parts["name"].endswith("rayproject/ray") and not re.match(rf"{re.escape(locked_ray())}-py31[1-3]\b", tag):
        yield f"{where}: {image} needs Ray {locked_ray()} and Python 3.11 to 3.13, as in {locked_ray()}-py311-cu128."


def _check_command(where: str, command: str) -> Problems:
    if _MOVING.search(command):
        yield f"{where}: `{command}` can bring another version tomorrow."
    for install in re.findall(r"\bpip3?\s+install\b[^;&|]*", command):
        if "--require-hashes" not in install:
            yield f"{where}: `{install.strip()}` is not locked. Use --require-hashes and a file of hashes."
    for match in _RAY.finditer(command):
        if match["version"].replace(" ", "") != f"=={locked_ray()}":
            yield f"{where}: `{match[0]}` is another Ray than that of requirements.lock, {locked_ray()}."
    if re.search(r"0\.0\.0\.0|\[?::\]?(?=\s|$)|--bind_all", command):
        yield f"{where}: `{command}` listens to everyone. Bind it to 127.0.0.1, and reach it through a tunnel."


# --- files for `ray up` ---------------------------------------------------------------------------------------------


def _launcher(config: Mapping[str, Any]) -> Problems:
    if refusal := ray_refusal(config):
        yield f"Ray refuses it: {refusal}"
        return
    kind = config["provider"]["type"]
    node_types = config.get("available_node_types") or {}
    for key in config["provider"]:
        if key.endswith("_credentials"):
            yield f"provider.{key}: this file is copied to the head, so it must not have keys in it. Use roles."
    for key, reason in REPLACED.items():
        if not config.get(key) and (kind != "local" or key.endswith("commands")):
            yield f"{key} is missing; {reason}."
    yield from _node_types(node_types, head=config.get("head_node_type"), kind=kind)
    yield from _commands(config)
    yield from _mounts(config)
    docker = config.get("docker") or {}
    for key in ("image", "head_image", "worker_image"):
        if key in docker:
            yield from check_image(f"docker.{key}", docker[key])
    if docker and not re.search(r"RAY_AUTH_MODE=token\b", " ".join(docker.get("run_options") or [])):
        yield "docker.run_options: add `-e RAY_AUTH_MODE=token`, or Ray in the containers uses no token."
    if kind in SPOT:
        check_node = {"aws": _aws_node, "gcp": _gcp_node}[kind]
        for name, node_type in node_types.items():
            yield from check_node(f"available_node_types.{name}.node_config", node_type["node_config"])
        yield from _spot(config, kind)
    elif kind != "local":
        yield f"provider.type: {kind} is not supported; use aws, gcp or local."


def ray_refusal(config: Mapping[str, Any]) -> str:
    """Return why `ray up` would refuse a file; empty if it would not. Ray's modules for this are private."""
    output = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            validate_config(prepare_config(copy.deepcopy(dict(config))))
    except jsonschema.ValidationError as error:
        return f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {error.message}"
    except (click.ClickException, SystemExit) as error:
        return output.getvalue().strip() or str(error)
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _node_types(node_types: Mapping[str, Any], *, head: str | None, kind: str) -> Problems:
    if not node_types and kind != "local":
        yield "available_node_types is missing."
    for name, node_type in node_types.items():
        resources, where = node_type["resources"], f"available_node_types.{name}.resources"
        for resource in resources:
            if resource != RESOURCES.get(resource.lower(), resource):
                yield f"{where}.{resource}: write {RESOURCES[resource.lower()]}, or no trial ever runs there."
        if name == head and not resources.get("CPU") == resources.get("GPU") == 0:
            yield f"{where}: the head needs {{CPU: 0, GPU: 0}}, or trials run beside the driver and can end it."


def _commands(config: Mapping[str, Any]) -> Problems:
    for key in (key for key in config if key.endswith("_commands")):
        for where, command in _strings(config[key], key):
            yield from _check_command(where, command)
    setup = " ".join(config.get("setup_commands") or [])
    if setup and not re.search(r"cluster/setup\.sh|make\b.*\bsetup|--require-hashes\b.*requirements\.lock", setup):
        yield "setup_commands: nothing installs requirements.lock. `bash ~/tune_bisenet/cluster/setup.sh` does."
    for key, flags in START_FLAGS.items():
        starts = [command for command in config.get(key) or [] if "ray start" in command]
        for start in starts:
            yield from (f"{key}: `ray start` needs {flag}" for flag in flags if flag not in start)
            if not re.search(r"RAY_AUTH_MODE=['\"]?token\b.*ray start", start, flags=re.DOTALL):
                yield f"{key}: without RAY_AUTH_MODE=token, whoever reaches a port of Ray can run code."


def _mounts(config: Mapping[str, Any]) -> Problems:
    mounts, setup = config.get("file_mounts") or {}, " ".join(config.get("setup_commands") or [])
    if TOKEN not in mounts:
        yield f"file_mounts: the token is missing. Add `{TOKEN}: {TOKEN}`."
    elif not re.search(r"chmod [0-7]*600 \S*\.ray/auth_token", setup):
        yield f"setup_commands: other users of a node can read the token. Add `chmod 600 {TOKEN}`."
    for remote, local in mounts.items():
        path = Path(local).expanduser()
        if not path.exists():
            hint = "`ray get-auth-token --generate` makes it." if remote == TOKEN else "Is this the project's folder?"
            yield f"file_mounts: there is no {local}. {hint}"
        if unwanted := [name for name in NOT_TO_MOUNT if (path / name).exists()]:
            yield f"file_mounts: {local} has {', '.join(unwanted)} in it, and Ray sends all of it. Mount less."


@functools.cache
def _ec2_launch() -> Any:
    """Return botocore's description of a launch."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _aws_node(where: str, node: Mapping[str, Any]) -> Problems:
    launch = _ec2_launch()
    request = {key: value for key, value in node.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, launch)
    if report.has_errors():
        yield from (f"{where}: {line}" for line in report.generate_report().splitlines())
        return
    if node.get("InstanceType") not in launch.members["InstanceType"].enum:
        yield f"{where}.InstanceType: EC2 has no {node.get('InstanceType')}."
        return
    for key, prefix in AWS_IDS.items():
        ids = [node[key]] if isinstance(node.get(key), str) else node.get(key)
        if not ids or not all(id_.startswith(prefix) for id_ in ids):
            yield f"{where}.{key}: give your own ({prefix}…). What Ray chooses is old, or open to everyone."
    if not node.get("IamInstanceProfile"):
        yield f"{where}.IamInstanceProfile: is missing. Ray would give a head all rights over EC2 and S3."
    yield from _wrong(where, node, EC2_NODE)
    disks = [disk["Ebs"] for disk in node.get("BlockDeviceMappings") or [] if "Ebs" in disk]
    for disk in disks or [{}]:
        yield from _wrong(f"{where}.BlockDeviceMappings.Ebs", disk, EC2_DISK)


def _gcp_node(where: str, node: Mapping[str, Any]) -> Problems:
    if node.get("guestAccelerators") or str(node.get("machineType")).startswith(GPU_MACHINES):
        yield from _wrong(where, node, GCP_GPU)
    for disk in [disk for disk in node.get("disks") or [] if disk.get("boot")] or [{}]:
        yield from _wrong(f"{where}.disks", disk, GCP_DISK)
        image = (disk.get("initializeParams") or {}).get("sourceImage", "")
        if not image or "/images/family/" in image:
            yield f"{where}.disks: {image or 'no image'} can be another image tomorrow. Name one image of the family."
    if not node.get("serviceAccounts"):
        yield f"{where}.serviceAccounts: is missing. Ray would give a head all rights over Compute Engine."


def _spot(config: Mapping[str, Any], cloud: str) -> Problems:
    path, spot = SPOT[cloud]
    types = {name for name, kind in config["available_node_types"].items() if _value(kind["node_config"], path) == spot}
    if types and cloud == "aws":
        yield from _wrong("provider", config["provider"], NO_SPARE_DISKS)
    if config["head_node_type"] in types:
        yield "head_node_type: a head on spot takes the whole cluster with it when it goes."
    watcher = f"tune_bisenet.cluster.daemons spot --cloud {cloud}"
    if types and not any(watcher in command for command in config.get("worker_start_ray_commands") or []):
        yield (
            f"worker_start_ray_commands: `python -m {watcher}` is not started, so a lost node counts as a failure of "
            "its trials."
        )


# --- KubeRay's manifests --------------------------------------------------------------------------------------------


def _kuberay(document: Mapping[str, Any]) -> Problems:
    """Check values. Keys that are misspelt are refused by the API server: `kubectl apply` validates strictly."""
    kind, spec = document.get("kind"), document["spec"]
    if kind == "RayCluster":
        yield from _ray_cluster("RayCluster.spec", spec)
    elif kind == "RayJob":
        yield from _wrong("RayJob.spec", spec, RAY_JOB)
        if spec.get("backoffLimit") and not re.search(r"search\.sh|--resume", spec["entrypoint"]):
            yield "RayJob.spec.entrypoint: a retry must resume the search, as `bash cluster/search.sh` does."
        yield from _ray_cluster("RayJob.spec.rayClusterSpec", spec["rayClusterSpec"])
    else:
        yield f"kind {kind} is not supported; use RayCluster or RayJob."


def _ray_cluster(where: str, cluster: Mapping[str, Any]) -> Problems:
    if cluster.get("rayVersion") != locked_ray():
        yield f"{where}.rayVersion: {cluster.get('rayVersion')} is not that of requirements.lock, {locked_ray()}."
    yield from _wrong(where, cluster, RAY_CLUSTER)
    yield from _pod(f"{where}.headGroupSpec", cluster["headGroupSpec"]["template"]["spec"])
    for group in cluster["workerGroupSpecs"]:
        group_where, pod = f"{where}.workerGroupSpecs.{group.get('groupName')}", group["template"]["spec"]
        if "maxReplicas" not in group:
            yield f"{group_where}.maxReplicas: is missing; it is the upper bound of the bill."
        if not any("nvidia.com/gpu" in _limits(container) for container in pod["containers"]):
            yield f"{group_where}: no container has a limit of nvidia.com/gpu."
        yield from _pod(group_where, pod)


def _pod(where: str, pod: Mapping[str, Any]) -> Problems:
    for container in [*(pod.get("initContainers") or []), *pod["containers"]]:
        container_where = f"{where}.{container['name']}"
        security = (pod.get("securityContext") or {}) | (container.get("securityContext") or {})
        yield from _wrong(f"{container_where}.securityContext", security, CONTAINER_SECURITY)
        if missing := {"cpu", "memory", "ephemeral-storage"} - _limits(container).keys():
            yield f"{container_where}: has no limit of {', '.join(sorted(missing))}."
        yield from check_image(container_where, container["image"])


def _limits(container: Mapping[str, Any]) -> Mapping[str, Any]:
    return (container.get("resources") or {}).get("limits") or {}


if __name__ == "__main__":
    sys.exit(main())
