"""Rules for what EC2 is asked for. Keys and values are those of EC2's own description in botocore; no call is made."""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import botocore.session
from botocore.model import ListShape, Shape, StructureShape

from tune_bisenet.check_cluster import node_types
from tune_bisenet.check_cluster.reading import PLACEHOLDER, Document

RAYS_OWN: Final = ("SubnetIds",)
"""Keys that Ray takes apart before it calls EC2."""

SET_BY_RAY: Final = ("MinCount", "MaxCount", "SubnetId")

IDS: Final = {"ImageId": "ami", "SubnetIds": "subnet", "SecurityGroupIds": "sg"}

MAX_HOPS: Final = 2
"""One to the machine, and one more into a container on it."""


def problems(config: Document) -> Iterator[str]:
    """Everything wrong with the AWS part of a file for `ray up`."""
    regions, launch = _ec2()
    if (region := str(config["provider"].get("region"))) not in regions:
        yield f"provider.region: there is no region {region}{_meant(region, regions)}."
    yield from node_types.problems(
        config, lambda node, place: _unlike_ec2(node, launch, place), rules=(_ids, _closed), of_all=_spot
    )


@cache
def _ec2() -> tuple[list[str], StructureShape]:
    """The regions, and what RunInstances takes."""
    session = botocore.session.get_session()
    launch = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    assert launch is not None
    return session.get_available_regions("ec2"), launch


def _unlike_ec2(value: Any, shape: Shape, place: str) -> Iterator[str]:
    """Keys that EC2 does not know, values that are none of those it allows, a list where it wants one thing."""
    if isinstance(shape, StructureShape):
        if not isinstance(value, dict):
            yield f"{place}: EC2 wants keys and values here."
            return
        for key, inner in value.items():
            if key in SET_BY_RAY:
                yield f"{place}.{key}: Ray sets it itself. Leave it out."
            elif key in shape.members:
                yield from _unlike_ec2(inner, shape.members[key], f"{place}.{key}")
            elif key not in RAYS_OWN:
                yield f"{place}.{key}: EC2 knows no such key{_meant(key, [*shape.members, *RAYS_OWN])}."
    elif isinstance(shape, ListShape):
        if not isinstance(value, list):
            yield f"{place}: EC2 wants a list here."
            return
        for number, inner in enumerate(value):
            yield from _unlike_ec2(inner, shape.member, f"{place}[{number}]")
    else:
        yield from _unlike_scalar(value, shape, place)


def _unlike_scalar(value: Any, shape: Shape, place: str) -> Iterator[str]:
    wanted = {"integer": int, "long": int, "boolean": bool, "string": str}.get(shape.type_name, object)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        yield f"{place}: EC2 wants a {shape.type_name} here, not {value!r}."
    elif (allowed := getattr(shape, "enum", ())) and value not in allowed:
        yield f"{place}: there is no {value}{_meant(str(value), allowed)}."


def _meant(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _ids(node: dict[str, Any], place: str) -> Iterator[str]:
    """Left out, Ray takes an image too old for today's CUDA, any subnet, and a group open to everyone."""
    for key, prefix in IDS.items():
        given = node.get(key) or []
        for one in given if isinstance(given, list) else [given]:
            if PLACEHOLDER not in one and not re.fullmatch(rf"{prefix}-[0-9a-f]{{8}}(?:[0-9a-f]{{9}})?", one):
                yield f"{place}.{key}: {one} is no id of the form {prefix}-0123456789abcdef0."
        if not given:
            yield f"{place}.{key}: left out, and Ray's own choice is not safe. Name yours."
    if not node.get("IamInstanceProfile"):
        yield f"{place}.IamInstanceProfile: left out. A head would get all rights over EC2 and S3, a worker none."
    if "InstanceType" not in node:
        yield f"{place}.InstanceType: left out."


def _closed(node: dict[str, Any], place: str) -> Iterator[str]:
    options = node.get("MetadataOptions") or {}
    if options.get("HttpTokens") != "required":
        yield f"{place}.MetadataOptions: needs HttpTokens: required, or any page that a node fetches can read its keys."
    if options.get("HttpPutResponseHopLimit", MAX_HOPS + 1) > MAX_HOPS:
        yield f"{place}.MetadataOptions: needs HttpPutResponseHopLimit: {MAX_HOPS}, or less."
    disks = [disk["Ebs"] for disk in node.get("BlockDeviceMappings") or [] if isinstance(disk.get("Ebs"), dict)]
    if not disks:
        yield f"{place}.BlockDeviceMappings: left out; the image's own disk is small, and may not be encrypted."
    if any(disk.get("Encrypted") is not True for disk in disks):
        yield f"{place}.BlockDeviceMappings: every Ebs needs Encrypted: true."
    if any(disk.get("DeleteOnTermination") is not True for disk in disks):
        yield f"{place}.BlockDeviceMappings: every Ebs needs DeleteOnTermination: true, or it is paid for ever after."


def _spot(config: Document) -> Iterator[str]:
    head = config["head_node_type"]
    is_spot = {
        name: node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        for name, node_type in config["available_node_types"].items()
    }
    if is_spot[head]:
        yield f"available_node_types.{head}: a head on spot takes the whole cluster with it when it goes."
    if not any(is_spot.values()):
        return
    if config["provider"].get("cache_stopped_nodes", True):
        yield "provider.cache_stopped_nodes: must be false. Spot nodes cannot be stopped, and stopped disks cost money."
    yield from node_types.unwatched(config, "aws")
