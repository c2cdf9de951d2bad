"""The watcher of spot notices reads them as AWS and Google give them, and does not give up."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest
from clouds import Cloud

from tune_bisenet.cluster import daemons
from tune_bisenet.cluster.daemons import Notice, aws_notice, gcp_notice, watch

PREEMPTED = "/computeMetadata/v1/instance/preempted"
INSTANCE_ACTION = "/latest/meta-data/spot/instance-action"
NOTICE = Notice("gone at noon", 9)


@pytest.fixture(autouse=True)
def _long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait long: the cloud is a thread of the test's own process, and takes seconds on a busy machine."""
    monkeypatch.setattr(daemons, "ANSWER_SECONDS", 120.0)


def test_aws_gives_notice_with_a_time(cloud: Cloud) -> None:
    cloud.pages["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-01-05T18:02:00Z"}'
    assert aws_notice(cloud.url) is None, "a recommendation is no notice"
    began = time.time()
    cloud.takes_away(seconds=120)
    notice = aws_notice(cloud.url)
    assert notice is not None
    # A notice gives whole seconds, and some of them may have passed.
    assert 119 - (time.time() - began) <= notice.seconds_left <= 120
    assert "terminate" in notice.reason
    assert cloud.asked == ["PUT /latest/api/token", INSTANCE_ACTION] * 2


def test_google_gives_notice_of_a_preemption(cloud: Cloud) -> None:
    cloud.pages[PREEMPTED] = "FALSE"
    assert gcp_notice(cloud.url) is None
    cloud.pages[PREEMPTED] = "TRUE\n"
    notice = gcp_notice(cloud.url)
    assert notice is not None
    assert notice.seconds_left == 30


def test_no_proxy_is_asked(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    cloud.takes_away(seconds=120)
    assert aws_notice(cloud.url) is not None


def watched(
    looks: Sequence[Callable[[], Notice | None]], drains: list[str], caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Return what the watcher logs while the cloud and Ray answer like that, one after the other."""
    left, drained = iter(looks), iter(drains)
    with caplog.at_level(logging.WARNING):
        watch(lambda: next(left)(), lambda _: next(drained), poll_seconds=0.001)
    assert list(left) == list(drained) == [], "all of it was asked"
    return caplog.messages


def test_a_service_that_is_away_is_asked_again_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    def away() -> None:
        raise OSError("no route to host")

    messages = watched([away, away, away, lambda: None, lambda: None, lambda: NOTICE], [""], caplog)
    assert len(messages) == 3
    assert "no route to host" in messages[0]
    assert "gone at noon" in messages[2]


def test_a_node_that_cannot_be_drained_yet_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    messages = watched([lambda: NOTICE] * 3, ["no Ray", "no Ray", ""], caplog)
    assert len(messages) == 2
    assert "cannot be drained: no Ray" in messages[0]


@pytest.mark.parametrize("answer", ["", "{}", "[]", '{"action": "stop", "time": "noon"}'])
def test_an_answer_that_makes_no_sense_does_not_end_the_watch(
    cloud: Cloud, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.pages[INSTANCE_ACTION] = answer
    looks = [lambda: aws_notice(cloud.url)] * 2 + [lambda: NOTICE]
    messages = watched(looks, [""], caplog)
    assert ["does not answer" in message for message in messages] == [True, False]


def test_no_service_and_that_of_another_cloud_are_errors(cloud: Cloud) -> None:
    with pytest.raises(OSError, match="refused"):
        aws_notice("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="instance/preempted"):
        gcp_notice(cloud.url)


def test_the_daemons_need_neither_ray_nor_torch() -> None:
    code = "import sys, tune_bisenet.cluster.daemons; sys.exit(any(name in sys.modules for name in ('ray', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
