"""A mock EC2 on this machine (moto's server), which keeps every call it was given, and a `ray up` that speaks to it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from urllib.request import urlopen

import boto3
from files import ROOT
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

REGION = "us-east-1"


@dataclass
class MockAws:
    """The server's address, and the parameters of each call, oldest first; `Action` says which call it was."""

    url: str
    calls: list[dict[str, str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What makes AWS's clients speak to it, with keys that open nothing."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def named(self, action: str) -> list[dict[str, str]]:
        """The calls of one kind."""
        return [call for call in self.calls if call["Action"] == action]


@contextmanager
def mock_aws_server(address: str = "127.0.0.1") -> Iterator[MockAws]:
    """Moto's server on a free port, empty at the beginning and at the end."""
    calls: list[dict[str, str]] = []
    moto = DomainDispatcherApplication(create_backend_app)

    def recording(environ: dict[str, Any], start_response: Any) -> Any:
        if "x-www-form-urlencoded" in environ.get("CONTENT_TYPE", ""):  # as EC2 and IAM are called, and S3 is not
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = BytesIO(body)
            calls.append(dict(parse_qsl(body.decode())))
        return moto(environ, start_response)

    server = make_server(address, 0, recording, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://{address}:{server.server_port}"
    try:
        yield MockAws(url, calls)
    finally:
        urlopen(f"{url}/moto-api/reset", data=b"").close()
        server.shutdown()
        thread.join()
        server.server_close()


def account(aws: MockAws) -> dict[str, str]:
    """What README.md has a user make before: images, a subnet, a closed security group, two instance profiles."""
    ec2, iam = aws.client("ec2"), aws.client("iam")
    images = ec2.describe_images(Filters=[{"Name": "root-device-name", "Values": ["/dev/sda1"]}])["Images"]
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.create_security_group(GroupName="tune-bisenet", Description="closed", VpcId=subnet["VpcId"])["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.7/32"}]},
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        ],
    )
    for name in ("tune-bisenet-head", "tune-bisenet-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(ROOT / "cluster/iam/trust.json").read_text())
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return {"image": images[0]["ImageId"], "subnet": subnet["SubnetId"], "group": group}


def environment(aws: MockAws, home: Path) -> dict[str, str]:
    """For a process that speaks to the mock EC2. Its `ssh` never gets anywhere: no packet leaves the machine."""
    tools = home / "bin"
    tools.mkdir(exist_ok=True)
    ssh = tools / "ssh"
    ssh.write_text("#!/bin/sh\nexit 255\n")
    ssh.chmod(0o755)
    own = {
        "HOME": str(home),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | aws.environment | own


def ray(aws: MockAws, home: Path, *words: str) -> subprocess.Popen[str]:
    """A command of Ray's, in a process group of its own."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), *words],
        cwd=ROOT,
        env=environment(aws, home),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
