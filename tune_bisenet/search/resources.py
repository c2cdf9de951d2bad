"""Ray itself: one of our own on this machine or a cluster that is there, what each trial gets of it, and its death.

What is run on it is not known here.
"""

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_bisenet.config import Resources
from tune_bisenet.options import Options
from tune_bisenet.storage import RETRY_VARIABLE

_log = logging.getLogger(__name__)

RESTARTABLE: Final = 75
"""The exit code of a driver whose Ray has died under it (EX_TEMPFAIL): run it again with --resume."""

REACH_SECONDS: Final = 5.0

WATCH_SECONDS: Final = 1.0
"""Short: a driver that hears of it from Ray's own code may be ended by that, with exit code 1."""

PENDING_TRIALS: Final = 64
"""How many trials may ask Ray for resources before it has any."""

PROBE_SECONDS: Final = 60.0
"""How long a node may take to say whether it sees a file."""

HEAD: Final = "node:__internal_head__"
"""The resource by which Ray marks the head."""


class ClusterError(ValueError):
    """There is no such cluster, or it cannot hold what one trial asks for."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of a cluster, and what trials may take of it."""

    id: str
    cpus: float
    gpus: float = 0.0

    def room(self, *, cpus: int, gpus: float) -> int:
        """How many trials that ask for so much it holds at once. Parts of a GPU are taken of one and the same."""
        by_cpus = int(self.cpus / cpus)
        if not gpus:
            return by_cpus
        by_gpus = int(self.gpus / gpus) if gpus >= 1 else int(self.gpus) * int(1 / gpus)
        return min(by_cpus, by_gpus)


@dataclass(frozen=True)
class Cluster:
    """What Ray has at a moment: the living nodes that trials can run on."""

    nodes: tuple[Node, ...]
    grows: bool = False
    """Whether nodes come as trials ask for them and leave when idle, told by a head without any CPU."""

    def room(self, *, cpus: int, gpus: float) -> int:
        return sum(node.room(cpus=cpus, gpus=gpus) for node in self.nodes)

    def can_take(self, resources: Resources) -> int:
        """How many trials are to be out at once: as many as fit; where nodes come when asked for, one more asks.

        A bound that was given is asked for at once: then nodes come together instead of one after the other.
        """
        room = self.room(cpus=resources.cpus_per_trial, gpus=resources.gpus_per_trial)
        if self.grows:
            return resources.max_concurrent or room + 1
        return max(1, min(room, resources.max_concurrent or room))


