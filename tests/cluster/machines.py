"""Machines for a mock EC2: each is namespaces of its own with a real sshd, for as long as moto says that it runs.

Whoever makes them stands in namespaces, too, as root, and is a laptop at the other end of a bridge. It reaches machines
by their public addresses, and they each other by their private ones; there is nothing else. A machine that is
terminated is gone with all that ran on it.

    python machines.py JSON     becomes a machine: the first process of new namespaces, which ends as an sshd
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mock_aws import MockAws

ROOT = Path(__file__).parent.parent.parent
GATEWAY = "172.31.255.254"
"""The laptop's address among the machines. Moto gives none out that is so high."""

METADATA = "169.254.169.254"
USER = "ubuntu"
NAMESPACES = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True, kw_only=True)
class Machine:
    instance: str
    kind: str
    private: str
    public: str
    home: str
    """Of its user; it stays behind when the machine is gone."""

    @property
    def name(self) -> str:
        return "ip-" + self.private.replace(".", "-")

    def read(self, name: str) -> str:
        """A file in its home; empty if there is none."""
        path = Path(self.home) / name
        return path.read_text(errors="replace") if path.exists() else ""

    def told(self) -> str:
        """The ends of its logs, for a person who looks for what went wrong."""
        logs = {name: self.read(name)[-3000:] for name in ("console.log", "pages.log", "spot.log")}
        return f"{self.name}, {self.kind}\n" + "".join(f"  {name}:\n{text}\n" for name, text in logs.items())


class Machines:
    """Those that moto has running, and those that it had."""

    def __init__(self, aws: "MockAws", place: Path, image: dict[str, str]) -> None:
        self._aws = aws
        self._place = place
        self._image = image
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ended = threading.Event()
        self.all: list[Machine] = []

    @property
    def alive(self) -> list[Machine]:
        return [machine for machine in self.all if machine.instance in self._processes]

    def network(self, machine: Machine) -> str:
        """What tells its processes from those of others; empty if it is gone."""
        process = self._processes.get(machine.instance)
        return network_of(process.pid) if process else ""

    def listening(self, machine: Machine) -> set[tuple[str, int]]:
        """The addresses and ports, of IPv4, at which it hears."""
        table = Path(f"/proc/{self._processes[machine.instance].pid}/net/tcp").read_text().splitlines()[1:]
        ends = [line.split()[1].split(":") for line in table if line.split()[3] == "0A"]
        return {(socket.inet_ntoa(bytes.fromhex(at)[::-1]), int(port, 16)) for at, port in ends}

    @contextmanager
    def follow_moto(self) -> Iterator[None]:
        """Start and end machines as instances come and go."""
        thread = threading.Thread(target=self._follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            for instance in list(self._processes):
                self._end(instance)

    def _follow(self) -> None:
        try:
            while not self._ended.wait(0.5):
                self._keep_up()
        except Exception:
            traceback.print_exc()
            os._exit(1)  # whoever waits for a machine would do so for long

    def _keep_up(self) -> None:
        reservations = self._aws.client("ec2").describe_instances()["Reservations"]
        instances = [instance for reservation in reservations for instance in reservation["Instances"]]
        running = {one["InstanceId"]: one for one in instances if one["State"]["Name"] in ("pending", "running")}
        for machine in self.alive:
            if self._processes[machine.instance].poll() is not None:
                raise RuntimeError(f"a machine ended by itself: {machine.told()}")
            if machine.instance not in running:
                self._end(machine.instance)
        for instance in running.keys() - self._processes.keys():
            self._start(running[instance])

    def _start(self, instance: dict[str, Any]) -> None:
        home = self._place / instance["InstanceId"]
        machine = Machine(
            instance=instance["InstanceId"],
            kind=instance["InstanceType"],
            private=instance["PrivateIpAddress"],
            public=instance["PublicIpAddress"],
            home=str(home),
        )
        (home / ".ssh").mkdir(parents=True)
        pairs = self._aws.client("ec2").describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)
        (home / ".ssh" / "authorized_keys").write_text(pairs["KeyPairs"][0]["PublicKey"].strip() + "\n")
        for name, text in self._image.items():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o755)
        with (home / "console.log").open("wb") as log:
            process = subprocess.Popen(
                [*NAMESPACES, sys.executable, __file__, json.dumps(asdict(machine))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ["PATH"]},
            )
        while network_of(process.pid) == network_of(os.getpid()):
            time.sleep(0.01)
        plug = f"plug{len(self.all)}"
        ip("link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", process.pid)
        ip("link", "set", plug, "master", "cloud", "up")
        for address in (machine.private, machine.public):
            ip("route", "replace", address, "dev", "cloud")
        self._processes[machine.instance] = process
        self.all.append(machine)

    def _end(self, instance: str) -> None:
        process = self._processes.pop(instance)
        process.kill()
        process.wait()


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


