"""search.sh begins a search or resumes it; slurm.sh runs one on Slurm and goes back into the queue in time.

Slurm is a few lines of shell; Ray, the driver and the training are real.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from files import CLUSTER, ROOT
from helpers.processes import TIMEOUT_SECONDS, LoggedProcess

PYTHON = f"""#!/bin/sh
case "$1 $2" in
  "-m tune_bisenet.run") echo "$@" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""

SRUN = """#!/bin/sh
while true; do case $1 in --*) shift ;; *) break ;; esac; done
exec "$@"
"""

SCONTROL = """#!/bin/sh
case "$1" in
  show) echo one-node ;;
  requeue) echo "$2" >> "$HOME/requeued" ;;
esac
"""

HOSTNAME = "#!/bin/sh\necho 127.0.0.1\n"


def write_scripts(folder: Path, **scripts: str) -> Path:
    """Write scripts that are to come first in the PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def search(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run search.sh with a `python` that prints the run it is to start."""
    tools = write_scripts(tmp_path / "bin", python=PYTHON)
    return subprocess.run(
        ["bash", CLUSTER / "search.sh", *words],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_search_begins_or_resumes_what_is_on_storage(tmp_path: Path) -> None:
    storage = tmp_path / "searches"
    words = ("--name", "paper", "--storage", str(storage), "--", "--space", "runs10", "--address", "auto")
    run = f"-m tune_bisenet.run --name paper --storage {storage}"
    assert search(tmp_path, *words).stdout == f"{run} --space runs10 --address auto\n"
    (storage / "paper").mkdir(parents=True)
    (storage / "paper" / "search.json").write_text("{}")
    assert search(tmp_path, *words).stdout == f"{run} --resume --space runs10 --address auto\n"


@pytest.mark.parametrize("words", ["", "--name a --", "--storage /a --", "--name a --storage /a", "--nmae a --"])
def test_search_says_how_it_is_used(words: str, tmp_path: Path) -> None:
    ended = search(tmp_path, *words.split())
    assert ended.returncode == 2
    assert "usage: search.sh --name NAME" in ended.stderr


def sbatch(tmp_path: Path, job: int) -> LoggedProcess:
    """Start slurm.sh as Slurm does, on one node with two CPUs."""
    tools = write_scripts(tmp_path / "slurm", srun=SRUN, scontrol=SCONTROL, hostname=HOSTNAME)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "one-node",
        "SLURM_CPUS_PER_TASK": "2",
        "TUNE_BISENET_CACHE": str(tmp_path / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    words = ("--space", "smoke", "--epochs", "3", "--scheduler", "fifo", "--image-size", "64x128")
    command = ["bash", str(CLUSTER / "slurm.sh"), "--name", "s", "--storage", str(tmp_path / "searches"), "--", *words]
    return LoggedProcess(command, log=tmp_path / f"{time.time_ns()}.log", env=environment)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_preempted_slurm_job_goes_back_into_the_queue_and_resumes_from_storage(tmp_path: Path) -> None:
    job = 4_000_000 + os.getpid() % 10_000
    with sbatch(tmp_path, job) as first:
        trials = tmp_path / "searches" / "s"
        first.until(lambda: any(b'"epoch":' in path.read_bytes() for path in trials.glob("*/trial.json")))
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.end(seconds=2 * TIMEOUT_SECONDS) == 143
        assert (tmp_path / "requeued").read_text() == f"{job}\n"
    assert not list(tmp_path.glob(".tune_bisenet-*")), "the token was left behind"
    assert not Path(f"/tmp/ray-{job}").exists(), "Ray's files were left behind"

    with sbatch(tmp_path, job) as second:
        assert second.end(seconds=2 * TIMEOUT_SECONDS) == 0
        assert re.search(r"finished\s+3/3", second.log)
    assert (tmp_path / "requeued").read_text() == f"{job}\n"
