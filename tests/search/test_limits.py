"""When a search ends by itself: limits as they are written, kept over sessions, and used up."""

from typing import Any

import pytest

from tune_bisenet.options import Limits, Options, duration_words, parse_options


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("90m", 5400), ("8h", 28800), ("1.5h", 5400), ("1h30m", 5400), ("2d12h", 216000), ("30m1h", 5400)],
)
def test_a_duration_is_written_as_people_do(text: str, seconds: float) -> None:
    given, mistyped = parse_options({"time_budget": text})
    assert given.time_budget == seconds
    assert not mistyped


@pytest.mark.parametrize("text", ["8", "h", "8 h", "8hours", "1h30", "-1h", "1h-30m", "", "1,5h", "eight hours"])
def test_what_is_no_duration_is_named_with_ones_that_are(text: str) -> None:
    given, mistyped = parse_options({"time_budget": text})
    assert given.time_budget is None
    assert mistyped == {"time_budget": f"--time-budget: {text} is no time: write it as 8h, 90m or 1h30m."}


@pytest.mark.parametrize("text", ["0s", "0h0m"])
def test_no_time_at_all_is_refused(text: str) -> None:
    assert "greater than 0" in parse_options({"time_budget": text})[1]["time_budget"]


@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 61, 3599, 3600, 5400, 86400, 90061])
def test_a_duration_in_words_is_the_same_duration(seconds: int) -> None:
    words = duration_words(seconds)
    assert words == "0s" if seconds == 0 else parse_options({"time_budget": words})[0].time_budget == seconds


@pytest.mark.parametrize("flags", [{"trials": 0}, {"gpu_hours": 0}, {"gpu_hours": -1}, {"confirm": 0}])
def test_a_limit_that_allows_nothing_is_refused(flags: dict[str, Any]) -> None:
    assert set(parse_options(flags)[1]) == set(flags)


def test_a_session_changes_the_limits_it_names_and_keeps_the_others() -> None:
    limits = Limits(trials=40, time_budget=3600.0, confirm=3)
    changed = limits.updated(Options(trials=60, gpu_hours=8))
    assert changed == Limits(trials=60, time_budget=3600.0, gpu_hours=8, confirm=3)
    assert limits.updated(Options()) == limits


def test_a_limit_is_used_up_when_it_is_reached_and_says_which() -> None:
    limits = Limits(trials=3, time_budget=5400.0, gpu_hours=2.5)
    assert limits.used_up(seconds=5399.9, gpu_hours=2.49) == ""
    assert limits.used_up(seconds=5400, gpu_hours=0) == "--time-budget 1h30m was used up"
    assert limits.used_up(seconds=0, gpu_hours=2.5) == "--gpu-hours 2.5 were used up"


def test_without_limits_nothing_is_ever_used_up() -> None:
    assert Limits().used_up(seconds=1e9, gpu_hours=1e9) == ""
    assert Limits(trials=1, confirm=1).used_up(seconds=1e9, gpu_hours=1e9) == "", "trials are counted by the study"
