"""Processes for tests: the driver of a search, others with a log, and what lives on this machine."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

PROJECT = Path(__file__).parents[2]

TIMEOUT_SECONDS = 900
"""How long a test waits for what must happen: a busy machine is slow, and nothing is timed here."""

_PORTS = iter(random.sample(range(20_000, 32_000), 12_000))


def free_port() -> int:
    """Return a port that the system gives to nobody, Ray least of all, before it is used."""
    for port in _PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


def environment(place: Path) -> dict[str, str]:
    """Return the variables of a process that works in `place`: none of Ray's, Tune's or a data set's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_", "CITYSCAPES"))}
    return kept | {"TUNE_BISENET_CACHE": str(place / "cache"), "RAY_TMPDIR": str(place)}


# --- what lives on this machine ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    title: str

    @property
    def trains(self) -> bool:
        """Return whether it is a worker of Ray that trains."""
        return self.title.startswith("ray::ImplicitFunc")

    @property
    def is_raylet(self) -> bool:
        """Return whether it is the daemon of a node of Ray, the parent of its workers."""
        return "/raylet/raylet " in self.title


def processes() -> list[Process]:
    """Return the processes of this machine, or of this namespace, without zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(errors="replace")  # a name of 15 bytes may end within a letter
            state, parent, _group, session = stat.rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append(Process(int(folder.name), int(parent), int(session), title))
    return found


def end_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself in the meantime
        os.kill(pid, number)


def hears_signals(pid: int) -> bool:
    """Return whether a process waits for SIGTERM, by `sigwait`."""
    blocked = re.search(r"^SigBlk:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(blocked and int(blocked[1], 16) >> (signal.SIGTERM - 1) & 1)


# --- a process with a log ---------------------------------------------------------------------------------------------


class LoggedProcess:
    """A process that leads a session of its own and writes a log; with it, all that it has started is killed."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: dict[str, str],
        cwd: Path = PROJECT,
        stderr: IO[bytes] | None = None,
    ) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stderr or subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        deadline = time.monotonic() + 120
        while self.kill() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.process.wait(timeout=120)
        if error is not None:
            print(self.log)  # noqa: T201 - pytest shows it with the failure

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], *, seconds: float = TIMEOUT_SECONDS) -> None:
        """Wait for `condition` while the process runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the process ended with {self.process.returncode} too early"
            assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
            time.sleep(0.02)

    def end(self, *, seconds: float = TIMEOUT_SECONDS) -> int:
        """Wait for the process's own end and return its exit code."""
        return self.process.wait(timeout=seconds)

    def processes(self) -> list[Process]:
        """Return the processes of the session."""
        return [process for process in processes() if process.session == self.process.pid]

    def assert_nothing_lives_on(self) -> None:
        """Check that the session ends; what it has ended may take a moment to be gone."""
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)

    def kill(self) -> int:
        """Kill what is left of the session and return how many processes that were."""
        left = self.processes()
        for process in left:
            end_process(process.pid, signal.SIGKILL)
        return len(left)


class Driver(LoggedProcess):
    """`python -m tune_bisenet.run`, with all that Ray starts for it: in fp32, as that is the same on all machines."""

    def __init__(self, place: Path, *flags: str, cwd: Path = PROJECT, variables: dict[str, str] | None = None) -> None:
        if not {"--precision", "--resume", "--add", "--rerun"} & set(flags):
            flags = (*flags, "--precision", "fp32")
        super().__init__(
            [sys.executable, "-m", "tune_bisenet.run", *flags],
            log=place / f"{time.time_ns()}.log",
            env=environment(place) | {"PYTHONPATH": str(PROJECT)} | (variables or {}),
            cwd=cwd,
        )

    def trainers(self) -> list[int]:
        """Return the processes that train."""
        return [process.pid for process in self.processes() if process.trains]
