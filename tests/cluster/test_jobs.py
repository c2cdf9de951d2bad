"""Searches as jobs of real heads that ask for their token: followed, cut off, stopped, resumed and moved.

Storage and data of the search that moves are on moto's S3 server.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest
from heads import SUBMIT, Follower, Head, Tunnel, submit, submit_with_patience
from helpers.object_store import (
    ObjectStore,
    StoredSearch,
    assert_no_secret,
    assert_reported_from,
    leaderboard_here,
    make_store,
)
from helpers.searches import epoch_numbers, make_place, on_frames, statuses, write_space

from tune_bisenet.storage import RETRY_VARIABLE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(2700)]

NUM_EPOCHS = 8
MANY_EPOCHS = 80
PRINT_WHERE = f"""
import os, sys, tune_bisenet
sys.stderr.write(f'sent: {{tune_bisenet.__file__}}, patience: {{os.environ.get("{RETRY_VARIABLE}")}}\\n')
"""

elsewhere = pytest.fixture(scope="module")(make_place)
store = pytest.fixture(scope="module")(make_store)


@pytest.fixture(scope="module")
def head(place: Path) -> Iterator[Head]:
    with Head(place) as head:
        head.until(head.answers)
        yield head
        head.process.terminate()
        with suppress(TimeoutExpired):
            head.process.wait(timeout=20)


def sessions(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "search.json").read_text())["sessions"])


def test_a_search_is_sent_with_its_space_followed_over_a_cut_connection_stopped_and_resumed(
    head: Head, place: Path
) -> None:
    write_space(place / "mine.py", {"b": 0.01}, num_epochs=MANY_EPOCHS)
    with (place / "mine.py").open("a") as file:
        file.write(PRINT_WHERE)
    flags, folder = [*on_frames(place, "mine.py"), "--name", "long"], place / "long"
    detached = submit(head, "--no-wait", "--", *flags, credentials=head.credentials | {RETRY_VARIABLE: "77"})
    assert detached.returncode == 0, detached.stderr
    assert f"--address http://127.0.0.1:{head.port} logs long" in detached.stderr
    assert f"--storage {place}, --data {place / 'frames'}" in detached.stderr
    second = submit(head, "--", *flags, "--resume")
    assert second.returncode == 2
    assert re.search(r"(pending|running) as job long\..* logs long", second.stderr)

    printed = follow_over_a_cut(head)
    assert f"sent: {place / 'ray'}" in printed, "the job runs what was sent, not what is installed"
    assert "patience: 77" in printed, "as here, whatever the head was started with"
    assert "running" in submit(head, "status", "long").stdout
    stopped = submit(head, "stop", "long")
    assert stopped.returncode == 0
    assert "--resume --name long" in stopped.stderr
    assert [session["signal"] for session in sessions(folder)] == [signal.SIGTERM], "it ended by itself, in time"
    assert statuses(folder) == {"b": "waiting"}
    log = submit(head, "logs", "long")
    assert log.returncode == 130
    assert log.stdout.startswith(printed), "nothing was lost or doubled where the connection was cut"

    again = submit(head, "--", *flags)
    assert again.returncode == 2, "the search is there already"
    resumed = submit(head, "--", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "submitted as job long-3" in resumed.stderr
    assert [session["signal"] for session in sessions(folder)] == [signal.SIGTERM, None]
    assert epoch_numbers(folder / "b") == list(range(1, MANY_EPOCHS + 1))
    record = json.loads((folder / "search.json").read_text())
    assert record["config"]["space"] == "mine", "no path of this machine, so that it can be resumed on another cluster"
    listed = submit(head, "list").stdout
    assert re.search(rf"^long +stopped .*{place}$", listed, flags=re.MULTILINE)
    assert re.search(r"^long-2 +failed with exit code 2", listed, flags=re.MULTILINE)
    assert re.search(r"^long-3 +succeeded", listed, flags=re.MULTILINE)


def follow_over_a_cut(head: Head) -> str:
    """Follow the job `long`. Return what was printed until Ctrl-C, which the job does not get."""
    with (
        Tunnel(head.port) as tunnel,
        Follower(head, tunnel, "logs", "long", command=SUBMIT) as follower,
        Follower(head, tunnel, "logs", "long", command=submit_with_patience(1)) as gives_up,
    ):
        follower.until(lambda: "epoch 1/" in follower.log and "epoch 1/" in gives_up.log)
        with head.trials_paused():
            tunnel.cut()
            assert gives_up.end() == 75
            assert "logs long" in gives_up.messages
            follower.until(lambda: "The connection is lost" in follower.messages)
            tunnel.mend()
            follower.until(lambda: "Connected again" in follower.messages)
            before = len(follower.log)
        follower.until(lambda: len(follower.log) > before)
        os.kill(follower.process.pid, signal.SIGINT)
        assert follower.end() == 130
        assert "Traceback" not in follower.messages + gives_up.messages
        return follower.log


def test_what_only_the_cluster_can_see_is_wrong_gives_the_runs_exit_code(head: Head, place: Path) -> None:
    refused = submit(head, "--", "--data", str(place / "nowhere"), "--storage", str(place), "--name", "wrong")
    assert refused.returncode == 2
    assert "no Cityscapes under" in refused.stdout
    assert not (place / "wrong").exists()


@pytest.mark.parametrize(
    "credentials",
    [
        {},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "nowhere"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ],
)
def test_without_the_clusters_token_nothing_is_submitted(head: Head, credentials: dict[str, str]) -> None:
    refused = submit(head, "--", "--storage", "s3://bucket/searches", "--name", "stranger", credentials=credentials)
    assert refused.returncode == 2
    assert "asks for its token" in refused.stderr
    assert "Set RAY_AUTH_MODE=token" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "stranger" not in submit(head, "list").stdout


# --- a lost head ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[dict[str, str]]:
    return leaderboard_here(place, num_epochs=NUM_EPOCHS)


def test_a_search_whose_head_is_lost_continues_by_the_same_command_on_another_cluster(
    place: Path, elsewhere: Path, store: ObjectStore, undisturbed: list[dict[str, str]]
) -> None:
    search = StoredSearch(place, store, "moved")
    with Head(place) as first, Tunnel(first.port) as tunnel:
        first.until(first.answers)
        patient = submit_with_patience(1200)  # on a busy machine another head may not come up within five minutes
        with Follower(first, tunnel, "--", *search.flags, command=patient) as follower:
            follower.until(search.has_done(4))
            first.vanish()
            tunnel.cut()
            before = {trial: len(search.epochs(trial)) for trial in search.trials}
            assert sum(before.values()) < 2 * NUM_EPOCHS, "it was lost in the middle"
            for words in (["status", "moved"], ["list"]):
                assert_advice(submit(first, *words), f"no answer from a Ray dashboard at http://127.0.0.1:{first.port}")
            with Head(elsewhere, token=first.token.read_text()) as second:
                second.until(second.answers)
                for verb in ("status", "logs", "stop"):
                    assert_advice(submit(second, verb, "moved"), "moved does not exist")
                again = submit(second, "--no-wait", "--", *search.flags, "--resume")
                assert again.returncode == 0, again.stderr
                tunnel.mend(target=second.port)
                resumed = submit(second, "logs", "moved")
                assert resumed.returncode == 0, resumed.stdout + resumed.stderr
                assert follower.end() == 0, follower.messages
        assert "The connection is lost" in follower.messages
        assert "on a new head" in follower.messages
        assert follower.log.endswith(resumed.stdout), "the new log is printed from its beginning, too"
    assert "resumed: 0 of 2 trials had ended" in resumed.stdout
    for trial, count in before.items():
        done = [int(epoch) for epoch in re.findall(rf"^{trial} +epoch (\d+)/", resumed.stdout, flags=re.MULTILINE)]
        assert done == list(range(done[0], NUM_EPOCHS + 1))
        assert done[0] >= count, "it continued where it was, or reports what the dead driver had no time to"
        assert search.epochs(trial) == list(range(1, NUM_EPOCHS + 1))
    assert search.results() == undisturbed
    record = json.loads(search.read("search.json"))["sessions"]
    assert [session["ended"] is None for session in record] == [True, False]
    assert_reported_from(search, elsewhere)
    assert_no_secret(store, place, elsewhere, secrets=(first.token.read_text(),))


def assert_advice(refused: Any, reason: str) -> None:
    assert refused.returncode == 2
    assert reason in refused.stderr
    assert "--resume" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
