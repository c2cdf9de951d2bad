"""A search on a cluster that starts nodes as trials ask for them, in a namespace of its own.

`python autoscaled.py PLACE FLAGS...` is to be run as the first process of new PID, network and mount namespaces: Ray's
`AutoscalingCluster` begins with `ray stop`, which ends every Ray that it can see. Prints one line of JSON.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from driving import Driver, environment
from nodes import processes
from ray.cluster_utils import AutoscalingCluster

WORKER = {"CPU": 3, "GPU": 2}
"""Of one node: three trials with half a GPU each, on two GPUs that are only pretended."""

MAX_WORKERS = 4
IDLE_SECONDS = 10


@dataclass
class Seen:
    exit_code: int = -1
    log: str = ""
    workers_before: int = 0
    most_workers: int = 0
    workers_after: int = -1
    most_trials_on_a_node: int = 0


class PretendedCluster(AutoscalingCluster):
    """Its configuration is given here: the file that Ray reads it from is missing from Ray's own package."""

    def _generate_config(
        self,
        head_resources: dict[str, float],
        worker_node_types: dict[str, Any],
        autoscaler_v2: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        empty = "initialization_commands setup_commands head_setup_commands worker_setup_commands "
        empty += "head_start_ray_commands worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
        return {
            "cluster_name": "pretended",
            "provider": {"type": "fake_multinode", "launch_multiple": True, "head_node_id": "f" * 51 + "00000"},
            "available_node_types": worker_node_types | {"ray.head.default": head},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in empty.split()},
            **more,
        }


def main(place: Path, flags: list[str]) -> Seen:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    kind = {"resources": WORKER, "node_config": {}, "min_workers": 0, "max_workers": MAX_WORKERS}
    cluster = PretendedCluster(
        {"CPU": 0},
        {"gpu": kind},
        autoscaler_v2=True,
        max_workers=MAX_WORKERS,
        idle_timeout_minutes=IDLE_SECONDS / 60,
    )
    seen = Seen()
    cluster.start(override_env=environment(place))
    try:
        seen.workers_before = count_workers()
        with Driver(place, *flags) as driver:
            while driver.process.poll() is None:
                look(seen)
                time.sleep(0.3)
            seen.exit_code, seen.log = driver.end(), driver.log
        deadline = time.monotonic() + 60
        while (left := count_workers()) and time.monotonic() < deadline:
            time.sleep(0.5)
        seen.workers_after = left
    finally:
        cluster.shutdown()
    return seen


def count_workers() -> int:
    """The raylets that are not the head's."""
    return sum("/raylet/raylet " in one.title for one in processes()) - 1


def look(seen: Seen) -> None:
    seen.most_workers = max(seen.most_workers, count_workers())
    trials = Counter(one.parent for one in processes() if one.title.startswith("ray::ImplicitFunc"))
    seen.most_trials_on_a_node = max([seen.most_trials_on_a_node, *trials.values()])


if __name__ == "__main__":
    words, sys.stdout = sys.stdout, sys.stderr
    words.write(json.dumps(asdict(main(Path(sys.argv[1]), sys.argv[2:]))) + "\n")
