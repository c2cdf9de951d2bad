"""From `ray up` to `ray down` without a cloud: head, autoscaler, GPU workers on spot, tasks, scale-down."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from files import ROOT

TOOLS = ("unshare", "ip", "mount", "ssh", "ssh-keygen", "sshd", "rsync")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str:
    """Why this machine cannot play a cloud; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and an sshd on port 22"
    tools = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if tools:
        return f"needs {', '.join(tools)}: apt-get install openssh-server openssh-client rsync iproute2"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "namespaces cannot be made here"


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_ray_up_to_ray_down_gpu_workers_come_for_tasks_and_leave() -> None:
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="way", dir="/tmp") as folder:  # short, for the paths of sockets
        namespaces = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        done = subprocess.run(
            [*namespaces, sys.executable, Path(__file__).with_name("whole_way.py"), folder],
            env={
                **os.environ,
                "PATH": PATH,
                "RAY_TMPDIR": f"{folder}/r",
                "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            },
            capture_output=True,
            text=True,
            timeout=560,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    said = re.sub(r"(?m)^ *[\d.]+ s  ", "", done.stdout)
    assert "UP: ['m7i.xlarge']" in said
    ran = re.search(r"TASKS RAN ON (\d+) WORKERS, ON THE HEAD: False", said)
    assert ran, done.stdout
    assert int(ran[1]) >= 1
    launched = re.search(r"LAUNCHED: (\[.*\])", said)
    assert launched
    assert set(re.findall(r"'(\w+)'|None", launched[1])) == {"spot"}
    assert "IDLE: ['m7i.xlarge']" in said
    assert "DOWN: []" in said
