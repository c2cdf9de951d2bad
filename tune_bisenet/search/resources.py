"""Connect to Ray, on this machine or on a cluster; share it out among trials; end the process when Ray dies."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_bisenet.config import Resources
from tune_bisenet.options import InputError, Options
from tune_bisenet.storage import RETRY_VARIABLE

_log = logging.getLogger(__name__)

RESTARTABLE: Final = 75
"""Exit code of a driver whose Ray has died (EX_TEMPFAIL): run it again with --resume."""

WATCH_SECONDS: Final = 1.0
"""Short, because Ray's own code may notice first and end the driver without a word."""

START_SECONDS: Final = 300.0
"""After which Ray is thought to hang as it starts; on a busy machine it takes half a minute."""

NODE_SECONDS: Final = 60.0
"""After which a node that was asked what it has is taken to be busy."""

PENDING_TRIALS: Final = 64
"""Number of trials that may request resources from Ray before it has any."""

TOKEN_VARIABLES: Final = frozenset({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"})

_RAY_NEEDS: Final = (
    "Are there memory, processes, ports and files (ulimit -n) left for it? "
    "It keeps its own logs in $RAY_TMPDIR/ray/session_latest/logs, by default below /tmp."
)

HEAD: Final = "node:__internal_head__"
"""The resource with which Ray marks the head node."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of a cluster, and what trials may use of it."""

    cpus: float
    gpus: float = 0.0

    def capacity(self, *, cpus: int, gpus: float) -> int:
        """Return how many trials that request this much it holds at once. Shares of a GPU come from a single GPU."""
        by_cpus = int(self.cpus / cpus)
        if not gpus:
            return by_cpus
        by_gpus = int(self.gpus / gpus) if gpus >= 1 else int(self.gpus) * int(1 / gpus)
        return min(by_cpus, by_gpus)


@dataclass(frozen=True)
class Cluster:
    """The living nodes that trials can run on, at one moment."""

    nodes: tuple[Node, ...]
    autoscales: bool = False
    """Whether nodes are started for waiting trials and stopped when idle; a head without CPUs is the sign."""

    def capacity(self, *, cpus: int, gpus: float) -> int:
        return sum(node.capacity(cpus=cpus, gpus=gpus) for node in self.nodes)

    def max_in_flight(self, resources: Resources) -> int:
        """Return how many trials to start: as many as fit; on an autoscaling cluster one more, so that it grows.

        Where `max_concurrent` is set, all of them request nodes together instead of one after the other.
        """
        capacity = self.capacity(cpus=resources.cpus_per_trial, gpus=resources.gpus_per_trial)
        if self.autoscales:
            return resources.max_concurrent or capacity + 1
        return max(1, min(capacity, resources.max_concurrent or capacity))


@contextmanager
def ray_session(address: str | None) -> Iterator[Callable[[], Cluster]]:
    """Start Ray on this machine, or connect to the cluster at `address`; yield a function that returns its nodes.

    Raise InputError if Ray cannot, whatever keeps it from that.
    """
    configure_environment()
    if address is None:
        _make_token_private()
    try:
        with _on_loopback(address is None), _no_longer_than(START_SECONDS), _kept_sigterm():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _worker_environment()} if address else None,
            )
    except Exception as error:  # Ray has no class for what keeps it from starting
        ray.shutdown()
        if address is None:
            raise InputError(f"Ray cannot start on this machine: {str(error).rstrip('. ')}. {_RAY_NEEDS}") from error
        raise InputError(
            f"--address {address}: Ray cannot connect: {error}. Is its Ray the same version as here? "
            "If it asks for a token (RAY_AUTH_MODE=token), are that variable and the token set here too?"
        ) from error
    try:
        with _watched() as look:
            yield look
    finally:
        ray.shutdown()


def _make_token_private() -> None:
    """Let this user alone read ~/.ray/auth_token, into which Ray writes the token that it asks for.

    Ray would let everyone on the machine read it. A token or a mode set in the environment is left as it is, as is a
    file that cannot be written. Raise InputError if there is no place for one.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.keys() & TOKEN_VARIABLES:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        elif path.stat().st_mode & 0o077 and os.access(path, os.W_OK):
            path.chmod(0o600)
    except OSError as error:
        raise InputError(
            f"Ray's token cannot be kept in {path} for this user alone ({error.strerror}). Make that folder writable, "
            "or set RAY_AUTH_TOKEN to a long random text."
        ) from error


@contextmanager
def _on_loopback(is_local: bool) -> Iterator[None]:
    """Let a Ray that starts here take 127.0.0.1 for its address, as it does on macOS: it then listens there alone.

    Passing `_node_ip_address="127.0.0.1"` is not enough: Ray replaces it with an address that others can reach.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not is_local
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces by one that exits with 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """End the process, as one with wrong input, if Ray hangs as it starts: in C++, which no exception interrupts."""

    def give_up() -> None:
        _log.error("error: Ray has not started within %.0f s. %s\nNothing was started.", seconds, _RAY_NEEDS)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def allocate(cluster: Cluster, options: Options, *, num_trials: int, threads_per_trial: int | None = None) -> Resources:
    """Return resources for each trial so that all together use the machines and no core is requested twice.

    Without flags a trial gets a GPU where there are any, and as many cores as all that fit can have. On an autoscaling
    cluster the present nodes are no limit, and a GPU and a core are the default. torch uses `threads_per_trial`, or as
    many threads as a trial has cores. Raise InputError if a trial cannot fit.
    """
    gpus = _gpus_per_trial(cluster, options)
    concurrency = min(num_trials, options.max_concurrent or num_trials)
    cpus = options.cpus_per_trial
    if cpus is None:
        wanted = min(concurrency, cluster.capacity(cpus=1, gpus=gpus))
        largest = max((int(node.cpus) for node in cluster.nodes), default=0)
        fits = (cpus for cpus in range(largest, 1, -1) if wanted and cluster.capacity(cpus=cpus, gpus=gpus) >= wanted)
        cpus = next(fits, 1)
    capacity = cluster.capacity(cpus=cpus, gpus=gpus)
    if not capacity and not cluster.autoscales:
        holds = "Ray has no node with a CPU"
        if cluster.nodes:
            largest_node = max(cluster.nodes, key=lambda node: (node.gpus, node.cpus))
            count = len(cluster.nodes)
            subject = "Ray has" if count == 1 else f"the largest of Ray's {count} nodes has"
            holds = f"{subject} {largest_node.cpus:g} and {largest_node.gpus:g}"
        raise InputError(
            f"a trial asks for {cpus} CPUs and {gpus:g} GPUs; {holds}. Lower --cpus-per-trial or --gpus-per-trial."
        )
    return Resources(
        cpus_per_trial=cpus,
        threads_per_trial=threads_per_trial or cpus,
        gpus_per_trial=gpus,
        max_concurrent=options.max_concurrent,
        concurrency=max(1, min(concurrency, capacity)),
        grows=cluster.autoscales,
    )


