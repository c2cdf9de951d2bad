"""`python -m tune_bisenet.check_cluster`: our files pass once filled in, each rule refuses a file that breaks it."""

import re
from pathlib import Path

import pytest
from changes import Change, dropping, renaming, replacing, setting
from files import CLUSTER, FILES, LAUNCHER_FILES, filled, written

from tune_bisenet.check_cluster.__main__ import OK, WRONG, main, problems
from tune_bisenet.check_cluster.ray_schema import prepared

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_it_comes_lists_what_is_to_be_filled_in_and_nothing_else(name: str) -> None:
    found = list(problems(CLUSTER / name))
    assert found
    assert all("is still to be filled in" in problem for problem in found)


@pytest.mark.parametrize("name", FILES)
def test_a_file_filled_in_has_nothing_wrong(name: str, tmp_path: Path) -> None:
    assert not list(problems(written(tmp_path / name, name)))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_takes_each_file(name: str) -> None:
    config = prepared(filled(name))
    assert config["cluster_name"] == "tune-bisenet"
    assert all("nightly" not in command and "ray-wheels" not in command for command in config["head_setup_commands"])


def test_the_command_says_what_is_wrong_and_its_exit_code_says_whether(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(written(tmp_path / "good.yaml", "gpu.yaml"))]) == OK
    assert "Nothing is wrong." in capsys.readouterr().out
    assert main([str(CLUSTER / "gpu.yaml")]) == WRONG
    said = capsys.readouterr().out
    assert "ami-EDIT" in said
    assert said.endswith(" to mend.\n")


