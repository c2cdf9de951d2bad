"""The whole way of `ray up cluster/gpu.yaml` on one machine, without a network: run in namespaces of its own, as root.

EC2 is moto's; every machine that it "launches" is this one, reached by a real sshd under the address that moto gave
out. Ray's launcher, its autoscaler, SSH, rsync, our set-up and start commands are real. What must differ, since all
machines share one host, is in `on_one_host`.

    unshare --net --pid --mount --fork --kill-child --mount-proc python whole_way.py FOLDER
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from files import AMI, GROUP, ROOT, SUBNET, filled_text
from mock_aws import MockAws, account, mock_aws_server

TASK = """
import ray

ray.init(address="auto", log_to_driver=False)


@ray.remote(num_gpus=1)
def where(number):
    import time

    time.sleep(2)
    return ray.get_runtime_context().get_node_id()


nodes = set(ray.get([where.remote(number) for number in range(4)]))
heads = {node["NodeID"] for node in ray.nodes() if not node["Resources"].get("GPU")}
print("TASKS RAN ON", len(nodes), "WORKERS, ON THE HEAD:", bool(nodes & heads), flush=True)
"""


def main(folder: Path) -> None:
    network()
    home = folder / "home"
    users(folder, home)
    with sshd(folder), mock_aws_server() as aws:
        environment = os.environ | aws.environment | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        role(home, aws)
        file = on_one_host(aws, folder)
        began = time.monotonic()

        def told(what: str) -> None:
            sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {what}\n")
            sys.stdout.flush()

        def ray(*words: str) -> str:
            done = subprocess.run(
                ["ray", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            if done.returncode:
                raise SystemExit(f"ray {words[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
            return done.stdout

        ray("up", "--yes", "--no-config-cache", str(file))
        told(f"UP: {alive(aws)}")
        (home / "task.py").write_text(TASK)
        said = ray("exec", str(file), "python ~/task.py")
        told("\n".join(line for line in said.splitlines() if line.startswith("TASKS")))
        told(f"LAUNCHED: {[call.get('InstanceMarketOptions.MarketType') for call in aws.named('RunInstances')[1:]]}")
        wait(lambda: alive(aws) == ["m7i.xlarge"], 150, "the workers did not leave")
        told(f"IDLE: {alive(aws)}")
        ray("down", "--yes", str(file))
        told(f"DOWN: {alive(aws)}")


def network() -> None:
    """Every address that moto may give out is this machine's."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for addresses in ("10.0.0.0/8", "172.16.0.0/12"):
        subprocess.run(["ip", "route", "add", "local", addresses, "dev", "lo"], check=True)


def users(folder: Path, home: Path) -> None:
    """One user, with a home of its own; the machine's own users, /run and Ray's folder are hidden."""
    passwd = folder / "passwd"
    passwd.write_text(f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:74:65534::/run/sshd:/bin/false\n")
    subprocess.run(["mount", "--bind", passwd, "/etc/passwd"], check=True)
    Path("/tmp/ray").mkdir(exist_ok=True)
    for hidden in ("/run", "/tmp/ray"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", hidden], check=True)
    Path("/run/sshd").mkdir(mode=0o755)
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("5" * 64)
    # The environment is there already: `make setup` would bring 3 GB.
    (home / "tune_bisenet").mkdir()
    (home / "tune_bisenet" / ".venv").symlink_to(sys.prefix)
    (home / "bin").mkdir()
    (home / "bin" / "make").write_text('#!/bin/sh\necho "make $*" >> ~/made\n')
    (home / "bin" / "make").chmod(0o755)
    (home / ".profile").write_text(f'export PATH="{home}/bin:{os.environ["PATH"]}" PYTHONPATH="{ROOT}"\n')
    (home / ".ssh").mkdir(mode=0o700)


def role(home: Path, aws: MockAws) -> None:
    """What a machine's instance profile gives it: the autoscaler on the head finds EC2, and may use it."""
    given = " ".join(f"{name}={value}" for name, value in aws.environment.items())
    with (home / ".profile").open("a") as profile:
        profile.write(f"export {given}\n")


@contextmanager
def sshd(folder: Path) -> Iterator[None]:
    """A real sshd that lets in one key."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    config = folder / "sshd_config"
    config.write_text(
        f"Port 22\nListenAddress 0.0.0.0\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
        f"SetEnv PATH={os.environ['PATH']}\n"
    )
    program = subprocess.run(["which", "sshd"], capture_output=True, text=True, check=True).stdout.strip()
    server = subprocess.Popen([program, "-D", "-f", config, "-E", folder / "sshd.log"])
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def on_one_host(aws: MockAws, folder: Path) -> Path:
    """gpu.yaml, filled in. Only what several machines on one host force is changed."""
    has, text = account(aws), filled_text("gpu.yaml")
    for placeholder, name in ((AMI, "image"), (SUBNET, "subnet"), (GROUP, "group")):
        text = text.replace(placeholder, has[name])
    config = yaml.safe_load(text)
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "user")}
    config["provider"]["use_internal_ips"] = True  # what moto calls public would lead elsewhere
    config["idle_timeout_minutes"] = 0.1
    for kind in config["available_node_types"].values():
        kind["node_config"]["KeyName"] = "mine"
    aws.client("ec2").import_key_pair(KeyName="mine", PublicKeyMaterial=(folder / "user.pub").read_bytes())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        # `ray stop` would end the other machines, too; and two cannot have one port
        config[key] = [
            command.replace("--object-manager-port=8076", "")
            for command in config[key]
            if not command.startswith("ray stop") and "nohup" not in command
        ]
    path = folder / "gpu.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def alive(aws: MockAws) -> list[str]:
    """The types of the machines that run."""
    reservations = aws.client("ec2").describe_instances()["Reservations"]
    instances = [instance for reservation in reservations for instance in reservation["Instances"]]
    return [one["InstanceType"] for one in instances if one["State"]["Name"] in ("pending", "running")]


def wait(until: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise SystemExit(complaint)
        time.sleep(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
