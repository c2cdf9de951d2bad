"""Run beside Ray on a cluster's machines: a watcher of spot notices on workers, dashboards on the head.

    python -m tune_bisenet.cluster.daemons spot --cloud aws
    python -m tune_bisenet.cluster.daemons dashboards --storage s3://bucket/searches

The watcher drains its node when the cloud announces that it will take the machine away: the node gets no new trials,
and those that run continue for as long as the machine lives. Ray then does not count their loss as a failure. The
dashboards, TensorBoard and optuna-dashboard, listen on 127.0.0.1 alone. They show a local copy of what is in object
storage: TensorBoard reads s3:// by itself, but no gs://, and optuna-dashboard needs a file.
"""

import argparse
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.error import HTTPError

import pyarrow
import pyarrow.fs

from tune_bisenet.records import STUDY
from tune_bisenet.storage import Storage
from tune_bisenet.text import absolute_path, one_line

METADATA_URLS: Final = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}

POLL_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 2.0  # of the metadata service, which is on the machine's own link
GCP_SECONDS: Final = 30.0  # what Google leaves a machine after its notice
DRAIN_SECONDS: Final = 60.0  # for one attempt to drain a node
REFRESH_SECONDS: Final = 30.0
END_SECONDS: Final = 10.0

EARLY: Final = 0.5
"""The share of the time left that Ray is given as the deadline. Ray takes the loss of a node for a preemption only if
it comes after the deadline; until then and after it, trials continue."""

