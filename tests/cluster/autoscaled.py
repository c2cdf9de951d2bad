"""A search on a cluster that starts nodes as trials ask for them, in a namespace of its own.

`python autoscaled.py PLACE FLAGS...` must be the first process of new PID, network and mount namespaces: Ray's
`AutoscalingCluster` begins with `ray stop`, which ends every Ray that it can see. Prints one line of JSON.
"""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.processes import Driver, environment, processes
from ray.autoscaler._private import fake_multi_node
from ray.cluster_utils import AutoscalingCluster

WORKER = {"CPU": 3, "GPU": 2}  # three trials with half a GPU each; the GPUs are only pretended
MAX_WORKERS = 4
IDLE_SECONDS = 10
SECONDS = 900  # after which the search is given up


@dataclass
class Seen:
    exit_code: int | None = None
    log: str = ""
    workers_before: int = 0
    trials_before_any_worker: int = 0
    most_workers: int = 0
    workers_after: int = -1
    most_trials: int = 0
    most_trials_on_a_node: int = 0


EMPTY = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
PRETENDED = {
    "cluster_name": "pretended",
    "max_workers": MAX_WORKERS,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": IDLE_SECONDS / 60,
    "provider": {"type": "fake_multinode"},
    "auth": {},
    "docker": {},
    "available_node_types": {"ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}},
    "head_node_type": "ray.head.default",
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
} | {name: [] for name in EMPTY}
"""What Ray expects of pretended nodes in its example.yaml."""


def main(place: Path, flags: list[str]) -> Seen:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Ray's package lacks example.yaml: a copy with that file covers Ray's folder in this mount namespace alone.
    folder, copy = Path(fake_multi_node.__path__[0]), place / "fake_multi_node"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "example.yaml").write_text(json.dumps(PRETENDED))
    subprocess.run(["mount", "--bind", str(copy), str(folder)], check=True)
    kind = {"resources": WORKER, "node_config": {}, "min_workers": 0, "max_workers": MAX_WORKERS}
    cluster = AutoscalingCluster({"CPU": 0}, {"gpu": kind}, autoscaler_v2=True)
    seen = Seen()
    cluster.start(override_env=environment(place))
    try:
        seen.workers_before = count_workers()
        with Driver(place, *flags) as driver:
            ends_at = time.monotonic() + SECONDS
            while driver.process.poll() is None and time.monotonic() < ends_at:
                look(seen, place)
                time.sleep(0.3)
            seen.exit_code, seen.log = driver.process.returncode, driver.log
        deadline = time.monotonic() + 250
        while (left := count_workers()) and time.monotonic() < deadline:
            time.sleep(0.5)
        seen.workers_after = left
    finally:
        cluster.shutdown()
    return seen


def count_workers() -> int:
    """Return the number of raylets but the head's, by title: one that forks is there twice for a moment."""
    return len({process.title for process in processes() if "/raylet/raylet " in process.title}) - 1


def look(seen: Seen, place: Path) -> None:
    num_trials = len(list(place.glob("*/*/trial.json")))
    seen.most_workers = max(seen.most_workers, count_workers())
    if not seen.most_workers:
        seen.trials_before_any_worker = num_trials
    trials = Counter(process.parent for process in processes() if process.title.startswith("ray::ImplicitFunc"))
    seen.most_trials = max(seen.most_trials, trials.total())
    seen.most_trials_on_a_node = max([seen.most_trials_on_a_node, *trials.values()])


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr
    output.write(json.dumps(asdict(main(Path(sys.argv[1]), sys.argv[2:]))) + "\n")
