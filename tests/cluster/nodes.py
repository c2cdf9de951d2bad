"""A Ray cluster of several nodes on this machine, in processes of its own, for the tests that take nodes away.

`python nodes.py CPUS_OF_HEAD CPUS_OF_EACH_OTHER...` starts one and reads commands: `remove ID` takes a node away
without notice, `add CPUS` adds one. It prints its address and the id of each node, and ends with its standard input.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from helpers.processes import PROJECT, Process, end_process, environment, processes


class Nodes:
    """A cluster in a session of its own, of which nothing is left behind."""

    def __init__(self, place: Path, *cpus: int, token: str = "") -> None:
        self._log = place / f"nodes-{time.time_ns()}.log"
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *map(str, cpus)],
                env=environment(place) | {"PYTHONPATH": str(PROJECT / "tests")} | self.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.address = self._reply()
        self.ids = [self._reply() for _ in cpus]
        """The head first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=120)
        finally:
            for process in self._processes():
                end_process(process.pid, signal.SIGKILL)
            self._process.stdout.close()
            if error is not None:
                print(self._log.read_text(errors="replace"))  # noqa: T201 - pytest shows it with the failure

    def remove(self, node_id: str) -> None:
        """Take the machine away without notice."""
        self._send(f"remove {node_id}")
        assert self._reply() == f"removed {node_id}"

    def shut_down(self, node_id: str) -> None:
        """Ask its processes to end, as a machine does that is switched off, or `docker stop`."""
        for pid in self._raylets(node_id):
            end_process(pid, signal.SIGTERM)

    def add(self, cpus: int) -> str:
        """Return the new node's id."""
        self._send(f"add {cpus}")
        return self._reply()

    def lives(self, node_id: str) -> bool:
        return bool(self._raylets(node_id))

    def trainers(self, node_id: str) -> list[int]:
        """Return the processes that train on that node."""
        raylets = self._raylets(node_id)
        trainers = [process for process in self._processes() if process.title.startswith("ray::ImplicitFunc")]
        return [process.pid for process in trainers if process.parent in raylets]

    def _raylets(self, node_id: str) -> list[int]:
        titles = {process.pid: process.title for process in self._processes()}
        return [pid for pid, title in titles.items() if "/raylet/raylet " in title and node_id in title]

    def _processes(self) -> list[Process]:
        return [process for process in processes() if process.session == self._process.pid]

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _reply(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the cluster has ended: {self._log.read_text(errors='replace')}"
        return line.strip()


def serve(cpus: list[int]) -> None:
    from ray.cluster_utils import Cluster

    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no reply

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    nodes = {node.node_id: node for node in (cluster.head_node, *(cluster.add_node(num_cpus=n) for n in cpus[1:]))}
    print(cluster.address, *nodes, sep="\n", file=output, flush=True)
    for line in sys.stdin:
        verb, argument = line.split()
        if verb == "remove":
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
            print("removed", argument, file=output, flush=True)
        else:
            node = cluster.add_node(num_cpus=int(argument))
            nodes[node.node_id] = node
            print(node.node_id, file=output, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve([int(count) for count in sys.argv[1:]])