def network_of(process: int) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())


def become_laptop(folder: Path) -> Path:
    """Cut this process off from its host, and give it a bridge for machines; its home."""
    home = folder / "laptop"
    home.mkdir()
    _hide_host(folder, home, "")
    ip("link", "set", "lo", "up")
    ip("link", "add", "cloud", "type", "bridge")
    for address in (GATEWAY, METADATA):
        ip("address", "add", address, "dev", "cloud")
    ip("link", "set", "cloud", "up")
    # Machines reach each other through here; who asks for the world is told at once that there is none.
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    return home


def become_machine(machine: Machine) -> None:
    """Inside its namespaces; does not return."""
    home = Path(machine.home)
    socket.sethostname(machine.name)
    _hide_host(home.parent.parent, home, f"{machine.private} {machine.name}\n")
    while "eth0" not in (name for _, name in socket.if_nameindex()):
        time.sleep(0.01)
    ip("link", "set", "lo", "up")
    for address in (machine.private, machine.public):
        ip("address", "add", address, "dev", "eth0")
    ip("link", "set", "eth0", "up")
    ip("route", "add", GATEWAY, "dev", "eth0")
    ip("route", "add", "default", "via", GATEWAY, "src", machine.private)
    key, config = home / ".ssh" / "host", home / ".ssh" / "sshd_config"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config.write_text(
        f"Port 22\nListenAddress 0.0.0.0\nHostKey {key}\nAuthorizedKeysFile {home}/.ssh/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
        "LogLevel FATAL\n"
    )
    Path("/run/sshd").mkdir(mode=0o755)
    program = shutil.which("sshd")
    assert program
    os.execv(program, [program, "-D", "-e", "-f", str(config)])


def _hide_host(folder: Path, home: Path, hosts: str) -> None:
    """Give this process one user, and /run, /dev/shm and /tmp of its own; `folder` and what Python needs stay in place.

    The user is root by number: the environment that it works in may be root's alone.
    """
    passwd, names, temporary = home / ".passwd", home / ".hosts", home / ".tmp"
    passwd.write_text(f"{USER}:x:0:0::{home}:/bin/bash\nsshd:x:74:65534::/run/sshd:/bin/false\n")
    names.write_text(f"127.0.0.1 localhost\n{hosts}")
    temporary.mkdir()
    _mount("--bind", passwd, "/etc/passwd")
    _mount("--bind", names, "/etc/hosts")
    for shared in ("/run", "/dev/shm"):
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", shared)
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", temporary)
    for kept in sorted({folder, ROOT, Path(sys.prefix), Path(sys.base_prefix)}):
        if kept.is_relative_to("/tmp"):
            there = temporary / kept.relative_to("/tmp")
            there.mkdir(parents=True, exist_ok=True)
            _mount("--bind", kept, there)
    _mount("--rbind", temporary, "/tmp")


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


if __name__ == "__main__":
    become_machine(Machine(**json.loads(sys.argv[1])))
