"""Ray itself: one of our own on this machine or a cluster that is there, what each trial gets of it, and its death.

What is run on it is not known here.
"""

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import ray

from tune_bisenet.arguments import Arguments
from tune_bisenet.config import Resources

RESTARTABLE: Final = 75
"""The exit code of a driver whose Ray has died under it (EX_TEMPFAIL): run it again with --resume."""

REACH_SECONDS: Final = 5.0

WATCH_SECONDS: Final = 1.0
"""Short: a driver that hears of it from Ray's own code may be ended by that, with exit code 1."""

PENDING_TRIALS: Final = 64
"""How many trials may ask Ray for resources before it has any."""

log = logging.getLogger(__name__)


class ClusterError(ValueError):
    """There is no such cluster, or it cannot hold what one trial asks for."""


@contextmanager
def ray_session(address: str | None) -> Iterator[Mapping[str, float]]:
    """A Ray of our own on this machine, or the cluster at `address`; yields what it has, by resource name.

    Raises ClusterError if nobody answers there.
    """
    _configure_environment()
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
        with _watchdog():
            yield ray.cluster_resources()  # type: ignore[no-untyped-call]
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


def allot(cluster: Mapping[str, float], asked: Arguments, *, num_trials: int) -> Resources:
    """Resources for each trial so that together they use the machine and no core is asked for twice.

    With GPUs, one for each trial unless `asked` says otherwise. Raises ClusterError if a trial cannot fit.
    """
    num_cpus, num_gpus = int(cluster.get("CPU", 0)), cluster.get("GPU", 0.0)
    gpus = (1.0 if num_gpus else 0.0) if asked.gpus_per_trial is None else asked.gpus_per_trial
    at_once = min(num_trials, asked.max_concurrent or num_trials)
    if gpus:
        at_once = max(1, min(at_once, int(num_gpus / gpus)))
    cpus = asked.cpus_per_trial or max(1, num_cpus // at_once)
    if cpus > num_cpus or gpus > num_gpus:
        raise ClusterError(
            f"a trial asks for {cpus} CPUs and {gpus:g} GPUs; Ray has {num_cpus} and {num_gpus:g}. "
            "Lower --cpus-per-trial or --gpus-per-trial."
        )
    return Resources(
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        max_concurrent=asked.max_concurrent,
        concurrency=max(1, min(at_once, num_cpus // cpus)),
    )


def _configure_environment() -> None:
    for name, value in _worker_environment().items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours tells apart who asked, for the exit code
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its reporter prints a box of its own, even when silent
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its HParams show the last mIoU, not the best
    # By default a searcher's trials wait for one actor at a time, so that short ones never run side by side.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(PENDING_TRIALS))
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")


def _worker_environment() -> dict[str, str]:
    """Paths stay relative to where the user stands; a stopped trial has time to leave before its actor is reused."""
    return {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}


@contextmanager
def _watchdog() -> Iterator[None]:
    """End the process if Ray has died: Tune would wait for it without end. Nothing is lost by it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            nodes = ray.nodes()  # type: ignore[no-untyped-call]
            if not any(node["Alive"] for node in nodes):
                log.error("Ray has died under this search. Run the same command again with --resume.")
                os._exit(RESTARTABLE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
