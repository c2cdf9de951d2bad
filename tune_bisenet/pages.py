"""TensorBoard and optuna-dashboard on a cluster's head, for that machine alone: an SSH tunnel leads to them.

python -m tune_bisenet.pages --storage s3://bucket/searches

What they show is copied from object storage to a local folder, again and again: event files by what was appended, and
studies when they have changed. So one way serves every kind of storage, and the pages stay quick. Nothing is written
to storage.
"""

import argparse
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import pyarrow
import pyarrow.fs

from tune_bisenet.records import STUDY
from tune_bisenet.storage import Storage, one_line

HOST: Final = "127.0.0.1"
TENSORBOARD_PORT: Final = 6006
OPTUNA_PORT: Final = 8080
EVERY_SECONDS: Final = 30.0
END_SECONDS: Final = 10.0
TABLE: Final = ".experiment"
"""The end of the name of the event file that holds the table of hyper-parameters."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    given = _parser().parse_args(argv)
    try:
        storage = Storage.at(given.storage)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended, too
    pages = Pages(storage, Path(given.local).expanduser(), given.tensorboard_port, given.optuna_port)
    try:
        while True:
            pages.refresh()
            time.sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        return 130
    finally:
        pages.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.pages",
        description=f"Show what searches leave on storage: TensorBoard and, when there is a study, optuna-dashboard, "
        f"both on {HOST} only.",
        allow_abbrev=False,
    )
    parser.add_argument("--storage", metavar="DIR_OR_URI", required=True, help="where searches are kept")
    parser.add_argument("--local", metavar="DIR", default="~/pages", help="for the copies (default: ~/pages)")
    parser.add_argument("--tensorboard-port", metavar="N", type=int, default=TENSORBOARD_PORT)
    parser.add_argument("--optuna-port", metavar="N", type=int, default=OPTUNA_PORT, help="of the newest study")
    return parser


class Pages:
    """What is shown, and the two servers that show it. Storage on a disk of this machine is shown as it is."""

    def __init__(self, storage: Storage, local: Path, tensorboard_port: int, optuna_port: int) -> None:
        self._storage = storage
        self._local = storage.local_path or local
        self._local.mkdir(parents=True, exist_ok=True)
        self._optuna_port = optuna_port
        self._study: Path | None = None
        self._servers = {"tensorboard": _serve("tensorboard", "--logdir", self._local, "--port", tensorboard_port)}

    def refresh(self) -> None:
        """Bring the copies up to date, show the newest study, start again what has died.

        Storage that is away for a while only costs time.
        """
        try:
            studies = copy_pages(self._storage, self._local)
        except (OSError, pyarrow.ArrowException) as error:
            log.warning("storage cannot be read now: %s", one_line(error))
            return
        if studies and studies[-1] != self._study:
            self._study = studies[-1]
            self._show(self._study)
        for name, server in self._servers.items():
            if server.poll() is not None:
                log.warning("%s had ended with code %s and is started again", name, server.returncode)
                self._servers[name] = subprocess.Popen(server.args, stdin=subprocess.DEVNULL)

    def _show(self, study: Path) -> None:
        if "optuna-dashboard" in self._servers:
            _end(self._servers["optuna-dashboard"])
        self._servers["optuna-dashboard"] = _serve(
            "optuna-dashboard", f"sqlite:///{study}", "--port", self._optuna_port
        )
        log.info("optuna-dashboard shows the study of %s", study.parent.name)

    def close(self) -> None:
        """End both servers."""
        for server in self._servers.values():
            _end(server)


def copy_pages(storage: Storage, local: Path) -> list[Path]:
    """Copy event files and studies that have changed; the copies of all studies, the one written last at the end."""
    selector = pyarrow.fs.FileSelector(storage.path, recursive=True, allow_not_found=True)
    studies = []
    for file in storage.filesystem.get_file_info(selector):
        target = local / Path(file.path).relative_to(storage.path)
        is_study = file.base_name == STUDY
        if is_study:
            studies.append((file.mtime_ns, target))
        if storage.local_path is None and (is_study or ".tfevents." in file.base_name):
            _copy(storage, file, target, _renew_study if is_study else _renew_events)
    return [target for _, target in sorted(studies)]


Renew = Callable[[Storage, pyarrow.fs.FileInfo, Path], None]


def _copy(storage: Storage, file: pyarrow.fs.FileInfo, target: Path, renew: Renew) -> None:
    """Renew a copy that is not of the time of its source, or an event file that has another size: times are coarse."""
    if target.exists():
        had = target.stat()
        if had.st_mtime_ns == file.mtime_ns and (renew is _renew_study or had.st_size == file.size):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    renew(storage, file, target)
    os.utime(target, ns=(file.mtime_ns, file.mtime_ns))


def _renew_events(storage: Storage, file: pyarrow.fs.FileInfo, target: Path) -> None:
    """A trial's events only grow, and TensorBoard keeps the file open: add what is new. The table is written anew."""
    have = target.stat().st_size if target.exists() else 0
    grows = 0 < have <= file.size and not file.base_name.endswith(TABLE)
    with storage.filesystem.open_input_file(file.path) as source, target.open("ab" if grows else "wb") as copy:
        source.seek(have if grows else 0)
        copy.write(source.read())


def _renew_study(storage: Storage, file: pyarrow.fs.FileInfo, target: Path) -> None:
    """By SQLite's own backup, into the same file: optuna-dashboard keeps it open."""
    fresh = target.with_suffix(".fresh")
    with storage.filesystem.open_input_stream(file.path) as source:
        fresh.write_bytes(source.read())
    with closing(sqlite3.connect(fresh)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    fresh.unlink()


def _serve(script: str, *words: object) -> subprocess.Popen[bytes]:
    """Start a script of this environment."""
    command = [str(Path(sys.executable).with_name(script)), "--host", HOST, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Kindly first. TensorBoard may be deaf to that: the signal is lost if it comes while a request is handled."""
    server.terminate()
    try:
        server.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
