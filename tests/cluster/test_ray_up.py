"""`ray up cluster/gpu.yaml` against a mock EC2, up to the launched head: what it asks for, and nothing more."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from files import AMI, CLUSTER, GROUP, ROOT, SUBNET, filled_text
from mock_aws import MockAws, account, environment, mock_aws_server, ray

from tune_bisenet.check_cluster.__main__ import problems

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("home")]


@pytest.fixture
def aws() -> Iterator[MockAws]:
    with mock_aws_server() as server:
        yield server


@pytest.fixture
def cluster_file(aws: MockAws, tmp_path: Path) -> Path:
    """gpu.yaml, filled in with what is in the mock account."""
    has = account(aws)
    text = filled_text("gpu.yaml")
    for placeholder, name in ((AMI, "image"), (SUBNET, "subnet"), (GROUP, "group")):
        text = text.replace(placeholder, has[name])
    path = tmp_path / "gpu.yaml"
    path.write_text(text)
    return path


def up_to_the_launched_head(aws: MockAws, home: Path, cluster_file: Path) -> str:
    """Run `ray up` until it waits for SSH, then end it; what it said."""
    process = ray(aws, home, "up", "--yes", "--no-config-cache", str(cluster_file))
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "SSH still not available" in line:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return "".join(said)


@pytest.mark.timeout(900)
def test_ray_up_asks_for_a_closed_head_and_nothing_else_and_ray_down_takes_it_away(
    aws: MockAws, home: Path, cluster_file: Path
) -> None:
    assert not list(problems(cluster_file))
    said = up_to_the_launched_head(aws, home, cluster_file)
    assert "Launched a new head node" in said, said
    assert "SSH still not available" in said, said

    (call,) = aws.named("RunInstances")
    asked = {key: value for key, value in call.items() if not key.startswith(("TagSpecification", "ClientToken"))}
    has = account_of(cluster_file)
    assert asked.pop("KeyName").startswith("ray-autoscaler")
    assert asked == {
        "Action": "RunInstances",
        "Version": asked["Version"],
        "InstanceType": "m7i.xlarge",
        "ImageId": has["image"],
        "SubnetId": has["subnet"],
        "SecurityGroupId.1": has["group"],
        "IamInstanceProfile.Name": "tune-bisenet-head",
        "MetadataOptions.HttpTokens": "required",
        "MetadataOptions.HttpPutResponseHopLimit": "2",
        "MetadataOptions.HttpEndpoint": "enabled",
        "BlockDeviceMapping.1.DeviceName": "/dev/sda1",
        "BlockDeviceMapping.1.Ebs.VolumeSize": "80",
        "BlockDeviceMapping.1.Ebs.VolumeType": "gp3",
        "BlockDeviceMapping.1.Ebs.Encrypted": "true",
        "BlockDeviceMapping.1.Ebs.DeleteOnTermination": "true",
        "MinCount": "1",
        "MaxCount": "1",
    }
    forbidden = {"CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "CreateRole", "CreateInstanceProfile"}
    made_by_us = 1 + 1 + 2 + 2  # the account's own, before `ray up`
    assert sum(call["Action"] in forbidden for call in aws.calls) == made_by_us, "Ray made groups or roles of its own"

    process = ray(aws, home, "down", "--yes", str(cluster_file))
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert states_of_instances(aws) == ["terminated"]
    assert aws.client("ec2").describe_volumes()["Volumes"] == []
    ours = aws.calls[calls_of_the_account(aws) :]
    ours.remove(next(call for call in ours if call["Action"] == "DescribeVolumes"))  # this test's
    assert {call["Action"] for call in ours} <= allowed("laptop.json")


@pytest.mark.timeout(900)
def test_workers_are_asked_for_as_the_file_says_and_the_head_may_do_no_more_than_it_does(
    aws: MockAws, home: Path, cluster_file: Path
) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("launch_workers.py"), cluster_file],
        cwd=ROOT,
        env=environment(aws, home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"RESOURCES (.*)", done.stdout) == [
        "spot-g5 4 1",
        "spot-g6 4 1",
        "spot-g6e 4 1",
        "on-demand-g5 4 1",
    ]
    launches = aws.named("RunInstances")
    assert [launch["InstanceType"] for launch in launches] == ["g5.xlarge", "g6.xlarge", "g6e.xlarge", "g5.xlarge"]
    assert [launch.get("InstanceMarketOptions.MarketType") for launch in launches] == ["spot", "spot", "spot", None]
    for launch in launches:
        assert launch["IamInstanceProfile.Name"] == "tune-bisenet-worker"
        assert launch["MetadataOptions.HttpTokens"] == "required"
        assert launch["MetadataOptions.HttpPutResponseHopLimit"] == "2"
        assert launch["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert launch["SecurityGroupId.1"] == account_of(cluster_file)["group"]
        assert launch["SubnetId"] == account_of(cluster_file)["subnet"]
    first = aws.calls.index(launches[0])
    assert {call["Action"] for call in aws.calls[first:]} <= allowed("head.json")
    assert states_of_instances(aws) == ["terminated"] * 4


def states_of_instances(aws: MockAws) -> list[str]:
    reservations = aws.client("ec2").describe_instances()["Reservations"]
    return [instance["State"]["Name"] for reservation in reservations for instance in reservation["Instances"]]


def account_of(cluster_file: Path) -> dict[str, str]:
    filled = yaml.safe_load(cluster_file.read_text())["metadata"]
    return {"image": filled["head_image"], "subnet": filled["subnets"][0], "group": filled["groups"][0]}


def calls_of_the_account(aws: MockAws) -> int:
    """How many calls made the mock account; the last of them gave a profile its role."""
    return max(n for n, call in enumerate(aws.calls) if call["Action"] == "AddRoleToInstanceProfile") + 1


def allowed(policy: str) -> set[str]:
    """The actions of EC2 that a policy of cluster/iam allows."""
    actions: set[str] = set()
    for statement in json.loads((CLUSTER / "iam" / policy).read_text())["Statement"]:
        given = statement["Action"]
        actions |= {given} if isinstance(given, str) else set(given)
    return {action.removeprefix("ec2:") for action in actions}
