"""A search on a cluster, seen from outside: a real head that asks for its token, and a tunnel to it that can be cut."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from driving import PROJECT, epoch_numbers, make_place, on_frames, statuses, write_space
from heads import SUBMIT, Follower, Head, Tunnel, submit, submit_that_waits

from tune_bisenet.storage import RETRY_VARIABLE
from tune_bisenet.submit import main as run_submit

NUM_EPOCHS = 40

SAYING_WHERE = f"""
import os, sys, tune_bisenet
sys.stderr.write(f'sent: {{tune_bisenet.__file__}}, patience: {{os.environ.get("{RETRY_VARIABLE}")}}\\n')
"""

place = pytest.fixture(scope="module")(make_place)


@pytest.fixture(scope="module")
def head(place: Path) -> Iterator[Head]:
    with Head(place) as head:
        head.until(head.answers)
        yield head
        head.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.process.wait(timeout=20)


# --- the command ----------------------------------------------------------------------------------------------------


def sessions(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "search.json").read_text())["sessions"])


def on_a_cluster(test: Any) -> Any:
    """Marks a test that needs the head."""
    for mark in (pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1200)):
        test = mark(test)
    return test


# --- searches -------------------------------------------------------------------------------------------------------


@on_a_cluster
def test_a_search_is_sent_with_its_space_and_followed_to_its_end(head: Head, place: Path) -> None:
    write_space(place / "mine.py", {"a": 0.01}, num_epochs=2)
    with (place / "mine.py").open("a") as file:
        file.write(SAYING_WHERE)
    here = head.credentials | {RETRY_VARIABLE: "77"}
    followed = submit(head, "--", *on_frames(place, "mine.py"), "--name", "whole", credentials=here)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert statuses(place / "whole") == {"a": "finished"}
    assert f"sent: {place / 'ray'}" in followed.stdout, "the job runs what was sent, not what is installed"
    assert "patience: 77" in followed.stdout, "as here, whatever the head was started with"
    assert "2/2" in followed.stdout
    assert "submitted as job whole; it goes on without this terminal" in followed.stderr
    assert "job whole: succeeded." in followed.stderr
    assert f"--storage {place}, --data {place / 'frames'}: on the cluster's machines" in followed.stderr
    record = json.loads((place / "whole" / "search.json").read_text())
    assert record["space"]["name"] == "mine", "no path of this machine, so that it can be resumed on another cluster"


@on_a_cluster
def test_a_detached_search_is_followed_over_a_cut_connection_stopped_and_resumed(head: Head, place: Path) -> None:
    write_space(place / "long.py", {"b": 0.01}, num_epochs=NUM_EPOCHS)
    flags, folder = [*on_frames(place, "long.py"), "--name", "long"], place / "long"
    detached = submit(head, "--no-wait", "--", *flags)
    assert detached.returncode == 0, detached.stderr
    assert f"--address http://127.0.0.1:{head.port} logs long" in detached.stderr
    doubled = submit(head, "--", *flags, "--resume")
    assert doubled.returncode == 2
    assert re.search(r"the search long is (pending|running) as job long\. Follow it: .* logs long", doubled.stderr)

    seen = follow_over_a_cut(head)
    assert "running" in submit(head, "status", "long").stdout
    stopped = submit(head, "stop", "long")
    assert stopped.returncode == 0
    assert re.search(r"job long: stopped after \d+ s\.\nGo on with it: submit --resume --name long", stopped.stderr)
    assert [session["signal"] for session in sessions(folder)] == [signal.SIGTERM], "it ended by itself, in time"
    assert statuses(folder) == {"b": "waiting"}
    log = submit(head, "logs", "long")
    assert log.returncode == 130
    assert log.stdout.startswith(seen), "nothing was lost or doubled where the connection was cut"

    again = submit(head, "--", *flags)
    assert again.returncode == 2
    assert "has been submitted before, as job long, which stopped" in again.stderr
    resumed = submit(head, "--", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "submitted as job long-2" in resumed.stderr
    assert [session["signal"] for session in sessions(folder)] == [signal.SIGTERM, None]
    assert epoch_numbers(folder / "b") == list(range(1, NUM_EPOCHS + 1))
    listed = submit(head, "list").stdout
    assert re.search(rf"^long +stopped .*{place}$", listed, flags=re.MULTILINE)
    assert re.search(r"^long-2 +succeeded", listed, flags=re.MULTILINE)


def follow_over_a_cut(head: Head) -> str:
    """Follow the job `long`; what was printed until Ctrl-C, which the job does not hear."""
    impatient = submit_that_waits(1)
    with (
        Tunnel(head.port) as tunnel,
        Follower(head, tunnel, "logs", "long", how=SUBMIT) as follower,
        Follower(head, tunnel, "logs", "long", how=impatient) as gives_up,
    ):
        follower.until(lambda: "epoch" in follower.log and "epoch" in gives_up.log)
        tunnel.cut()
        assert gives_up.end() == 75
        assert "If the head lives, job long goes on by itself. Follow it again: python -m" in gives_up.said
        follower.until(lambda: "The connection is lost; job long goes on" in follower.said)
        tunnel.mend()
        before = len(follower.log)
        follower.until(lambda: "Connected again" in follower.said and len(follower.log) > before)
        os.kill(follower.process.pid, signal.SIGINT)
        assert follower.end() == 130
        assert "Job long goes on. Follow it again" in follower.said
        assert "Traceback" not in follower.said + gives_up.said
        return follower.log


@on_a_cluster
def test_what_only_the_cluster_can_see_is_wrong_gives_the_runs_exit_code(head: Head, place: Path) -> None:
    refused = submit(head, "--", "--data", str(place / "nowhere"), "--storage", str(place), "--name", "wrong")
    assert refused.returncode == 2
    assert "no Cityscapes under" in refused.stdout
    assert "failed with exit code 2" in refused.stderr
    assert not (place / "wrong").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


@on_a_cluster
@pytest.mark.parametrize(
    ("credentials", "said"),
    [
        ({}, "Set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token", "HOME": "nowhere"}, "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token holds none"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "nowhere"},
            "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token holds",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "is another cluster's"),
    ],
)
def test_without_the_clusters_token_nothing_is_submitted(head: Head, credentials: dict[str, str], said: str) -> None:
    refused = submit(head, "--", "--storage", "s3://bucket/searches", "--name", "stranger", credentials=credentials)
    assert refused.returncode == 2
    assert f"the cluster at http://127.0.0.1:{head.port} asks for its token" in refused.stderr
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "stranger" not in submit(head, "list").stdout


@on_a_cluster
def test_a_job_that_is_not_there_is_told(head: Head) -> None:
    for verb in ("status", "logs", "stop"):
        unknown = submit(head, verb, "nosuch")
        assert unknown.returncode == 2
        assert "knows no job nosuch" in unknown.stderr


def refusal(*words: str) -> str:
    """What the command line says as it refuses: within seconds, and on a busy machine long before it would give up."""
    ran = subprocess.run(
        [sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    return ran.stderr


def test_nobody_at_the_address_is_told_within_seconds() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # so that nobody else is given the port
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        assert "no answer from a Ray dashboard" in refusal(*SUBMIT, "--address", address, "list")


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from tune_bisenet import submit; sys.exit(submit.main(['list']))"
    assert "pip install 'tune-bisenet[cluster]'" in refusal("-c", code)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either the run's flags behind `--`, or one of"),
        (["list", "--", "--space", "smoke"], "either the run's flags behind `--`, or one of"),
        (["stop"], "stop needs a job's id"),
        (["list", "x"], "list takes no job"),
        (["--no-wait", "list"], "--no-wait is for a run"),
        (["--address", "auto", "list"], "is not the address of a dashboard"),
        (["--", "--epochs", "0"], "--storage is needed"),
    ],
)
def test_words_that_do_not_fit_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run_submit(words)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert said in capsys.readouterr().err


def test_help_tells_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_submit(["--help"])
    words = capsys.readouterr().out.partition("exit codes:")[2].replace(";", " ").split()
    assert {"0", "1", "2", "75", "130"} <= set(words)
