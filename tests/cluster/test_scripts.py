"""The shell scripts: search.sh begins or goes on, slurm.sh runs a search on Slurm and goes back into the queue in time.

Slurm itself is played by a few lines of shell; Ray, the driver and the training are real.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from files import CLUSTER, ROOT

SAY_WHAT_IS_RUN = f"""#!/bin/sh
case "$1 $2" in
  "-m tune_bisenet.run") echo "$@" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""

SRUN = """#!/bin/sh
while true; do case $1 in --*) shift ;; *) break ;; esac; done
echo "$$" >> "$PLAYED/steps"
exec "$@"
"""

SCONTROL = """#!/bin/sh
case "$1" in
  show) echo one-node ;;
  requeue) echo "$2" >> "$PLAYED/requeued" ;;
esac
"""

HOSTNAME = "#!/bin/sh\necho 127.0.0.1\n"


def put(folder: Path, **scripts: str) -> Path:
    """Scripts to be found first in the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def search(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    tools = put(tmp_path / "bin", python=SAY_WHAT_IS_RUN)
    return subprocess.run(
        ["bash", CLUSTER / "search.sh", *words],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_search_begins_where_there_is_none_and_goes_on_where_there_is_one(tmp_path: Path) -> None:
    storage = str(tmp_path / "searches")
    words = ("--name", "paper", "--storage", storage, "--", "--space", "runs10", "--address", "auto")
    run = f"-m tune_bisenet.run --name paper --storage {storage}"
    assert search(tmp_path, *words).stdout == f"{run} --space runs10 --address auto\n"
    (tmp_path / "searches" / "paper").mkdir(parents=True)
    (tmp_path / "searches" / "paper" / "search.json").write_text("{}")
    assert search(tmp_path, *words).stdout == f"{run} --resume --space runs10 --address auto\n"


@pytest.mark.parametrize(
    "words",
    [(), ("--name", "a", "--"), ("--storage", "/a", "--"), ("--name", "a", "--storage", "/a"), ("--nmae", "a", "--")],
    ids=["nothing", "no storage", "no name", "no flags", "misspelt"],
)
def test_search_says_how_it_is_used(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = search(tmp_path, *words)
    assert ended.returncode == 2
    assert "usage: search.sh --name NAME" in ended.stderr


def sbatch(tmp_path: Path, job: int) -> subprocess.Popen[str]:
    """slurm.sh as Slurm would start it, on one node with one CPU for each of two trials."""
    played = tmp_path / "played"
    played.mkdir(exist_ok=True)
    tools = put(tmp_path / "slurm", srun=SRUN, scontrol=SCONTROL, hostname=HOSTNAME)
    python = str(Path(sys.executable).parent)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{tools}:{python}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PLAYED": str(played),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "one-node",
        "SLURM_CPUS_PER_TASK": "2",
        "TUNE_BISENET_CACHE": str(tmp_path / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    words = ("--space", "smoke", "--epochs", "3", "--scheduler", "fifo", "--image-size", "64x128")
    return subprocess.Popen(
        ["bash", CLUSTER / "slurm.sh", "--name", "s", "--storage", tmp_path / "searches", "--", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    """What it said, once it has ended by itself; whatever is left of it is killed."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return said


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_preempted_slurm_job_goes_back_into_the_queue_and_then_on_from_storage(tmp_path: Path) -> None:
    job = 4_000_000 + os.getpid() % 10_000
    first = sbatch(tmp_path, job)
    epochs = tmp_path / "searches" / "s"
    deadline = time.monotonic() + 500
    while not list(epochs.glob("*/epochs.json")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "no epoch was trained"
        time.sleep(0.5)
    os.kill(first.pid, signal.SIGTERM)
    said = ended(first, 400)
    assert first.returncode == 143, said
    assert (tmp_path / "played" / "requeued").read_text() == f"{job}\n", said
    assert not list(tmp_path.glob(".tune_bisenet-*")), "the token was left behind"
    assert not Path(f"/tmp/ray-{job}").exists(), "Ray's files were left behind"

    second = sbatch(tmp_path, job)
    said = ended(second, 600)
    assert second.returncode == 0, said
    assert re.search(r"finished\s+3/3", said), said
    assert (tmp_path / "played" / "requeued").read_text() == f"{job}\n"