_log = logging.getLogger("tune_bisenet.cluster.daemons")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one daemon: the watcher until its node is drained, the dashboards until they are killed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    options = _parser().parse_args(argv)
    if options.daemon == "dashboards":
        return serve_dashboards(options.storage, options.local, options.tensorboard_port, options.optuna_port)
    look = {"aws": aws_notice, "gcp": gcp_notice}[options.cloud]
    watch(
        lambda: look(options.metadata_url or METADATA_URLS[options.cloud]),
        lambda notice: drain(notice, address=options.address, node_id=options.node_id),
        poll_seconds=options.poll_seconds,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tune_bisenet.cluster.daemons", allow_abbrev=False)
    daemons = parser.add_subparsers(dest="daemon", required=True)
    spot = daemons.add_parser("spot", help="drain this node of Ray when the cloud takes its spot machine away")
    spot.add_argument("--cloud", required=True, choices=sorted(METADATA_URLS))
    spot.add_argument("--poll-seconds", type=float, default=POLL_SECONDS, metavar="S", help="default: %(default)g")
    spot.add_argument("--metadata-url", metavar="URL", help="ask here instead of the cloud's metadata service")
    spot.add_argument("--address", default="auto", metavar="HOST:PORT", help="default: the Ray on this machine")
    spot.add_argument("--node-id", metavar="HEX", help="the node to drain (default: the one on this machine)")
    dashboards = daemons.add_parser("dashboards", help="show searches in TensorBoard and optuna-dashboard")
    dashboards.add_argument("--storage", required=True, metavar="DIR_OR_URI", help="where searches are kept")
    dashboards.add_argument("--local", default="~/dashboards", metavar="DIR", help="for copies (default: %(default)s)")
    dashboards.add_argument("--tensorboard-port", type=int, default=6006, metavar="N", help="default: %(default)s")
    dashboards.add_argument("--optuna-port", type=int, default=8080, metavar="N", help="default: %(default)s")
    return parser


# --- the watcher of spot notices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notice:
    """An announcement of the cloud that it will take this machine away."""

    reason: str
    seconds_left: float


def aws_notice(url: str) -> Notice | None:
    """Return the notice that IMDSv2 gives two minutes before; a recommendation to rebalance is none."""
    token = _ask(f"{url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    if token is None:
        raise ValueError("it gives out no token (PUT /latest/api/token)")
    answer = _ask(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if answer is None:
        return None
    action = json.loads(answer)
    at = datetime.fromisoformat(action["time"])
    return Notice(f"AWS will {action['action']} this machine at {at:%H:%M:%S %Z}", at.timestamp() - time.time())


def gcp_notice(url: str) -> Notice | None:
    """Return the notice of a preemption that Google gives half a minute before."""
    answer = _ask(f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if answer is None:
        raise ValueError("it has no page instance/preempted")
    return Notice("Google will take this machine away", GCP_SECONDS) if answer.strip() == "TRUE" else None


def _ask(url: str, headers: dict[str, str], *, method: str = "GET") -> str | None:
    """Return a page of the metadata service, past any proxy; None if there is no such page."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as response:
            return str(response.read().decode())
    except HTTPError as error:
        with error:
            if error.code == 404:
                return None
            raise


def watch(look: Callable[[], Notice | None], drain: Callable[[Notice], str], *, poll_seconds: float) -> None:
    """Poll `look` until it returns a notice, then `drain` until that returns no problem. Log what changes."""
    last_problem = ""
    while True:
        try:
            notice, problem = look(), ""
        except (OSError, ValueError, LookupError, TypeError) as error:  # it is away, or its answer makes no sense
            notice, problem = None, f"The metadata service does not answer: {error}. Trying again."
        if notice:
            if not (reason := drain(notice)):
                _log.warning("%s. Its node of Ray is drained: it gets no new trials.", notice.reason)
                return
            problem = f"{notice.reason}, but its node of Ray cannot be drained: {reason}. Trying again."
        if problem != last_problem:
            _log.warning("%s", problem or "The metadata service answers: there is no notice.")
            last_problem = problem
        time.sleep(poll_seconds)


def drain(notice: Notice, *, address: str, node_id: str | None) -> str:
    """Have Ray drain this node. Return why that failed; empty if it did not.

    The command is hidden in `ray --help`, but the only way to this that is no private Python code of Ray. It finds the
    node that it runs on, and the cluster's token where Ray does.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.reason]
    command += ["--deadline-remaining-seconds", str(max(1, int(notice.seconds_left * EARLY)))]
    command += ["--node-id", node_id] if node_id else []
    variables = {"RAY_ADDRESS": address} | os.environ  # set, it keeps the command from starting a Ray of its own
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=DRAIN_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {DRAIN_SECONDS:.0f} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else lines[-1].strip() if lines else f"exit code {done.returncode}"


# --- the dashboards -------------------------------------------------------------------------------------------------


def serve_dashboards(storage_uri: str, local: str, tensorboard_port: int, optuna_port: int) -> int:
    """Serve until SIGTERM or SIGINT. Return the exit code."""
    from tune_bisenet.study.study import sqlite_address  # late: a watcher does not wait for Optuna

    try:
        storage = Storage.at(storage_uri)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended, too
    folder = storage.local_path or absolute_path(local)
    folder.mkdir(parents=True, exist_ok=True)
    commands = {"tensorboard": ["--logdir", str(folder), "--port", str(tensorboard_port)]}
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while True:
            try:
                studies = copy_dashboards(storage, folder)
            except (OSError, pyarrow.ArrowException) as error:
                _log.warning("storage cannot be read now: %s", one_line(error))
            else:
                if studies:
                    commands["optuna-dashboard"] = [sqlite_address(studies[-1]), "--port", str(optuna_port)]
            _keep_serving(servers, commands)
            time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        return 130
    finally:
        for server in servers.values():
            _end(server)


def _keep_serving(servers: dict[str, subprocess.Popen[bytes]], commands: dict[str, list[str]]) -> None:
    """Start each server that does not run, or shows another study."""
    for name, flags in commands.items():
        command = [str(Path(sys.executable).with_name(name)), "--host", "127.0.0.1", *flags]
        if name in servers:
            if servers[name].poll() is None and servers[name].args == command:
                continue
            _end(servers[name])
        _log.info("starting %s %s", name, " ".join(flags))
        servers[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask first. TensorBoard loses a SIGTERM that comes while it handles a request."""
    server.terminate()
    try:
        server.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def copy_dashboards(storage: Storage, folder: Path) -> list[Path]:
    """Copy what has changed of event files and studies. Return the copies of all studies, the newest last.

    Storage on this machine's disk is shown as it is.
    """
    studies = []
    for file in storage.infos(recursive=True):
        copy = folder / Path(file.path).relative_to(storage.path)
        is_study = file.base_name == STUDY
        if is_study:
            studies.append((file.mtime_ns, copy))
        if storage.local_path or not (is_study or ".tfevents." in file.base_name):
            continue
        old = copy.stat() if copy.exists() else None
        if old and old.st_mtime_ns == file.mtime_ns and (is_study or old.st_size == file.size):
            continue  # an object's time is kept in seconds, so an event file can grow within it
        copy.parent.mkdir(parents=True, exist_ok=True)
        (_copy_study if is_study else _copy_events)(storage, file, copy)
        os.utime(copy, ns=(file.mtime_ns, file.mtime_ns))
    return [copy for _, copy in sorted(studies)]


def _copy_events(storage: Storage, file: pyarrow.fs.FileInfo, copy: Path) -> None:
    """Append what is new, since TensorBoard keeps the file open. The table of a search is the one that is rewritten."""
    size = copy.stat().st_size if copy.exists() else 0
    grows = 0 < size <= file.size and not file.base_name.endswith(".experiment")
    with storage.filesystem.open_input_file(file.path) as source, copy.open("ab" if grows else "wb") as target:
        source.seek(size if grows else 0)
        target.write(source.read())


def _copy_study(storage: Storage, file: pyarrow.fs.FileInfo, copy: Path) -> None:
    """Copy by SQLite's own backup into the same file, since optuna-dashboard keeps it open."""
    fresh = copy.with_suffix(".fresh")
    with storage.filesystem.open_input_stream(file.path) as source:
        fresh.write_bytes(source.read())
    with closing(sqlite3.connect(fresh)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    fresh.unlink()


if __name__ == "__main__":
    sys.exit(main())
