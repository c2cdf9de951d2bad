"""A whole search on a cluster that has no node as it begins: nodes come as trials ask, are shared, and leave."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.processes import PROJECT, environment
from helpers.searches import on_frames, statuses
from optuna.trial import TrialState

NAMESPACE = ["unshare", "--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc"]


def reason_to_skip() -> str:
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is needed"
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces of its own: {done.stderr.strip()}"


REASON = reason_to_skip()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.namespaces,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]


def search_in_a_namespace(place: Path, *flags: str) -> dict[str, Any]:
    """Return what was seen of a search on pretended nodes, with half a GPU for each trial."""
    cluster = ["--address", "auto", "--gpus-per-trial", "0.5", "--device", "cpu"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # `ray` itself is called
    done = subprocess.run(
        [*NAMESPACE, sys.executable, str(Path(__file__).with_name("autoscaled.py")), str(place), *flags, *cluster],
        cwd=PROJECT,
        env=environment(place) | {"PATH": path, "PYTHONPATH": str(PROJECT / "tests")},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_ten_rows_on_none_to_four_nodes_with_half_a_gpu_each(place: Path) -> None:
    flags = [*on_frames(place), "--space", "runs10", "--epochs", "2", "--scheduler", "fifo", "--proxy"]
    seen = search_in_a_namespace(place, *flags, "--name", "search")
    assert seen["exit_code"] == 0, seen["log"]
    assert "1 trial at once" in seen["log"]
    assert set(statuses(place / "search").values()) == {"finished"}
    assert len(statuses(place / "search")) == 10
    assert (seen["workers_before"], seen["most_workers"], seen["workers_after"]) == (0, 4, 0)
    assert seen["most_trials_on_a_node"] == 3, "two GPUs hold three trials of half a GPU on three cores"


def test_a_study_hands_out_more_trials_as_nodes_come(place: Path) -> None:
    num_trials = 12  # the ten rows, and two that are drawn
    flags = [*on_frames(place), "--space", "around10", "--epochs", "2", "--scheduler", "fifo", "--proxy"]
    seen = search_in_a_namespace(place, *flags, "--name", "study", "--trials", str(num_trials))
    assert seen["exit_code"] == 0, seen["log"]
    assert (seen["workers_before"], seen["workers_after"]) == (0, 0)
    assert seen["trials_before_any_worker"] == 1, "one trial asks for the first node"
    assert seen["most_workers"] > 1
    assert seen["most_trials_on_a_node"] == 3
    assert seen["most_trials"] > 3
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{place / 'study' / 'study.db'}")
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    names = [trial.user_attrs["trial"] for trial in study.trials]
    assert len(names) == len(set(names)) == num_trials
    assert statuses(place / "study") == dict.fromkeys(names, "finished")
