"""Flags: durations as people write them, limits that are kept over sessions, defaults, and trials that are added."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tune_bisenet.options import (
    NAME_PATTERN,
    InputError,
    Limits,
    Options,
    SearchConfig,
    TrialGroup,
    default_name,
    parse_options,
    problems_of,
    resolve_options,
)
from tune_bisenet.records import DamagedFileError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30m1h", 5400), ("2d12h", 216000)])
def test_durations_are_sums_of_numbers_with_units(text: str, seconds: float) -> None:
    assert parse_options({"time_budget": text}) == (Options(time_budget=seconds), {})


@pytest.mark.parametrize("text", ["8", "h", "8 h", "8hours", "1h30", "-1h", "1h-30m", "", "1,5h", "eight hours"])
def test_an_invalid_duration_is_named_with_valid_ones(text: str) -> None:
    options, mistyped = parse_options({"time_budget": text, "name": "kept"})
    assert (options.time_budget, options.name) == (None, "kept")
    assert mistyped["time_budget"].startswith(f"--time-budget: {text} is not")
    assert "1h30m" in mistyped["time_budget"]


@pytest.mark.parametrize(
    "flags",
    [
        {"time_budget": "0s"},
        {"trials": 0},
        {"gpu_hours": -1},
        {"confirm": 0},
        {"device": "gpu"},
        {"gpus_per_trial": 1.5},
        {"gpus_per_trial": 2},
        {"gpus_per_trial": "-0.5"},
        {"gpus_per_trial": "nan"},
        {"gpus_per_trial": "half"},
        {"gpus_per_trial": ""},
        {"precision": "fp8"},
        {"step": "compiled"},
        {"objectives": "latency"},
        {"name": "../x"},
        {"seeds": "1,1"},
        {"looks": "1,3"},
        {"looks": "5,3"},
        {"image_size": "33x64"},
    ],
)
def test_a_wrong_value_is_named_with_its_flag_and_left_out(flags: dict[str, Any]) -> None:
    (name,) = flags
    options, mistyped = parse_options(flags | {"epochs": "3"})
    assert options == Options(epochs=3)
    assert mistyped.keys() == {name}
    assert mistyped[name].startswith(f"--{name.replace('_', '-')}")


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0.0), ("0.5", 0.5), ("1", 1.0)])
def test_a_share_of_a_gpu_is_a_number_or_auto(text: str, value: object) -> None:
    options, mistyped = parse_options({"gpus_per_trial": text})
    assert (options.gpus_per_trial, mistyped) == (value, {})


def test_a_session_changes_the_limits_it_names_and_keeps_the_others() -> None:
    limits = Limits(trials=40, time_budget=3600.0, confirm=3)
    changed = limits.updated(Options(trials=60, gpu_hours=8))
    assert changed == Limits(trials=60, time_budget=3600.0, gpu_hours=8, confirm=3)
    assert limits.updated(Options()) == limits


def test_the_limit_that_is_reached_is_named() -> None:
    limits = Limits(trials=3, time_budget=5400.0, gpu_hours=2.5)
    assert limits.limit_reached(seconds=5399.9, gpu_hours=2.49) == ""
    assert limits.limit_reached(seconds=5400, gpu_hours=0).startswith("--time-budget 1 h 30 min")
    assert limits.limit_reached(seconds=0, gpu_hours=2.5).startswith("--gpu-hours 2.5")
    unlimited = Limits(trials=1, confirm=1)  # trials are counted by the study
    assert unlimited.limit_reached(seconds=1e9, gpu_hours=1e9) == ""


def test_the_built_in_streets_are_a_proxy_without_pretrained_weights() -> None:
    streets = resolve_options(Options(), default_data="streets")
    assert (streets.proxy, streets.backbone, streets.scheduler) == (True, "none", "asha")
    cityscapes = resolve_options(Options(objectives=("miou", "latency")), default_data="/data")
    assert (cityscapes.proxy, cityscapes.backbone, cityscapes.scheduler) == (False, "imagenet", "fifo")


def test_kernels_that_repeat_their_results_are_used_where_they_are_asked_for() -> None:
    assert resolve_options(Options(deterministic=True), default_data="streets").deterministic
    assert not resolve_options(Options(), default_data="streets").deterministic


def test_how_a_gpu_is_given_a_step_is_kept_by_the_search() -> None:
    assert resolve_options(Options(step="eager"), default_data="streets").step == "eager"
    assert resolve_options(Options(), default_data="streets").step == "auto"


def test_added_trials_have_the_rows_or_seeds_of_the_first_where_none_are_given() -> None:
    config: SearchConfig = resolve_options(Options(runs=("a",), seeds=(1, 2)), default_data="streets")
    more = config.with_group(runs=None, seeds=(3,)).with_group(runs=("b",), seeds=None)
    groups = [TrialGroup(runs=("a",), seeds=(3,)), TrialGroup(runs=("b",), seeds=(1, 2))]
    assert more.groups == (config.groups[0], *groups)
    assert [config.default_seed, resolve_options(Options(), default_data="streets").default_seed] == [None, 0]
    with pytest.raises(ValueError, match="--add"):
        config.with_group(runs=None, seeds=None)


def test_deciding_begins_with_the_seeds_of_the_first_look_and_stops_nothing_early() -> None:
    decide = resolve_options(Options(decide=True), default_data="streets")
    assert (decide.groups[0].seeds, decide.looks, decide.scheduler) == ((0, 1, 2), (3, 5, 8, 12), "fifo")
    looks = resolve_options(Options(looks=(2, 4)), default_data="streets")
    assert (looks.groups[0].seeds, looks.decide, looks.scheduler) == ((0, 1), False, "asha")


def test_trials_are_planned_if_they_reach_a_look_and_no_further() -> None:
    config = resolve_options(Options(looks=(2, 4)), default_data="streets")
    assert config.is_planned
    fourth = config.with_group(runs=("r05",), seeds=(2, 3))
    assert fourth.is_planned
    assert not fourth.with_group(runs=None, seeds=(4,)).is_planned
    assert not config.with_group(runs=("r05",), seeds=None).is_planned, "a row added after a look"
    single = resolve_options(Options(), default_data="streets")
    assert single.is_planned
    assert not single.with_group(runs=None, seeds=(1,)).is_planned


def test_the_control_is_among_the_rows_that_are_named() -> None:
    assert resolve_options(Options(runs=("r01",), control=True), default_data="streets").groups[0].runs == ("r01", "aa")
    assert resolve_options(Options(control=True), default_data="streets").groups[0].runs is None


@pytest.mark.parametrize("space", [None, "smoke", "spaces/what?now.py", "/x/_ .py", "é" * 200 + ".py", "x" * 200])
def test_a_search_without_a_name_gets_one_that_can_be_resumed(space: str | None) -> None:
    assert re.fullmatch(NAME_PATTERN, default_name(space))


def test_paths_are_told_from_addresses_by_how_they_begin() -> None:
    config = resolve_options(Options(data="/data/s3://x", warm_start="what?token=1"), default_data="streets")
    assert (config.data, config.warm_start) == ("/data/s3:/x", str(Path.cwd() / "what?token=1"))


def test_an_error_of_pythons_own_is_no_users_mistake() -> None:
    assert problems_of(InputError("first", "second")) == ["first", "second"]
    assert problems_of(DamagedFileError("damaged")) == ["damaged"]
    assert problems_of(ValueError("ours")) == ["ours"]
    for error in (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), json.JSONDecodeError("bad", "{", 1)):
        with pytest.raises(type(error)):
            problems_of(error)


@pytest.mark.parametrize("flag", ["runs", "seeds", "looks", "rerun", "objectives"])
@pytest.mark.parametrize("text", ["", ",", " ", "1,", ",1", "1,,2"])
def test_a_list_with_nothing_between_its_commas_is_refused(flag: str, text: str) -> None:
    _options, mistyped = parse_options({flag: text})
    assert f"--{flag}: {text!r} lacks a value" in mistyped[flag]