def test_a_file_that_is_not_there_or_no_yaml_is_told(tmp_path: Path) -> None:
    assert "cannot be read" in next(problems(tmp_path / "missing.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\n")
    assert "is no YAML" in next(problems(broken))
    broken.write_text("just words")
    assert "holds no keys" in next(problems(broken))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    doubled = tmp_path / "doubled.yaml"
    doubled.write_text("max_workers: 2\nprovider: {type: aws}\nmax_workers: 200\n")
    assert "the key max_workers is given twice" in next(problems(doubled))


def docker(image: str) -> dict[str, object]:
    return {"image": image, "container_name": "ray", "run_options": ["-e RAY_AUTH_MODE=token"]}


SPOT = "available_node_types.spot-g5"
NODE = f"{SPOT}.node_config"
HEAD = "available_node_types.head"
OPEN = "ray start --head --port=6379 --dashboard-host=0.0.0.0 --autoscaling-config=~/ray_bootstrap_config.yaml"

AWS_RULES: dict[str, tuple[Change, str]] = {
    # what Ray refuses itself
    "a key of Ray's misspelt": (
        renaming("idle_timeout_minutes", "idle_timeout_minute"),
        "Ray refuses it.*idle_timeout_m",
    ),
    "a provider's key misspelt": (
        setting("provider.cache_stoped_nodes", False),
        "cache_stoped_nodes: Ray knows no such key",
    ),
    "keys in the file": (
        setting("provider.aws_credentials", {"aws_secret_access_key": "x"}),
        "no keys in a file",
    ),
    "a type's key misspelt": (renaming(f"{SPOT}.max_workers", "max_worker"), "Ray refuses it.*max_worker"),
    "resources left out": (dropping(f"{SPOT}.resources"), "Ray refuses it.*resources"),
    "an unknown head": (setting("head_node_type", "haed"), "Ray refuses it.*head_node_type"),
    "no provider": (dropping("provider"), "Ray refuses it"),
    # what Ray passes over
    "no types": (
        lambda file: [file.pop(key) for key in ("available_node_types", "head_node_type")] and None,
        "available_node_types: left out",
    ),
    "min over max": (
        lambda file: file["available_node_types"]["spot-g5"].update(min_workers=3, max_workers=2),
        "min_workers 3 is more than max_workers 2",
    ),
    "max over all": (setting(f"{SPOT}.max_workers", 9), "max_workers 9 is more than all types together may have, 8"),
    "a negative max": (setting(f"{SPOT}.max_workers", -1), "must not be negative"),
    "no worker at all": (
        lambda file: [kind.update(max_workers=0) for kind in file["available_node_types"].values()] and None,
        "no type may have workers",
    ),
    "gpu in lower case": (setting(f"{SPOT}.resources", {"gpu": 1}), "resources.gpu: write GPU"),
    "Memory": (setting(f"{SPOT}.resources", {"Memory": 1}), "resources.Memory: write memory"),
    "trials on the head": (setting(f"{HEAD}.resources", {"CPU": 4}), "the head needs {CPU: 0, GPU: 0}"),
    "no setup commands": (
        dropping("setup_commands"),
        "setup_commands: left out, but Ray's own would bring a nightly Ray",
    ),
    "no head start": (dropping("head_start_ray_commands"), "head_start_ray_commands: left out"),
    "no worker start": (dropping("worker_start_ray_commands"), "worker_start_ray_commands: left out"),
    "no idle timeout": (dropping("idle_timeout_minutes"), "idle_timeout_minutes: left out"),
    "no start in the start commands": (
        setting("head_start_ray_commands", ["ray stop"]),
        "nothing in it is `ray start`",
    ),
    "nothing locked": (setting("setup_commands.1", "echo ready"), "nothing installs requirements.lock"),
    "an unlocked package": (setting("setup_commands.1", "pip install boto3"), "`pip install boto3` is not locked"),
    "another Ray": (
        setting("setup_commands.1", "pip install --require-hashes ray[default]==2.59.0"),
        "ray\\[default\\]==2.59.0` is another Ray",
    ),
    "a nightly Ray": (
        setting("setup_commands.1", "pip install https://example.org/ray-wheels/latest/ray.whl"),
        "another version tomorrow",
    ),
    "a dashboard for all": (
        setting("head_start_ray_commands.1", f"export RAY_AUTH_MODE=token; {OPEN}"),
        "listens to everyone",
    ),
    "a TensorBoard for all": (
        setting("head_start_ray_commands.2", "tensorboard --logdir s3://bucket --bind_all"),
        "listens to everyone",
    ),
    "a dashboard where Ray puts it": (
        replacing("head_start_ray_commands.1", "--dashboard-host=127.0.0.1", ""),
        "needs --dashboard-host=127.0.0.1",
    ),
    "a head without autoscaler": (
        replacing("head_start_ray_commands.1", "--autoscaling-config", "--other"),
        "needs --autoscaling-config=",
    ),
    "a worker that finds no head": (
        replacing("worker_start_ray_commands.1", "$RAY_HEAD_IP", "10.0.0.1"),
        "needs --address=",
    ),
    "a head without a token": (
        replacing("head_start_ray_commands.1", "RAY_AUTH_MODE=token", "A=b"),
        "head_start_ray_commands: without RAY_AUTH_MODE=token",
    ),
    "a worker without a token": (
        replacing("worker_start_ray_commands.1", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "worker_start_ray_commands: without RAY_AUTH_MODE=token",
    ),
    "a token that is not sent": (lambda file: file["file_mounts"].pop("~/.ray/auth_token"), "the token is left out"),
    "a token that all can read": (setting("setup_commands.0", "chmod 644 ~/.ray/auth_token"), "others on a node"),
    "a mount that is not there": (setting("file_mounts.~/x", "no/such/folder"), "there is no no/such/folder"),
    "an image that is not fixed": (setting("docker", docker("rayproject/ray:latest-py311")), "another image tomorrow"),
    "an image without a tag": (setting("docker", docker("rayproject/ray")), "another image tomorrow"),
    "an image of another Ray": (
        setting("docker", docker("rayproject/ray:2.59.0-py311-cu128")),
        "another Ray than requirements.lock: it must be 2.60.0",
    ),
    "an image of another Python": (
        setting("docker", docker("rayproject/ray:2.60.0-py39-cu128")),
        "must name a Python that the lock is for",
    ),
    "a container without a token": (
        setting("docker", docker("rayproject/ray:2.60.0-py311-cu128") | {"run_options": []}),
        "nothing in a head's container uses a token",
    ),
    "another cloud": (setting("provider.type", "azure"), "azure has no rules here"),
    # what EC2 would refuse, or worse, not refuse
    "a region misspelt": (setting("provider.region", "us-eats-1"), "no region us-eats-1; did you mean us-east-1"),
    "a node's key misspelt": (
        renaming(f"{NODE}.ImageId", "ImageID"),
        "ImageID: EC2 knows no such key; did you mean ImageId",
    ),
    "a key inside misspelt": (
        renaming(f"{NODE}.BlockDeviceMappings.0.Ebs.Encrypted", "Encrypt"),
        "Ebs.Encrypt: EC2 knows no such key; did you mean Encrypted",
    ),
    "a type of instance misspelt": (
        setting(f"{NODE}.InstanceType", "g5.xlrage"),
        "there is no g5.xlrage; did you mean g5.xlarge",
    ),
    "a market misspelt": (
        setting(f"{NODE}.InstanceMarketOptions.MarketType", "Spot"),
        "there is no Spot; did you mean spot",
    ),
    "a disk's type misspelt": (
        setting(f"{NODE}.BlockDeviceMappings.0.Ebs.VolumeType", "gp33"),
        "there is no gp33; did you mean gp3",
    ),
    "a size as a text": (
        setting(f"{NODE}.BlockDeviceMappings.0.Ebs.VolumeSize", "150"),
        "wants a integer here, not '150'",
    ),
    "a list that is none": (setting(f"{NODE}.SecurityGroupIds", "sg-0123456789abcdef0"), "wants a list here"),
    "what Ray sets itself": (setting(f"{NODE}.MaxCount", 4), "Ray sets it itself"),
    "no image": (dropping(f"{NODE}.ImageId"), "ImageId: left out"),
    "an image by name": (setting(f"{NODE}.ImageId", "latest_dlami"), "latest_dlami is no id of the form ami-"),
    "no subnet": (dropping(f"{NODE}.SubnetIds"), "SubnetIds: left out"),
    "no security group": (dropping(f"{NODE}.SecurityGroupIds"), "SecurityGroupIds: left out"),
    "no profile on workers": (dropping(f"{NODE}.IamInstanceProfile"), "IamInstanceProfile: left out"),
    "no profile on the head": (dropping(f"{HEAD}.node_config.IamInstanceProfile"), "IamInstanceProfile: left out"),
    "no type of instance": (dropping(f"{NODE}.InstanceType"), "InstanceType: left out"),
    "no IMDSv2": (dropping(f"{NODE}.MetadataOptions"), "needs HttpTokens: required"),
    "IMDSv2 by choice": (setting(f"{NODE}.MetadataOptions.HttpTokens", "optional"), "needs HttpTokens: required"),
    "too many hops": (setting(f"{NODE}.MetadataOptions.HttpPutResponseHopLimit", 64), "HttpPutResponseHopLimit: 2"),
    "no disk": (dropping(f"{NODE}.BlockDeviceMappings"), "BlockDeviceMappings: left out"),
    "a disk that is not encrypted": (
        setting(f"{NODE}.BlockDeviceMappings.0.Ebs.Encrypted", False),
        "every Ebs needs Encrypted: true",
    ),
    "a disk that stays": (
        setting(f"{NODE}.BlockDeviceMappings.0.Ebs.DeleteOnTermination", False),
        "paid for ever after",
    ),
    "a head on spot": (
        setting(f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}),
        "a head on spot takes the whole cluster",
    ),
    "spot nodes that are kept": (dropping("provider.cache_stopped_nodes"), "cache_stopped_nodes: must be false"),
    "a notice that nobody hears": (dropping("worker_start_ray_commands.2"), "a notice is not heard"),
}
GCP = "available_node_types.spot-l4.node_config"
GCP_RULES: dict[str, tuple[Change, str]] = {
    "a zone of another region": (
        setting("provider.availability_zone", "us-west1-a"),
        "us-west1-a is not in us-central1",
    ),
    "no project": (setting("provider.project_id", None), "provider.project_id: left out"),
    "a key misspelt": (
        renaming(f"{GCP}.machineType", "machinetype"),
        "machinetype: no such key.*did you mean machineType",
    ),
    "a key inside misspelt": (
        renaming(f"{GCP}.scheduling.provisioningModel", "provisionModel"),
        "did you mean provisioningM",
    ),
    "another kind of value": (setting(f"{GCP}.disks.0.autoDelete", "yes"), "a bool is wanted here, not 'yes'"),
    "a market misspelt": (setting(f"{GCP}.scheduling.provisioningModel", "Spot"), "there is no Spot"),
    "a list that is none": (setting(f"{GCP}.disks", {}), "a list is wanted here"),
    "no machine": (setting(f"{GCP}.machineType", "g2 standard"), "g2 standard is no type of machine"),
    "a GPU that is to move": (dropping(f"{GCP}.scheduling"), "needs onHostMaintenance: TERMINATE"),
    "a family for an image": (
        setting(f"{GCP}.disks.0.initializeParams.sourceImage", "projects/p/global/images/family/common-cu129"),
        "can be another image tomorrow",
    ),
    "a disk that stays": (setting(f"{GCP}.disks.0.autoDelete", False), "paid for ever after"),
    "no boot disk": (setting(f"{GCP}.disks.0.boot", False), "no disk has boot: true"),
    "no account": (dropping(f"{GCP}.serviceAccounts"), "serviceAccounts: left out"),
    "an account that is none": (setting(f"{GCP}.serviceAccounts.0.email", "default"), "default is no address"),
    "a head on spot": (
        setting("available_node_types.head.node_config.scheduling", {"provisioningModel": "SPOT"}),
        "a head on spot",
    ),
    "a notice that nobody hears": (dropping("worker_start_ray_commands.2"), "a notice is not heard"),
}

LOCAL_RULES: dict[str, tuple[Change, str]] = {
    "no head": (dropping("provider.head_ip"), "Ray refuses it.*head_ip"),
    "types of nodes": (setting("available_node_types", {"a": {}}), "Ray refuses it"),
    "no token": (replacing("head_start_ray_commands.1", "RAY_AUTH_MODE=token", "A=b"), "without RAY_AUTH_MODE=token"),
    "no setup commands": (dropping("setup_commands"), "setup_commands: left out"),
}


def assert_refused(tmp_path: Path, name: str, change: Change, expected: str) -> None:
    found = list(problems(written(tmp_path / name, name, change)))
    assert any(re.search(expected, problem, flags=re.DOTALL) for problem in found), found


@pytest.mark.parametrize("rule", AWS_RULES)
def test_a_file_for_aws_is_refused_for(rule: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, "gpu.yaml", *AWS_RULES[rule])


@pytest.mark.parametrize("rule", GCP_RULES)
def test_a_file_for_google_is_refused_for(rule: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, "gcp.yaml", *GCP_RULES[rule])


@pytest.mark.parametrize("rule", LOCAL_RULES)
def test_a_file_for_ones_own_machines_is_refused_for(rule: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, "local.yaml", *LOCAL_RULES[rule])


def test_a_token_that_was_never_made_is_told_with_the_command_that_makes_it(home: Path, tmp_path: Path) -> None:
    (home / ".ray" / "auth_token").unlink()
    assert any("ray get-auth-token --generate" in problem for problem in problems(written(tmp_path / "a", "gpu.yaml")))


def test_a_mount_of_the_whole_project_is_refused(tmp_path: Path) -> None:
    (tmp_path / "project" / ".venv").mkdir(parents=True)
    assert_refused(tmp_path, "gpu.yaml", setting("file_mounts.~/all", str(tmp_path / "project")), r"holds \.venv")


def test_an_image_with_everything_right_is_taken(tmp_path: Path) -> None:
    change = setting("docker", docker("rayproject/ray:2.60.0-py311-cu128"))
    assert not list(problems(written(tmp_path / "a", "gpu.yaml", change)))
