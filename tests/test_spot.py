"""The watcher of a spot machine: it reads the clouds' notices as they are given, and does not give up."""

import logging
import subprocess
import sys
import time

import clouds
import pytest
from clouds import Cloud

from tune_bisenet import spot
from tune_bisenet.spot import Metadata, Notice, aws_notice, gcp_notice, watch

cloud = pytest.fixture(clouds.serve)

GOOGLE = "/computeMetadata/v1/instance/"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This cloud is a thread of the test's own process: on a busy machine it may take seconds to answer."""
    monkeypatch.setattr(spot, "ANSWER_SECONDS", 120.0)


# --- what is a notice -----------------------------------------------------------------------------------------------


def test_aws_gives_notice_with_a_time(cloud: Cloud) -> None:
    assert aws_notice(Metadata(cloud.url)) is None
    began = time.time()
    cloud.takes_away(seconds=120)
    notice = aws_notice(Metadata(cloud.url))
    assert notice is not None
    # A notice tells whole seconds, and some of them may have gone by.
    assert 119 - (time.time() - began) <= notice.seconds_left <= 120
    assert "AWS will terminate this machine" in notice.words
    assert cloud.asked == ["PUT /latest/api/token", "/latest/meta-data/spot/instance-action"] * 2


def test_a_recommendation_to_rebalance_is_no_notice(cloud: Cloud) -> None:
    cloud.pages["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-01-05T18:02:00Z"}'
    assert aws_notice(Metadata(cloud.url)) is None


def test_google_gives_notice_of_a_preemption_and_of_a_maintenance_that_ends_the_machine(cloud: Cloud) -> None:
    preempted, maintenance = GOOGLE + "preempted", GOOGLE + "maintenance-event"
    cloud.pages = {preempted: "FALSE", maintenance: "NONE"}
    assert gcp_notice(Metadata(cloud.url)) is None
    cloud.pages[maintenance] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert gcp_notice(Metadata(cloud.url)) is None, "it is moved alive"
    cloud.pages[maintenance] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert gcp_notice(Metadata(cloud.url)) == Notice(
        "Google will take this machine away (maintenance-event: TERMINATE_ON_HOST_MAINTENANCE)", spot.GCP_SECONDS
    )
    cloud.pages = {preempted: "TRUE\n", maintenance: "NONE"}
    found = gcp_notice(Metadata(cloud.url))
    assert found is not None
    assert "(preempted: TRUE)" in found.words


def test_no_proxy_is_asked(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    cloud.takes_away(seconds=120)
    assert aws_notice(Metadata(cloud.url)) is not None


# --- what cannot be relied on -----------------------------------------------------------------------------------------


def watched(looks: list[Notice | Exception | None], acts: list[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the watcher said while the cloud and Ray answered like that, one after the other."""
    left, done = iter(looks), iter(acts)

    def look() -> Notice | None:
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    with caplog.at_level(logging.WARNING):
        watch(look, lambda _: next(done), poll_seconds=0.001)
    assert list(left) == list(done) == [], "all of it was asked"
    return caplog.messages


def test_a_service_that_does_not_answer_is_asked_on_and_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    away = OSError("no route to host")
    said = watched([away, away, away, None, None, Notice("gone at noon", 9)], [""], caplog)
    assert said == [
        "The metadata service gives no answer: no route to host. Asking on.",
        "The metadata service answers: there is no notice.",
        "gone at noon. Its node of Ray is drained: no new trials come here.",
    ]


def test_a_node_that_cannot_be_drained_yet_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice("gone at noon", 9)
    said = watched([notice, notice, notice], ["no Ray here", "no Ray here", ""], caplog)
    assert len(said) == 2
    assert said[0] == "gone at noon, but its node of Ray cannot be drained: no Ray here. Trying again."


@pytest.mark.parametrize("answer", ["", "soon", "{}", "[]", '{"action": "stop", "time": "noon"}'])
def test_an_answer_that_makes_no_sense_does_not_end_the_watch(
    cloud: Cloud, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.pages["/latest/meta-data/spot/instance-action"] = answer
    looks = 0

    def look() -> Notice | None:
        nonlocal looks
        looks += 1
        return aws_notice(Metadata(cloud.url)) if looks < 3 else Notice("gone at noon", 9)

    with caplog.at_level(logging.WARNING):
        watch(look, lambda _: "", poll_seconds=0.001)
    assert ["no answer" in message for message in caplog.messages] == [True, False]


def test_nobody_there_another_clouds_service_or_a_refusal_is_an_error_to_go_on_from(cloud: Cloud) -> None:
    with pytest.raises(OSError, match="refused"):
        aws_notice(Metadata("http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="no page instance/preempted"):
        gcp_notice(Metadata(cloud.url))
    with pytest.raises(OSError, match="401"):
        Metadata(cloud.url).ask("/latest/meta-data/spot/instance-action", {})


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--cloud", "azure"], "invalid choice"),
        (["--cloud", "aws", "--poll-seconds", "600"], "at most 60"),
        (["--cloud", "aws", "--poll-seconds", "0"], "above 0"),
        (["--cloud", "aws", "--metadata-url", "file:///etc/passwd"], "begins with http"),
        ([], "--cloud"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        spot.main(flags)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_watcher_itself_needs_neither_ray_nor_torch() -> None:
    loaded = "import sys, tune_bisenet.spot; sys.exit(any(name in sys.modules for name in ('ray', 'torch', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
