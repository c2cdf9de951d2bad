"""`cluster.check`: our files have nothing wrong with them once filled in, and each rule finds a file that breaks it."""

from pathlib import Path

import pytest
from files import CLUSTER, FILES, Change, dropping, setting, written

from tune_bisenet.cluster.check import check, main

pytestmark = pytest.mark.usefixtures("home")

HEAD, WORKER = "available_node_types.head", "available_node_types.spot-g5"
NODE = f"{WORKER}.node_config"
START, JOIN = "head_start_ray_commands", "worker_start_ray_commands"
L4 = "available_node_types.spot-l4.node_config"
POD = "spec.workerGroupSpecs.0.template.spec"
CONTAINER = f"{POD}.containers.0"


def docker(image: str, *options: str) -> dict[str, object]:
    return {"image": image, "container_name": "ray", "run_options": list(options)}


def of_kind(kind: str, change: Change) -> Change:
    """Change one of the manifests of kuberay.yaml."""
    return lambda document: change(document) if document["kind"] == kind else None


AWS_RULES: list[tuple[Change, str]] = [
    # what Ray, or EC2's own description, refuses
    (dropping("provider"), "Ray refuses it"),
    (setting("idle_timeout_minute", 5), "Ray refuses it.*idle_timeout_minute"),
    (setting(f"{NODE}.ImageID", "ami-0"), "ImageID"),
    (setting(f"{NODE}.SecurityGroupIds", "sg-0123456789abcdef0"), "SecurityGroupIds"),
    (setting(f"{NODE}.InstanceType", "g5.xlrage"), "EC2 has no g5.xlrage"),
    # what would bring another version
    (dropping("setup_commands"), "nightly"),
    (setting("setup_commands.1", "echo ready"), "requirements.lock"),
    (setting("setup_commands.1", "pip install boto3"), "--require-hashes"),
    (setting("setup_commands.1", "pip install --require-hashes ray[default]==2.59.0"), "ray.default.==2.59.0"),
    (setting("setup_commands.1", "pip install https://example.org/ray-wheels/latest/ray.whl"), "tomorrow"),
    (setting("docker", docker("rayproject/ray:latest-py311", "-e RAY_AUTH_MODE=token")), "tomorrow"),
    (setting("docker", docker("rayproject/ray", "-e RAY_AUTH_MODE=token")), "tomorrow"),
    (setting("docker", docker("rayproject/ray:2.59.0-py311-cu128", "-e RAY_AUTH_MODE=token")), "needs Ray 2.60.0"),
    # what would open a port, or give out rights
    (setting("docker", docker("rayproject/ray:2.60.0-py311-cu128")), "RAY_AUTH_MODE=token"),
    (dropping(START), f"{START} is missing"),
    (setting(f"{START}.2", "tensorboard --bind_all"), "listens to everyone"),
    (setting(f"{START}.1", old="127.0.0.1", new="0.0.0.0"), "listens to everyone"),
    (setting(f"{START}.1", old="--dashboard-host=127.0.0.1", new=""), "needs --dashboard-host"),
    (setting(f"{START}.1", old="RAY_AUTH_MODE=token", new="A=b"), f"{START}.*RAY_AUTH_MODE=token"),
    (setting(f"{JOIN}.1", old="=token", new="=disabled"), f"{JOIN}.*RAY_AUTH_MODE=token"),
    (lambda file: file["file_mounts"].pop("~/.ray/auth_token"), "token is missing"),
    (setting("setup_commands.0", "chmod 644 ~/.ray/auth_token"), "chmod 600"),
    (setting("provider.aws_credentials", {"aws_secret_access_key": "x"}), "aws_credentials"),
    (setting(f"{NODE}.ImageId", "latest_dlami"), "ImageId"),
    (dropping(f"{NODE}.SubnetIds"), "SubnetIds"),
    (dropping(f"{NODE}.SecurityGroupIds"), "SecurityGroupIds"),
    (dropping(f"{HEAD}.node_config.IamInstanceProfile"), "IamInstanceProfile"),
    (dropping(f"{NODE}.MetadataOptions"), "HttpTokens"),
    (setting(f"{NODE}.BlockDeviceMappings.0.Ebs.Encrypted", False), "Encrypted"),
    # what would cost money, or lose trials
    (setting(f"{NODE}.BlockDeviceMappings.0.Ebs.DeleteOnTermination", False), "DeleteOnTermination"),
    (dropping("idle_timeout_minutes"), "idle_timeout_minutes is missing"),
    (dropping("max_workers"), "max_workers is missing"),
    (dropping("provider.cache_stopped_nodes"), "cache_stopped_nodes"),
    (setting(f"{WORKER}.resources", {"gpu": 1}), "write GPU"),
    (setting(f"{HEAD}.resources", {"CPU": 4}), "the head needs"),
    (setting(f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}), "a head on spot"),
    (dropping(f"{JOIN}.2"), "daemons spot --cloud aws"),
    (setting(f"{START}.1", old="--autoscaling-config", new="--other"), "needs --autoscaling-config"),
    (setting("file_mounts.~/x", "no/such/folder"), "no/such/folder"),
    (setting("file_mounts.~/all", "."), "Mount less"),
    (setting("provider.type", "azure"), "azure is not supported"),
]