def _gpus_per_trial(cluster: Cluster, options: Options) -> float:
    if options.device == "cuda" and options.gpus_per_trial == 0:
        raise InputError("--device cuda and --gpus-per-trial 0 exclude each other: leave one of them out.")
    if isinstance(options.gpus_per_trial, float):  # `auto` that was not measured is as if left out
        return options.gpus_per_trial
    if options.device == "auto":
        has_gpus = any(node.gpus for node in cluster.nodes)
        return 1.0 if has_gpus or (cluster.autoscales and not cluster.nodes) else 0.0
    return 1.0 if options.device == "cuda" else 0.0


def this_machine() -> Cluster:
    """Return what Ray would find if it started here."""
    import torch  # late, as it takes a second

    return Cluster((Node(cpus=os.cpu_count() or 1, gpus=torch.cuda.device_count()),))


def trains_on_gpu(options: Options) -> bool:
    """Return whether trials would train on a GPU of this machine, or of --gpus; --address does not count."""
    import torch  # late, as it takes a second

    may_use_gpu = options.gpus_per_trial != 0 and options.device != "cpu"
    return may_use_gpu and (options.gpus is not None or torch.cuda.is_available())


def find_bf16(options: Options) -> bool:
    """Return whether all that trials may train on has instructions for bf16, as far as that is known before a search.

    The nodes at --address are asked. If none answers within a minute, because there is none yet or all are busy, and
    for the GPUs of --gpus, it is assumed of GPUs and not of CPUs.
    """
    import torch  # late, as it takes two seconds

    from tune_bisenet.training.engine import supports_bf16

    if options.address is None:
        on_gpu = trains_on_gpu(options)
        return (on_gpu and options.gpus is not None) or supports_bf16(torch.device("cuda" if on_gpu else "cpu"))
    with ray_session(options.address) as cluster:
        gpus = _gpus_per_trial(cluster(), options)
        on_gpu = gpus > 0 and options.device != "cpu"
        ask = ray.remote(num_cpus=1, num_gpus=gpus)(supports_bf16)
        asked = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                torch.device("cuda" if on_gpu else "cpu")
            )
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"] and node["Resources"].get("CPU") and node["Resources"].get("GPU", 0.0) >= gpus
        ]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS) if asked else ([], [])
        return all(ray.get(answered)) if answered else on_gpu


def configure_environment() -> None:
    for name, value in _worker_environment().items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours keeps the signal for the exit code
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its reporter prints a box, even when silent
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # ours is calm where a machine was taken away
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its HParams show the last mIoU, not the best
    # By default a searcher's trials wait for one actor at a time, so that short ones never run side by side.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(PENDING_TRIALS))
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Otherwise Ray refuses a variable of the workers that the job it runs in has set, too.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")


def _worker_environment() -> dict[str, str]:
    """Return variables for workers: paths relative to the driver's folder, and time for a stopped trial to leave.

    Values set by the user, or by the job that this runs in, take precedence; so does the retry time of storage, since
    nodes of a cluster have their own environment.
    """
    defaults = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}
    return defaults | {name: os.environ[name] for name in (*defaults, RETRY_VARIABLE) if name in os.environ}


@contextmanager
def _watched() -> Iterator[Callable[[], Cluster]]:
    """Look at the cluster every second; end the process if Ray has died, as Tune would wait for it without end."""
    done = threading.Event()
    latest = _current_cluster()

    def watch() -> None:
        nonlocal latest
        while not done.wait(WATCH_SECONDS):
            cluster = None if _has_died() else _current_cluster()
            if cluster is None:
                _log.error("Ray has died under this search: its GCS, or all its nodes.")
                os._exit(RESTARTABLE)
            latest = cluster

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: latest or Cluster(())
    finally:
        done.set()
        thread.join()


def _has_died() -> bool:
    """Return whether the GCS or the raylet of a Ray that was started here has ended: calls of Ray's then block."""
    node: Any = ray._private.worker._global_node
    dead = {kind for kind, _process in node.dead_processes()}
    return not dead.isdisjoint({ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET})


def _current_cluster() -> Cluster | None:
    """Return the nodes that are alive and have CPUs; None if no node is alive."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if not alive:
        return None
    nodes = [node["Resources"] for node in alive]
    with_cpus = [Node(cpus=has["CPU"], gpus=has.get("GPU", 0.0)) for has in nodes if has.get("CPU")]
    return Cluster(tuple(with_cpus), autoscales=any(HEAD in has and not has.get("CPU") for has in nodes))
