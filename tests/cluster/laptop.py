"""A laptop on which the commands of cluster/README.md are given, as they stand there."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from files import CLUSTER, ROOT


class Laptop:
    """A home, the cluster file in it, and what each command said."""

    def __init__(self, home: Path, variables: Mapping[str, str], **words: str) -> None:
        """`words` are what is put for README.md's own, such as BUCKET."""
        self.home = home
        self.file = home / "gpu.yaml"
        self.said: dict[str, str] = {}
        self._words = words
        self._variables = {
            "HOME": str(home),
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TERM": "xterm",
        } | dict(variables)

    def command(self, beginning: str) -> str:
        """The one command of README.md that begins like that, for this cluster file and these words."""
        pattern = rf"^{re.escape(beginning)}(?:.*\\\n)*.*?(?= +#|$)"
        found = set(re.findall(pattern, (CLUSTER / "README.md").read_text(), re.MULTILINE))
        assert len(found) == 1, f"README.md has {len(found)} commands that begin with {beginning}"
        text: str = found.pop().replace("cluster/gpu.yaml", str(self.file))
        for word, meant in self._words.items():
            text = re.sub(rf"\b{word}\b", meant, text)
        return text

    def start(self, name: str, beginning: str, flags: str = "") -> subprocess.Popen[str]:
        """It goes on beside others; what it says is in `name`.log."""
        token = "export RAY_AUTH_MODE=token; " if "tune_bisenet.submit" in beginning else ""
        with (self.home / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                ["bash", "-c", f"{token}{self.command(beginning)} {flags}"],
                cwd=self.home if "tune_bisenet.report" in beginning else ROOT,
                env=self._variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, name: str, beginning: str, flags: str = "", *, seconds: float = 900) -> str:
        """To its end, which has to be a good one; what it said."""
        process = self.start(name, beginning, flags)
        process.communicate(timeout=seconds)
        self.said[name] = self.log(name)
        if process.returncode:
            raise SystemExit(f"{beginning} ended with {process.returncode}:\n{self.said[name]}")
        return self.said[name]

    @contextmanager
    def tunnel(self, name: str, beginning: str, port: int) -> Iterator[subprocess.Popen[str]]:
        """A command that leads a port of this laptop to the head."""
        process = self.start(name, beginning)
        try:
            wait(lambda: process.poll() is not None or answers("127.0.0.1", port), 250, f"{beginning}: no tunnel")
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
            self.said[name] = self.log(name)

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")

    def told(self) -> str:
        """The ends of all logs, for a person who looks for what went wrong."""
        logs = sorted(self.home.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "".join(f"  {path.name}:\n{self.log(path.stem)[-3000:]}\n" for path in logs)


def answers(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


def wait(until: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise SystemExit(f"{complaint} within {seconds:g} s")
        time.sleep(1)