GCP_RULES: list[tuple[Change, str]] = [
    (dropping(f"{L4}.scheduling"), "onHostMaintenance"),
    (setting(f"{L4}.disks.0.initializeParams.sourceImage", "projects/p/global/images/family/common"), "tomorrow"),
    (setting(f"{L4}.disks.0.autoDelete", False), "autoDelete"),
    (dropping(f"{L4}.serviceAccounts"), "serviceAccounts"),
    (setting(f"{HEAD}.node_config.scheduling", {"provisioningModel": "SPOT"}), "a head on spot"),
    (dropping(f"{JOIN}.2"), "daemons spot --cloud gcp"),
    (setting(f"{L4}.disks", {"boot": True}), "expected keys"),
]

LOCAL_RULES: list[tuple[Change, str]] = [
    (dropping("provider.head_ip"), "Ray refuses it.*head_ip"),
    (dropping("setup_commands"), "setup_commands is missing"),
]

KUBERAY_RULES: list[tuple[Change, str]] = [
    (setting("kind", "RayService"), "RayService is not supported"),
    *(
        (of_kind("RayCluster", change), expected)
        for change, expected in [
            (setting("spec.rayVersion", "2.59.0"), "2.59.0"),
            (setting("spec.authOptions.mode", "disabled"), "authOptions.mode"),
            (dropping("spec.enableInTreeAutoscaling"), "enableInTreeAutoscaling"),
            (setting("spec.headGroupSpec.serviceType", "LoadBalancer"), "ClusterIP"),
            (dropping("spec.headGroupSpec.rayStartParams.num-cpus"), "num-cpus"),
            (dropping("spec.workerGroupSpecs.0.maxReplicas"), "maxReplicas"),
            (dropping("spec.workerGroupSpecs"), "expected keys.*workerGroupSpecs"),
            (dropping(f"{POD}.securityContext.runAsNonRoot"), "runAsNonRoot"),
            (dropping(f"{CONTAINER}.resources.limits.memory"), "limit of memory"),
            (dropping(f"{CONTAINER}.resources.limits"), "limit of nvidia.com/gpu"),
            (setting(f"{CONTAINER}.image", "rayproject/ray:nightly-py311"), "tomorrow"),
        ]
    ),
    (of_kind("RayJob", dropping("spec.shutdownAfterJobFinishes")), "shutdownAfterJobFinishes"),
    (of_kind("RayJob", setting("spec.entrypoint", "python -m tune_bisenet.run")), "search.sh"),
    (of_kind("RayJob", dropping("spec.rayClusterSpec.authOptions")), "RayJob.*authOptions.mode"),
]

RULES = [
    (name, *rule)
    for name, rules in zip(FILES, (AWS_RULES, GCP_RULES, LOCAL_RULES, KUBERAY_RULES), strict=True)
    for rule in rules
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_lists_what_is_to_be_filled_in_and_is_then_right(name: str, tmp_path: Path) -> None:
    problems = list(check(CLUSTER / name))
    assert problems
    assert all("still to be filled in" in problem for problem in problems)
    assert not list(check(written(tmp_path / name, name)))


@pytest.mark.parametrize(("name", "change", "expected"), RULES, ids=[f"{rule[0]}-{rule[2]}" for rule in RULES])
def test_a_broken_file_is_refused(name: str, change: Change, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"(?s){expected}"):
        raise ValueError("\n".join(check(written(tmp_path / name, name, change))))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kuberay.yaml", of_kind("RayCluster", setting(f"{CONTAINER}.resources.limits.cpu", 4))),
        ("gpu.yaml", setting("docker", docker("rayproject/ray:2.60.0-py311-cu128", "-e RAY_AUTH_MODE=token"))),
    ],
    ids=["a number for a quantity", "a container with a token and the locked Ray"],
)
def test_another_right_file_is_accepted(name: str, change: Change, tmp_path: Path) -> None:
    assert not list(check(written(tmp_path / name, name, change)))


def test_the_command_prints_problems_and_its_exit_code_says_whether_there_are(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(written(tmp_path / "good.yaml", "gpu.yaml"))]) == 0
    broken = tmp_path / "broken.yaml"
    for text in ("a: [1,\n", "just words", ""):
        broken.write_text(text)
        assert main([str(broken)]) == 2
    assert main([str(tmp_path / "missing.yaml"), str(CLUSTER / "gpu.yaml")]) == 2
    printed = capsys.readouterr().out
    assert "ami-EDIT" in printed
    assert "missing.yaml" in printed
    (home / ".ray" / "auth_token").unlink()
    assert main([str(tmp_path / "good.yaml")]) == 2
    assert "ray get-auth-token --generate" in capsys.readouterr().out
