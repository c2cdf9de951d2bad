"""A real head of a Ray cluster that asks for its token, a tunnel to it that can be cut, and a command behind that."""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from driving import PATIENCE_SECONDS, PROJECT, Driver, end_process, environment
from nodes import Process, processes

SUBMIT = ["-m", "tune_bisenet.submit"]


def submit_that_waits(seconds: float) -> list[str]:
    """The same command line, which waits so long for a cluster that does not answer, instead of five minutes."""
    patience = f"from tune_bisenet.jobs import api; api.PATIENCE_SECONDS = {seconds}"
    return ["-c", f"import sys; from tune_bisenet import submit; {patience}; sys.exit(submit.main(sys.argv[1:]))"]


_PORTS = iter(random.sample(range(20_000, 32_000), 12_000))


def free_port() -> int:
    """None of those that the system gives out: nobody, Ray least of all, is given it before it is used."""
    for port in _PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


class Head(Driver):
    """`ray start --head` with two cores, in a session of its own, that knows nothing of this project."""

    def __init__(self, place: Path, *, token: str = "") -> None:
        """`token`: that of a person who has other clusters, too."""
        self.port = free_port()
        self.token = place / "token"
        self.token.write_text(token or secrets.token_hex(32))
        self.token.chmod(0o600)
        self._log = place / "head.log"
        python = Path(sys.executable).parent
        there = environment(place) | self.credentials | {"PATH": f"{python}:{os.environ['PATH']}"}
        there.pop("PYTHONPATH", None)
        flags = ["--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={place / 'ray'}", "--block"]
        ports = ["--port=0", f"--dashboard-port={self.port}", f"--dashboard-agent-listen-port={free_port()}"]
        ports += [f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(python / "ray"), "start", "--head", "--disable-usage-stats", *flags, *ports],
                cwd=place,
                env=there,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def credentials(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def answers(self) -> bool:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/version", headers={"Authorization": f"Bearer {self.token.read_text()}"}
        )
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
        return False

    def vanish(self) -> None:
        """As a machine whose power is cut: nothing of it lives on, no worker and no job's driver either."""
        sessions = {one.session for one in _family(self.process.pid)}  # each job has one of its own
        while left := [one for one in processes() if one.session in sessions]:
            for one in left:
                end_process(one.pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()


def _family(pid: int) -> list[Process]:
    """The process, and all that it has started, directly or not."""
    there = processes()
    found = [one for one in there if one.pid == pid]
    for parent in found:  # which grows meanwhile
        found += [one for one in there if one.parent == parent.pid]
    return found


def submit(
    head: Head, *words: str, credentials: dict[str, str] | None = None, seconds: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """The command line to the head, run to its end."""
    return subprocess.run(
        [sys.executable, *SUBMIT, "--address", f"http://127.0.0.1:{head.port}", *words],
        cwd=PROJECT,
        env=environment(head.token.parent) | (head.credentials if credentials is None else credentials),
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


class Tunnel:
    """A port of its own that leads to another, until it is cut."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Tunnel":
        self.mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    def mend(self, *, target: int | None = None) -> None:
        """To where it led before, or to another port."""
        self._target = target or self._target
        listener = socket.create_server(("127.0.0.1", self.port))
        self._ends = [listener]
        self._start(self._accept, listener)

    def cut(self) -> None:
        for end in self._ends:
            with suppress(OSError):  # it may have been closed by its other side
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)
        for end in self._ends:
            end.close()
        self._ends, self._threads = [], []

    def _start(self, work: Callable[..., None], *ends: socket.socket) -> None:
        thread = threading.Thread(target=work, args=ends, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [here, there]
                self._start(self._pump, here, there)
                self._start(self._pump, there, here)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)


class Follower(Driver):
    """The command line through a tunnel, while other things happen."""

    def __init__(self, head: Head, tunnel: Tunnel, *words: str, how: list[str]) -> None:
        self._log = head.token.parent / f"{time.time_ns()}.log"
        self._said = self._log.with_suffix(".said")
        with self._log.open("wb") as log, self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, *how, "--address", f"http://127.0.0.1:{tunnel.port}", *words],
                cwd=PROJECT,
                env=environment(head.token.parent) | head.credentials,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=said,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()
