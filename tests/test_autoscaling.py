"""A whole search on a cluster that has no node as it begins: nodes come as trials ask, are shared, and leave."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from driving import PROJECT, environment, make_place, on_frames, statuses

NAMESPACE = ["unshare", "--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc"]


def _reason_not_to() -> str:
    """Why no namespaces can be made here; empty if they can."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "util-linux's unshare and iproute2's ip are needed"
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces of its own: {done.stderr.strip()}"


REASON = _reason_not_to()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]

place = pytest.fixture(scope="module")(make_place)


def search_in_a_namespace(place: Path, *flags: str) -> dict[str, Any]:
    """What was seen of a search on pretended nodes."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # `ray` itself is called
    done = subprocess.run(
        [*NAMESPACE, sys.executable, str(Path(__file__).with_name("autoscaled.py")), str(place), *flags],
        cwd=PROJECT,
        env=environment(place) | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_ten_rows_on_none_to_four_nodes_with_half_a_gpu_each(place: Path) -> None:
    flags = [*on_frames(place), "--space", "runs10", "--epochs", "2", "--scheduler", "fifo", "--name", "search"]
    seen = search_in_a_namespace(
        place, *flags, "--address", "auto", "--gpus-per-trial", "0.5", "--device", "cpu", "--proxy"
    )
    assert seen["exit_code"] == 0, seen["log"]
    assert "1 trials at once, more as the cluster starts nodes" in seen["log"]
    assert set(statuses(place / "search").values()) == {"finished"}
    assert len(statuses(place / "search")) == 10
    assert (seen["workers_before"], seen["most_workers"], seen["workers_after"]) == (0, 4, 0)
    assert seen["most_trials_on_a_node"] == 3, "two GPUs hold three trials of half a GPU on three cores"
