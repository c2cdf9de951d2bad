"""A mock EC2 on this machine (moto's server) that keeps every call it gets, and commands of Ray that speak to it."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from urllib.request import urlopen

import boto3
from files import AMI, CLUSTER, GROUP, SUBNET, filled_text
from helpers.processes import LoggedProcess
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass
class MockAws:
    """The server's address, and the parameters of each call, oldest first; `Action` says which call it was."""

    url: str
    calls: list[dict[str, str]] = field(default_factory=list)

    def client(self, service: str) -> Any:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.url, **keys)

    def named(self, action: str) -> list[dict[str, str]]:
        """Return the calls of one kind."""
        return [call for call in self.calls if call["Action"] == action]

    def states(self) -> list[str]:
        """Return the state of each instance there is or was."""
        reservations = self.client("ec2").describe_instances()["Reservations"]
        return [instance["State"]["Name"] for reservation in reservations for instance in reservation["Instances"]]

    def start(self, home: Path, *command: object) -> LoggedProcess:
        """Start a command that speaks to this EC2. Its `ssh` reaches nothing: no packet leaves the machine."""
        ssh = home / "bin" / "ssh"
        ssh.parent.mkdir(exist_ok=True)
        ssh.write_text("#!/bin/sh\nexit 255\n")
        ssh.chmod(0o755)
        variables = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "HOME": str(home),
            "PATH": f"{ssh.parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        log = home / f"{time.time_ns()}.log"
        return LoggedProcess([sys.executable, *map(str, command)], log=log, env=os.environ | variables)


def serve() -> Iterator[MockAws]:
    """Run moto's server on a free port, empty at the beginning and at the end."""
    calls: list[dict[str, str]] = []
    moto = DomainDispatcherApplication(create_backend_app)

    def recording(environ: dict[str, Any], start_response: Any) -> Any:
        if "x-www-form-urlencoded" in environ.get("CONTENT_TYPE", ""):
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = BytesIO(body)
            calls.append(dict(parse_qsl(body.decode())))
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, recording, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield MockAws(url, calls)
    urlopen(f"{url}/moto-api/reset", data=b"").close()
    server.shutdown()
    thread.join()
    server.server_close()


def make_account(aws: MockAws) -> dict[str, str]:
    """Make what README.md has a user make: a subnet, a closed security group, two instance profiles. Return the ids."""
    ec2, iam = aws.client("ec2"), aws.client("iam")
    image = ec2.describe_images(Filters=[{"Name": "root-device-name", "Values": ["/dev/sda1"]}])["Images"][0]["ImageId"]
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.create_security_group(GroupName="tune-bisenet", Description="closed", VpcId=subnet["VpcId"])["GroupId"]
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.7/32"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, inside])
    for name in ("tune-bisenet-head", "tune-bisenet-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(CLUSTER / "iam" / "trust.json").read_text())
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return {AMI: image, SUBNET: subnet["SubnetId"], GROUP: group}


def write_cluster_file(account: dict[str, str], tmp_path: Path) -> Path:
    """Write gpu.yaml, filled in with what is in the mock account."""
    text = filled_text("gpu.yaml")
    for placeholder, id_ in account.items():
        text = text.replace(placeholder, id_)
    path = tmp_path / "gpu.yaml"
    path.write_text(text)
    return path
