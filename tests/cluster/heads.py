"""A real head of a Ray cluster that asks for its token, a tunnel to it that can be cut, and `submit` through that."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from helpers.processes import PROJECT, TIMEOUT_SECONDS, LoggedProcess, end_process, environment, free_port, processes

SUBMIT = ["-m", "tune_bisenet.cluster.submit"]


def submit_with_patience(seconds: float) -> list[str]:
    """Return the same command with other RECONNECT_SECONDS than five minutes."""
    code = f"import sys; from tune_bisenet.cluster import submit; submit.RECONNECT_SECONDS = {seconds}"
    return ["-c", f"{code}; sys.exit(submit.main(sys.argv[1:]))"]


class Head(LoggedProcess):
    """`ray start --head` with two cores, without this project in its path."""

    def __init__(self, place: Path, *, token: str = "") -> None:
        self.port = free_port()
        self.token = place / "token"
        self.token.write_text(token or secrets.token_hex(32))
        self.token.chmod(0o600)
        python = Path(sys.executable).parent
        env = environment(place) | self.credentials | {"PATH": f"{python}:{os.environ['PATH']}"}
        env.pop("PYTHONPATH", None)
        flags = ["--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={place / 'ray'}", "--block"]
        ports = ["--port=0", f"--dashboard-port={self.port}", f"--dashboard-agent-listen-port={free_port()}"]
        ports += [f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        command = [str(python / "ray"), "start", "--head", "--disable-usage-stats", *flags, *ports]
        super().__init__(command, log=place / "head.log", env=env, cwd=place)

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

    @contextmanager
    def trials_paused(self) -> Iterator[None]:
        """Halt the processes that train, so that no search ends meanwhile, however slow this machine is."""
        alive, folder = processes(), str(self.token.parent)
        raylets = {process.pid for process in alive if process.is_raylet and folder in process.title}
        workers = [process for process in alive if process.trains and process.parent in raylets]
        assert workers, "a trial runs"
        for worker in workers:
            os.kill(worker.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in workers:
                os.kill(worker.pid, signal.SIGCONT)

    def vanish(self) -> None:
        """Kill all that runs on it, drivers of jobs too, as when a machine loses its power."""
        alive = processes()
        family = [process for process in alive if process.pid == self.process.pid]
        for parent in family:  # which grows meanwhile
            family += [process for process in alive if process.parent == parent.pid]
        sessions = {process.session for process in family}  # each job has one of its own
        while left := [process for process in processes() if process.session in sessions]:
            for process in left:
                end_process(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()


def submit(head: Head, *words: str, credentials: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `submit` against the head to its end."""
    return subprocess.run(
        [sys.executable, *SUBMIT, "--address", f"http://127.0.0.1:{head.port}", *words],
        cwd=PROJECT,
        env=environment(head.token.parent) | (head.credentials if credentials is None else credentials),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )


class Tunnel:
    """A port of its own that leads to another, until it is cut."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Self:
        self.mend()
        return self

    def __exit__(self, *_error: object) -> None:
        self.cut()

    def mend(self, *, target: int | None = None) -> None:
        """Lead to where it led before, or to another port."""
        self._target = target or self._target
        listener = socket.create_server(("127.0.0.1", self.port))
        self._ends = [listener]
        self._accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._accepting.start()

    def cut(self) -> None:
        with suppress(OSError):  # it may have been cut before
            self._ends[0].shutdown(socket.SHUT_RDWR)
        self._accepting.join(timeout=10)
        for end in self._ends:
            with suppress(OSError):  # its other side may have closed it
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                here, _ = listener.accept()
                self._ends.append(here)
                try:
                    there = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # the head is lost
                    here.close()
                    continue
                self._ends.append(there)
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)


class Follower(LoggedProcess):
    """`submit` through a tunnel, while other things happen. Its log is what it prints to standard output."""

    def __init__(self, head: Head, tunnel: Tunnel, *words: str, command: list[str]) -> None:
        log = head.token.parent / f"{time.time_ns()}.log"
        self._messages = log.with_suffix(".messages")
        with self._messages.open("wb") as messages:
            super().__init__(
                [sys.executable, *command, "--address", f"http://127.0.0.1:{tunnel.port}", *words],
                log=log,
                env=environment(head.token.parent) | head.credentials,
                stderr=messages,
            )

    @property
    def messages(self) -> str:
        return self._messages.read_text()
