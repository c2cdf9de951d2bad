"""Rules for every file of `ray up`: what Ray's own check passes over."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tune_bisenet.check_cluster import aws, gcp, pins, ray_schema
from tune_bisenet.check_cluster.reading import Document, strings

TOKEN: Final = "~/.ray/auth_token"
RESOURCES: Final = ("CPU", "GPU", "memory", "object_store_memory")
COMMAND_LISTS: Final = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
NOT_TO_MOUNT: Final = (".git", ".venv", ".uv", "results", "leftImg8bit")
REPLACED: Final = {
    "setup_commands": "Ray's own would bring a nightly Ray",
    "head_start_ray_commands": "Ray's own open the dashboard to everyone",
    "worker_start_ray_commands": "Ray's own know of no token",
    "idle_timeout_minutes": "say how long an idle node is paid for",
}


def problems(config: Document) -> Iterator[str]:
    """Everything wrong with a file for `ray up`."""
    try:
        prepared = ray_schema.prepared(config)
    except ValueError as error:
        yield f"Ray refuses it: {error}"
        return
    kind = config["provider"].get("type")
    yield from _provider(config["provider"])
    yield from _left_out(config, kind)
    if kind != "local" and "available_node_types" not in config:
        return
    for name, node_type in config.get("available_node_types", {}).items():
        yield from _node_type(name, node_type, is_head=name == config["head_node_type"])
    yield from _counts(prepared)
    yield from _commands(config)
    yield from _start_commands(config)
    yield from _mounts(config)
    yield from _docker(config.get("docker") or {})
    match kind:
        case "aws":
            yield from aws.problems(config)
        case "gcp":
            yield from gcp.problems(config)
        case "local":
            pass
        case _:
            yield f"provider.type: {kind} has no rules here; those for aws, gcp and local exist."


def _provider(provider: dict[str, Any]) -> Iterator[str]:
    known = ray_schema.provider_keys()
    for key in provider:
        if key.endswith("_credentials"):
            yield f"provider.{key}: no keys in a file that is copied to the head. Use profiles, or accounts."
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            yield f"provider.{key}: Ray knows no such key" + (f"; did you mean {close[0]}?" if close else ".")


def _left_out(config: Document, kind: str) -> Iterator[str]:
    for key, reason in REPLACED.items():
        if key == "idle_timeout_minutes" and kind == "local":
            continue  # machines that the user has are not given back
        if not config.get(key):
            yield f"{key}: left out, but {reason}."
    if kind != "local":
        for key in ("max_workers", "available_node_types"):
            if key not in config:
                yield f"{key}: left out."


def _node_type(name: str, node_type: dict[str, Any], *, is_head: bool) -> Iterator[str]:
    place = f"available_node_types.{name}"
    resources = node_type["resources"]
    for resource in resources:
        meant = difflib.get_close_matches(resource.lower(), [known.lower() for known in RESOURCES], n=1, cutoff=0.8)
        if meant and resource not in RESOURCES:
            known = next(known for known in RESOURCES if known.lower() == meant[0])
            yield f"{place}.resources.{resource}: write {known}, or nothing that asks for {known} is ever placed there."
    if is_head and any(resources.get(resource) != 0 for resource in ("CPU", "GPU")):
        yield f"{place}.resources: the head needs {{CPU: 0, GPU: 0}}, or trials run beside the driver and may end it."


def _counts(prepared: Document) -> Iterator[str]:
    if prepared["max_workers"] < 0:
        yield f"max_workers: {prepared['max_workers']} is negative."
    for name, node_type in prepared["available_node_types"].items():
        least, most = node_type["min_workers"], node_type["max_workers"]
        place = f"available_node_types.{name}"
        if least < 0 or most < 0:
            yield f"{place}: min_workers {least} and max_workers {most} must not be negative."
        if least > most:
            yield f"{place}: min_workers {least} is more than max_workers {most}."
        if most > prepared["max_workers"]:
            yield f"{place}: max_workers {most} is more than all types together may have, {prepared['max_workers']}."
    if not any(node_type["max_workers"] > 0 for node_type in prepared["available_node_types"].values()):
        yield "available_node_types: no type may have workers, so no trial would ever run."


def _commands(config: Document) -> Iterator[str]:
    for key in COMMAND_LISTS:
        for place, command in strings(config.get(key) or [], key):
            yield from pins.command_problems(place, command)
            if re.search(r"0\.0\.0\.0|\[?::\]?(?=\s|$)|--bind_all", command):
                yield f"{place}: `{command}` listens to everyone. Bind it to 127.0.0.1, and reach it by a tunnel."
    setup = " ".join(config.get("setup_commands") or [])
    if setup and not re.search(r"cluster/setup\.sh|make\b.*\bsetup|--require-hashes\b.*requirements\.lock", setup):
        yield "setup_commands: nothing installs requirements.lock. `bash ~/tune_bisenet/cluster/setup.sh` does."


def _start_commands(config: Document) -> Iterator[str]:
    wanted = {
        "head_start_ray_commands": ("--head", "--dashboard-host=127.0.0.1", "--autoscaling-config="),
        "worker_start_ray_commands": ("--address=$RAY_HEAD_IP:",),
    }
    for key, flags in wanted.items():
        starts = [command for command in config.get(key) or [] if "ray start" in command]
        if config.get(key) and not starts:
            yield f"{key}: nothing in it is `ray start`."
        for start in starts:
            yield from (f"{key}: `ray start` needs {flag}" for flag in flags if flag not in start)
            if not re.search(r"RAY_AUTH_MODE=['\"]?token\b.*ray start", start, flags=re.DOTALL):
                yield f"{key}: without RAY_AUTH_MODE=token before `ray start`, everyone who reaches a port runs code."


def _mounts(config: Document) -> Iterator[str]:
    mounts = config.get("file_mounts") or {}
    if TOKEN not in mounts:
        yield f"file_mounts: the token is left out. Add `{TOKEN}: {TOKEN}`."
    elif not any(
        re.search(rf"chmod [0-7]*600 \S*{re.escape('.ray/auth_token')}", c) for c in config.get("setup_commands") or []
    ):
        yield f"setup_commands: others on a node can read the token. Add `chmod 600 {TOKEN}`."
    for remote, local in mounts.items():
        path = Path(local).expanduser()
        if not path.exists():
            hint = "`ray get-auth-token --generate` makes it." if remote == TOKEN else "Is this the project's folder?"
            yield f"file_mounts: there is no {local}. {hint}"
        held = [name for name in NOT_TO_MOUNT if (path / name).exists()]
        if held:
            yield f"file_mounts: {local} holds {', '.join(held)}, and Ray sends all of it. Mount what set-up needs."


def _docker(docker: dict[str, Any]) -> Iterator[str]:
    if not docker:
        return
    for key in ("image", "head_image", "worker_image"):
        if key in docker:
            yield from pins.image_problems(f"docker.{key}", docker[key])
    for kind in ("head", "worker"):
        options = " ".join([*docker.get("run_options", []), *docker.get(f"{kind}_run_options", [])])
        if not re.search(r"RAY_AUTH_MODE=token\b", options):
            yield f"docker.run_options: without `-e RAY_AUTH_MODE=token` nothing in a {kind}'s container uses a token."
