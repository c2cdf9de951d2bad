"""A head that is lost with all that ran on it, in the midst of a search: the same command goes on on another cluster.

Real heads in sessions of their own, jobs that were submitted to them, storage and data on moto's S3 server.
"""

import json
import re
from pathlib import Path

import pytest
from driving import make_place
from heads import Follower, Head, Tunnel, submit, submit_that_waits
from object_store import ObjectStore, StoredSearch, assert_no_secret, assert_reported_from, leaderboard_here, make_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1200)]

NUM_EPOCHS = 8

place = pytest.fixture(scope="module")(make_place)
elsewhere = pytest.fixture(scope="module")(make_place)


store = pytest.fixture(scope="module")(make_store)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[dict[str, str]]:
    return leaderboard_here(place, num_epochs=NUM_EPOCHS)


def test_a_search_whose_head_died_goes_on_by_the_same_command_on_another_cluster(
    place: Path, elsewhere: Path, store: ObjectStore, undisturbed: list[dict[str, str]]
) -> None:
    search = StoredSearch(place, store, "moved")
    with Head(place) as first, Tunnel(first.port) as tunnel:
        first.until(first.answers)
        patient = submit_that_waits(1200)  # on a busy machine another head may not come up within five minutes
        with Follower(first, tunnel, "--", *search.flags, how=patient) as follower:
            follower.until(search.has_done(4))
            first.vanish()
            tunnel.cut()
            before = {trial: len(search.epochs(trial)) for trial in search.trials}
            assert sum(before.values()) < 2 * NUM_EPOCHS, "it was lost in the midst"
            assert_told_what_to_do(first)
            with Head(elsewhere, token=first.token.read_text()) as second:
                second.until(second.answers)
                assert_unknown(second)
                again = submit(second, "--no-wait", "--", *search.flags, "--resume")
                assert again.returncode == 0, again.stderr
                tunnel.mend(target=second.port)
                resumed = submit(second, "logs", "moved")
                assert resumed.returncode == 0, resumed.stdout + resumed.stderr
                assert follower.end() == 0, follower.said
        assert "The connection is lost" in follower.said
        assert "On a new head, job moved has begun anew" in follower.said
        assert follower.log.endswith(resumed.stdout), "the new log is told from its beginning, too"
    assert "resumed: 0 of 2 trials had ended" in resumed.stdout
    for trial, count in before.items():
        done = [int(epoch) for epoch in re.findall(rf"^{trial} +epoch (\d+)/", resumed.stdout, flags=re.MULTILINE)]
        assert done == list(range(done[0], NUM_EPOCHS + 1))
        assert done[0] >= count, "it went on where it was, or tells what the dead driver had no time to"
        assert search.epochs(trial) == list(range(1, NUM_EPOCHS + 1))
    assert search.results() == undisturbed
    sessions = json.loads(search.read("search.json"))["sessions"]
    assert [session["ended"] is None for session in sessions] == [True, False]
    assert_reported_from(search, elsewhere)
    assert_no_secret(store, place, elsewhere, secrets=(first.token.read_text(),))


def assert_told_what_to_do(gone: Head) -> None:
    """By every verb, when the head answers no more."""
    for words in (["status", "moved"], ["logs", "moved"], ["list"], ["stop", "moved"]):
        said = submit(gone, *words)
        assert said.returncode == 2, words
        assert f"no answer from a Ray dashboard at http://127.0.0.1:{gone.port}" in said.stderr
        assert "A search whose head has died goes on, on a new cluster, by the command" in said.stderr
        assert "Traceback" not in said.stderr + said.stdout


def assert_unknown(new: Head) -> None:
    """A new head knows nothing of the old one's jobs."""
    for verb in ("status", "logs"):
        said = submit(new, verb, "moved")
        assert said.returncode == 2
        assert re.search("knows no job moved; .* with --resume behind `--`", said.stderr)
