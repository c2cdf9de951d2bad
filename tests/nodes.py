"""A Ray cluster of several nodes on this machine, in processes of its own, for the tests that take nodes away.

`python nodes.py CPUS_OF_HEAD CPUS_OF_EACH_OTHER...` starts one and obeys: `remove ID` takes a node away as a machine
does that is simply gone, `add CPUS` adds one. It says each node as a line of JSON, and ends with its standard input.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from driving import Driver, end_process, environment

UNSHARED = ("unshare", "--mount")
"""Mounts of its own. For root alone."""


class Nodes:
    """A cluster in a session of its own; nothing of it is left behind."""

    def __init__(self, place: Path, *cpus: int, token: str = "") -> None:
        self._log = place / f"nodes-{time.time_ns()}.log"
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *map(str, cpus)],
                env=environment(place) | self.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.address: str = self._said()["address"]
        self.ids = [self._said()["id"] for _ in cpus]
        """The head first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=120)
        finally:
            for one in self._processes():
                end_process(one.pid, signal.SIGKILL)
            self._process.stdout.close()
            if error is not None:
                print(self._log.read_text(errors="replace"))  # noqa: T201 - pytest shows it with the failure

    def remove(self, node_id: str) -> None:
        """Take the machine away, without a word to Ray."""
        self._tell(f"remove {node_id}")
        assert self._said() == {"removed": node_id}

    def shut_down(self, node_id: str) -> None:
        """As a machine does that is switched off, or `docker stop`: its processes are asked to end."""
        for pid in self._raylets(node_id):
            end_process(pid, signal.SIGTERM)

    def add(self, cpus: int) -> str:
        """Its id."""
        self._tell(f"add {cpus}")
        found: str = self._said()["id"]
        return found

    def lives(self, node_id: str) -> bool:
        """Whether the node's raylet is there."""
        return bool(self._raylets(node_id))

    def trainers(self, node_id: str) -> list[int]:
        """The processes that train on that node."""
        raylets = self._raylets(node_id)
        return [
            one.pid for one in self._processes() if one.parent in raylets and one.title.startswith("ray::ImplicitFunc")
        ]

    def _raylets(self, node_id: str) -> list[int]:
        return [one.pid for one in self._processes() if "/raylet/raylet " in one.title and node_id in one.title]

    def _processes(self) -> "list[Process]":
        return [one for one in processes() if one.session == self._process.pid]

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _said(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the cluster has ended: {self._log.read_text(errors='replace')}"
        said: dict[str, Any] = json.loads(line)
        return said


class Joined(Driver):
    """One more node with a core, in a session of its own, as another machine is; `lacks` is empty to it."""

    def __init__(self, place: Path, address: str, *, lacks: Path | None = None) -> None:
        self._log = place / f"joined-{time.time_ns()}.log"
        ray = [str(Path(sys.executable).with_name("ray")), "start", f"--address={address}", "--num-cpus=1", "--block"]
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        apart = [*UNSHARED, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(lacks)] if lacks else []
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*apart, *ray, "--object-store-memory=100000000", *ports],
                env=environment(place) | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_there(self) -> bool:
        """Whether the cluster knows it."""
        return "Ray runtime started" in self.log


def reason_not_to_unshare(*command: str) -> str:
    """Why a command such as `unshare` cannot be used here; empty if it can."""
    if shutil.which(command[0]) is None:
        return f"util-linux's {command[0]} is needed"
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces of its own: {done.stderr.strip()}"


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    title: str


def processes() -> list[Process]:
    """Those that live on this machine, or in this namespace."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(errors="replace")  # a name of 15 bytes may end within a letter
            state, parent, _group, session = stat.rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append(Process(int(folder.name), int(parent), int(session), title))
    return found


def serve(cpus: list[int]) -> None:
    from ray.cluster_utils import Cluster

    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints is no word of ours

    def say(**record: str) -> None:
        words.write(json.dumps(record) + "\n")
        words.flush()

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    nodes = {node.node_id: node for node in (cluster.head_node, *(cluster.add_node(num_cpus=n) for n in cpus[1:]))}
    say(address=cluster.address)
    for node_id in nodes:
        say(id=node_id)
    for line in sys.stdin:
        verb, argument = line.split()
        if verb == "remove":
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
            say(removed=argument)
        else:
            node = cluster.add_node(num_cpus=int(argument))
            nodes[node.node_id] = node
            say(id=node.node_id)
    cluster.shutdown()


if __name__ == "__main__":
    serve([int(count) for count in sys.argv[1:]])
