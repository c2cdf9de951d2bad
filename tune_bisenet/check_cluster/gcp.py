"""Rules for what Compute Engine is asked for. No package of ours describes its API: the keys are here."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tune_bisenet.check_cluster import node_types
from tune_bisenet.check_cluster.reading import PLACEHOLDER, Document

ANY: Final[Mapping[str, Any]] = {}
"""Keys below are the user's own, as labels are."""

INSTANCE: Final[Mapping[str, Any]] = {
    "machineType": str,
    "minCpuPlatform": str,
    "description": str,
    "labels": ANY,
    "tags": {"items": [str]},
    "metadata": {"items": [{"key": str, "value": str}]},
    "deletionProtection": bool,
    "disks": [
        {
            "boot": bool,
            "autoDelete": bool,
            "type": str,
            "mode": str,
            "interface": str,
            "deviceName": str,
            "initializeParams": {"diskSizeGb": int, "sourceImage": str, "diskType": str, "labels": ANY},
            "diskEncryptionKey": {"kmsKeyName": str, "kmsKeyServiceAccount": str},
        }
    ],
    "guestAccelerators": [{"acceleratorType": str, "acceleratorCount": int}],
    "networkInterfaces": [
        {
            "network": str,
            "subnetwork": str,
            "nicType": str,
            "stackType": str,
            "accessConfigs": [{"name": str, "type": str, "networkTier": str}],
        }
    ],
    "scheduling": {
        "provisioningModel": str,
        "instanceTerminationAction": str,
        "onHostMaintenance": str,
        "automaticRestart": bool,
        "preemptible": bool,
        "maxRunDuration": {"seconds": int},
    },
    "serviceAccounts": [{"email": str, "scopes": [str]}],
    "shieldedInstanceConfig": {"enableSecureBoot": bool, "enableVtpm": bool, "enableIntegrityMonitoring": bool},
}
"""What `instances.insert` takes, as far as a cluster of ours has a use for it."""

MACHINES: Final = re.compile(r"[a-z]\d+[a-z]?-[a-z]+(?:-\d+g?)?(?:-lssd)?|custom-\d+-\d+")
VALUES: Final = {
    "provisioningModel": ("SPOT", "STANDARD"),
    "instanceTerminationAction": ("DELETE", "STOP"),
    "onHostMaintenance": ("TERMINATE", "MIGRATE"),
}


def problems(config: Document) -> Iterator[str]:
    """Everything wrong with the Google Cloud part of a file for `ray up`."""
    provider = config["provider"]
    for key in ("project_id", "region", "availability_zone"):
        if not provider.get(key):
            yield f"provider.{key}: left out."
    if not str(provider.get("availability_zone")).startswith(f"{provider.get('region')}-"):
        yield f"provider.availability_zone: {provider.get('availability_zone')} is not in {provider.get('region')}."
    yield from node_types.problems(
        config, lambda node, place: _unlike(node, INSTANCE, place), rules=(_machine, _closed), of_all=_spot
    )


def _unlike(value: Any, wanted: Any, place: str) -> Iterator[str]:
    """Keys that Compute Engine does not know, and values of another kind than it wants."""
    if isinstance(wanted, Mapping):
        if not isinstance(value, dict):
            yield f"{place}: keys and values are wanted here."
            return
        for key, inner in value.items() if wanted else ():
            if key in wanted:
                yield from _unlike(inner, wanted[key], f"{place}.{key}")
            else:
                close = difflib.get_close_matches(key, wanted, n=1)
                yield f"{place}.{key}: no such key is known here" + (f"; did you mean {close[0]}?" if close else ".")
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield f"{place}: a list is wanted here."
            return
        for number, inner in enumerate(value):
            yield from _unlike(inner, wanted[0], f"{place}[{number}]")
    elif type(value) is not wanted:
        yield f"{place}: a {wanted.__name__} is wanted here, not {value!r}."
    else:
        allowed = VALUES.get(place.rpartition(".")[2])
        if allowed and value not in allowed:
            yield f"{place}: there is no {value}; there are {' and '.join(allowed)}."


def _machine(node: dict[str, Any], place: str) -> Iterator[str]:
    machine = str(node.get("machineType", ""))
    if not MACHINES.fullmatch(machine):
        yield f"{place}.machineType: {machine or 'nothing'} is no type of machine, as in g2-standard-4."
    if machine.startswith("n1-") and not node.get("guestAccelerators"):
        return
    has_gpu = bool(node.get("guestAccelerators")) or machine.startswith(("g2-", "a2-", "a3-", "g4-"))
    if has_gpu and (node.get("scheduling") or {}).get("onHostMaintenance") != "TERMINATE":
        yield f"{place}.scheduling: a machine with a GPU cannot be moved, and needs onHostMaintenance: TERMINATE."


def _closed(node: dict[str, Any], place: str) -> Iterator[str]:
    disks = [disk for disk in node.get("disks") or [] if disk.get("boot")]
    if not disks:
        yield f"{place}.disks: no disk has boot: true."
    for disk in disks:
        image = disk.get("initializeParams", {}).get("sourceImage", "")
        if not image or "/images/family/" in image:
            yield f"{place}.disks: {image or 'no image'} can be another image tomorrow. Name one image of the family."
        if disk.get("autoDelete") is not True:
            yield f"{place}.disks: needs autoDelete: true, or the disk is paid for ever after."
    accounts = node.get("serviceAccounts") or []
    if not accounts:
        yield f"{place}.serviceAccounts: left out. A head would get all rights over Compute Engine, a worker none."
    for account in accounts:
        if PLACEHOLDER not in account.get("email", "") and "@" not in account.get("email", ""):
            yield f"{place}.serviceAccounts: {account.get('email')} is no address of an account."


def _spot(config: Document) -> Iterator[str]:
    is_spot = {
        name: (node_type["node_config"].get("scheduling") or {}).get("provisioningModel") == "SPOT"
        for name, node_type in config["available_node_types"].items()
    }
    if is_spot.get(config["head_node_type"]):
        yield f"available_node_types.{config['head_node_type']}: a head on spot takes the whole cluster with it."
    if any(is_spot.values()):
        yield from node_types.unwatched(config, "gcp")