@contextmanager
def ray_session(address: str | None) -> Iterator[Callable[[], Cluster]]:
    """A Ray of our own on this machine, or the cluster at `address`; yields what tells what it has at the moment.

    Raises ClusterError if nobody answers there.
    """
    configure_environment()
    if address is not None:
        _check_reachable(address)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _worker_environment()} if address else None,
        )
    except (ConnectionError, ValueError) as error:
        raise ClusterError(
            f"--address {address}: Ray cannot connect: {error}. Is its Ray the same version as here? "
            "If it asks for a token (RAY_AUTH_MODE=token), are that variable and the token set here too?"
        ) from error
    try:
        with _watched() as look:
            yield look
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself retries for minutes. `auto` and the like are left to it."""
    host, separator, port = address.rpartition(":")
    if "://" in address or not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}). `ray start --head` prints the address of one; "
            "leave --address out to use this machine alone."
        ) from error


def allocate(cluster: Cluster, asked: Options, *, num_trials: int) -> Resources:
    """Resources for each trial so that together they use the machines and no core is asked for twice.

    With GPUs, one for each trial unless `asked` says otherwise. Raises ClusterError if a trial cannot fit. Where nodes
    come as they are asked for, those that are there are no bound, and a GPU and a core are what is asked by default.
    """
    gpus = _gpus_each(cluster, asked)
    at_once = min(num_trials, asked.max_concurrent or num_trials)
    cpus = asked.cpus_per_trial or _cpus_each(cluster, gpus=gpus, at_once=at_once)
    room = cluster.room(cpus=cpus, gpus=gpus)
    if not room and not cluster.grows:
        raise ClusterError(
            f"a trial asks for {cpus} CPUs and {gpus:g} GPUs; {_has(cluster)}. "
            "Lower --cpus-per-trial or --gpus-per-trial."
        )
    return Resources(
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        max_concurrent=asked.max_concurrent,
        concurrency=max(1, min(at_once, room)),
        grows=cluster.grows,
    )


def _gpus_each(cluster: Cluster, asked: Options) -> float:
    if asked.device == "cuda" and asked.gpus_per_trial == 0:
        raise ClusterError("--device cuda and --gpus-per-trial 0 exclude each other: leave one of them out.")
    if asked.gpus_per_trial is not None:
        return asked.gpus_per_trial
    if asked.device == "auto":
        has_gpus = any(node.gpus for node in cluster.nodes)
        return 1.0 if has_gpus or (cluster.grows and not cluster.nodes) else 0.0
    return 1.0 if asked.device == "cuda" else 0.0


def _cpus_each(cluster: Cluster, *, gpus: float, at_once: int) -> int:
    """The most that so many trials, or as many of them as fit, can have each."""
    room = min(at_once, cluster.room(cpus=1, gpus=gpus))
    most = max((int(node.cpus) for node in cluster.nodes), default=0)
    return next((cpus for cpus in range(most, 1, -1) if room and cluster.room(cpus=cpus, gpus=gpus) >= room), 1)


def _has(cluster: Cluster) -> str:
    if not cluster.nodes:
        return "Ray has no node with a CPU"
    most = max(cluster.nodes, key=lambda node: (node.gpus, node.cpus))
    where = "Ray has" if len(cluster.nodes) == 1 else f"the largest of Ray's {len(cluster.nodes)} nodes has"
    return f"{where} {most.cpus:g} and {most.gpus:g}"


def check_shared(folder: Path, cluster: Cluster) -> None:
    """ClusterError unless every node sees what is written to `folder`: trials there would write to disks of their own.

    Nodes that come later are asked by the trials that run there; those that have just gone are nobody's any more.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as probe:
        asked = {
            node.id: _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                probe.name
            )
            for node in cluster.nodes
        }
        seen = [answer for node_id, ref in asked.items() if (answer := _answer(node_id, ref, folder)) is not None]
    if not all(seen):
        raise ClusterError(
            f"{seen.count(False)} of the cluster's {len(seen)} nodes do not see {folder}: on several machines "
            "--storage must be a URI, such as s3://bucket/searches, or a path that all of them share."
        )


def _answer(node_id: str, asked: Any, folder: Path) -> bool | None:
    """What the node says; None if it died in the meantime. ClusterError if it cannot tell."""
    try:
        return bool(ray.get(asked, timeout=PROBE_SECONDS))
    except RayError as error:
        if node_id not in (node["NodeID"] for node in _alive()):
            return None
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(f"a node of the cluster cannot look into {folder}: {reason}") from error


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    return Path(path).exists()


def configure_environment() -> None:
    for name, value in _worker_environment().items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours tells apart who asked, for the exit code
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its reporter prints a box of its own, even when silent
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # ours says it calmly where a machine was taken away
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its HParams show the last mIoU, not the best
    # By default a searcher's trials wait for one actor at a time, so that short ones never run side by side.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(PENDING_TRIALS))
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # In a job that was submitted with one of the workers' variables: Ray refuses to hear of it twice otherwise.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")


def _worker_environment() -> dict[str, str]:
    """Paths stay relative to where the user stands; a stopped trial has time to leave before its actor is reused.

    What the user, or the job that this runs in, has set otherwise holds for workers too, and how long storage is waited
    for: nodes of a cluster have an environment of their own.
    """
    defaults = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}
    given = {name: os.environ[name] for name in (*defaults, RETRY_VARIABLE) if name in os.environ}
    return defaults | given


@contextmanager
def _watched() -> Iterator[Callable[[], Cluster]]:
    """Look at the cluster again and again, and end the process if Ray has died: Tune would wait for it without end.

    Nothing is lost by that.
    """
    done = threading.Event()
    latest = _cluster_of(_alive())

    def watch() -> None:
        nonlocal latest
        while not done.wait(WATCH_SECONDS):
            nodes = _alive()
            if not nodes:
                _log.error("Ray has died under this search. Run the same command again with --resume.")
                os._exit(RESTARTABLE)
            latest = _cluster_of(nodes)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: latest
    finally:
        done.set()
        thread.join()


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _cluster_of(nodes: list[dict[str, Any]]) -> Cluster:
    found = [(node["NodeID"], node["Resources"]) for node in nodes]
    return Cluster(
        tuple(
            Node(id=node_id, cpus=has["CPU"], gpus=has.get("GPU", 0.0)) for node_id, has in found if has.get("CPU", 0)
        ),
        grows=any(HEAD in has and not has.get("CPU", 0) for _, has in found),
    )
