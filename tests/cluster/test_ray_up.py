"""`ray up cluster/gpu.yaml` against a mock EC2, up to the launched head: what it asks for, and nothing more."""

import json
import re
from pathlib import Path

import mock_aws
import pytest
from files import AMI, CLUSTER, GROUP, SUBNET
from mock_aws import MockAws

from tune_bisenet.cluster.check import check

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2700), pytest.mark.usefixtures("home")]


aws = pytest.fixture(mock_aws.serve)
account = pytest.fixture(mock_aws.make_account)
cluster_file = pytest.fixture(mock_aws.write_cluster_file)


def test_ray_up_asks_for_a_closed_head_alone_and_ray_down_takes_it_away(
    aws: MockAws, account: dict[str, str], home: Path, cluster_file: Path
) -> None:
    assert not list(check(cluster_file))
    num_before = len(aws.calls)
    with aws.start(home, "-m", "ray.scripts.scripts", "up", "--yes", "--no-config-cache", cluster_file) as up:
        up.until(lambda: "SSH still not available" in up.log)

    (call,) = aws.named("RunInstances")
    asked = {key: value for key, value in call.items() if not key.startswith(("TagSpecification", "ClientToken"))}
    assert asked.pop("KeyName").startswith("ray-autoscaler")
    assert asked == {
        "Action": "RunInstances",
        "Version": asked["Version"],
        "InstanceType": "m7i.xlarge",
        "ImageId": account[AMI],
        "SubnetId": account[SUBNET],
        "SecurityGroupId.1": account[GROUP],
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
    with aws.start(home, "-m", "ray.scripts.scripts", "down", "--yes", cluster_file) as down:
        assert down.end() == 0
    # No security group and no role of Ray's own is among what the laptop's policy allows.
    assert {call["Action"] for call in aws.calls[num_before:]} <= allowed("laptop.json")
    assert aws.states() == ["terminated"]
    assert aws.client("ec2").describe_volumes()["Volumes"] == []


def test_workers_are_asked_for_as_the_file_says_with_the_rights_of_the_head_alone(
    aws: MockAws, account: dict[str, str], home: Path, cluster_file: Path
) -> None:
    with aws.start(home, Path(__file__).with_name("launch_workers.py"), cluster_file) as workers:
        assert workers.end() == 0
    resources = re.findall(r"RESOURCES (.*)", workers.log)
    assert resources == ["spot-g5 4 1", "spot-g6 4 1", "spot-g6e 4 1", "on-demand-g5 4 1"]
    launches = aws.named("RunInstances")
    assert [launch["InstanceType"] for launch in launches] == ["g5.xlarge", "g6.xlarge", "g6e.xlarge", "g5.xlarge"]
    assert [launch.get("InstanceMarketOptions.MarketType") for launch in launches] == ["spot", "spot", "spot", None]
    for launch in launches:
        assert launch["IamInstanceProfile.Name"] == "tune-bisenet-worker"
        assert launch["MetadataOptions.HttpTokens"] == "required"
        assert launch["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert launch["SecurityGroupId.1"] == account[GROUP]
        assert launch["SubnetId"] == account[SUBNET]
    first = aws.calls.index(launches[0])
    assert {call["Action"] for call in aws.calls[first:]} <= allowed("head.json")
    assert aws.states() == ["terminated"] * 4


def allowed(policy: str) -> set[str]:
    """Return the actions of EC2 that a policy of cluster/iam allows."""
    actions: list[str] = []
    for statement in json.loads((CLUSTER / "iam" / policy).read_text())["Statement"]:
        action = statement["Action"]
        actions += [action] if isinstance(action, str) else action
    return {action.removeprefix("ec2:") for action in actions}
