"""From `ray up` to `ray down` and the report, without a cloud: README.md's commands, and a search on spot."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from files import ROOT

TOOLS = ("unshare", "ip", "mount", "ssh", "ssh-keygen", "sshd", "rsync")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NAMESPACES = ("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
A_NETWORK = "ip link add cloud type bridge && ip link add plug type veth peer name eth0"


def missing() -> str:
    """Why this machine cannot play a cloud; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and an sshd on port 22"
    tools = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if tools:
        return f"needs {', '.join(tools)}: apt-get install openssh-server openssh-client rsync iproute2"
    tried = subprocess.run(
        [*NAMESPACES, "sh", "-c", A_NETWORK], env={"PATH": PATH}, capture_output=True, text=True, check=False
    )
    return f"no namespaces with a bridge can be made here: {tried.stderr}" if tried.returncode else ""


pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What `whole_way.py` saw, once for all tests."""
    if reason := missing():
        pytest.skip(reason)
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="way", dir="/tmp") as folder:
        done = subprocess.run(
            [*NAMESPACES, sys.executable, str(here / "whole_way.py"), folder],
            env=kept | {"PATH": PATH, "PYTHONPATH": f"{ROOT}:{here.parent}:{here}"},
            capture_output=True,
            text=True,
            timeout=1700,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_commands_of_the_readme_lead_from_a_file_to_a_report_and_leave_no_machine(seen: dict[str, Any]) -> None:
    kinds = seen["kinds"]
    assert kinds["up"] == kinds["idle"] == ["m7i.xlarge"], "workers come with trials, and leave after them"
    assert {"g5.xlarge"} < set(kinds["search"])
    assert kinds["down"] == kinds["report"] == []
    assert {"report.html", "report.md", "tables"} <= set(seen["reported"])


def test_trials_run_on_spot_workers_that_the_autoscaler_launched_and_none_on_the_head(seen: dict[str, Any]) -> None:
    workers = set(seen["workers"])
    assert seen["statuses"] == dict.fromkeys("abc", "finished")
    assert "job paper: succeeded." in seen["said"]["search"]
    trained_on = {address for addresses in seen["trained_on"].values() for address in addresses}
    assert set(seen["trained_on"]) == set("abc")
    assert trained_on
    assert trained_on <= workers
    assert set(seen["trainers"]) <= workers
    assert seen["head"] not in workers
    assert set(seen["markets"]) == {"spot"}


def test_the_job_is_told_of_while_it_runs_and_afterwards(seen: dict[str, Any]) -> None:
    assert "status     running" in seen["said"]["status"]
    assert "storage    s3://mine/searches" in seen["said"]["status"]
    assert "succeeded" in seen["said"]["list"]


def test_set_up_asks_make_for_the_environment_on_each_machine(seen: dict[str, Any]) -> None:
    for address in {seen["head"], *seen["trainers"]}:
        home, asked = seen["homes"][address], seen["made"][address].splitlines()
        assert set(asked) == {f"make --no-print-directory -C {home}/tune_bisenet setup PYTHON=python3"}
        # Ray adds `setup_commands` to a worker's on the laptop, and again on the head.
        assert len(asked) <= (1 if address == seen["head"] else 2)


def test_pages_are_shown_through_the_tunnel_and_to_nobody_else(seen: dict[str, Any]) -> None:
    assert {"paper/a", "paper/b", "paper/c"} <= set(seen["runs"])
    assert seen["heard_on_head"] == [["127.0.0.1", 6006], ["127.0.0.1", 8265]]
    assert seen["open_to_all"] == []


def test_each_worker_watches_for_its_spot_notice_and_the_head_does_not(seen: dict[str, Any]) -> None:
    assert set(seen["trainers"]) <= set(seen["watchers"]) <= set(seen["workers"])
    assert set(seen["metadata_asked"]) == {"PUT /latest/api/token", "/latest/meta-data/spot/instance-action"}
    assert set(seen["watchers_said"].values()) == {""}
