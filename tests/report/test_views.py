"""Sections as tables: how the search stands, settings, costs."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from searches import RUNS, SESSION, cut, epochs, standing, write_search, write_study, write_trial

from tune_bisenet.records import EPOCHS, TrialState
from tune_bisenet.report import state, views
from tune_bisenet.report.read import SearchRecord, read_search

OPEN = SESSION | {"ended": None}


def search_of(tmp_path: Path, **changes: object) -> SearchRecord:
    return read_search(write_search(tmp_path, **changes))  # type: ignore[arg-type]


def lines(view: views.View) -> list[dict[str, str]]:
    return [dict(zip(view.columns, (cell.text for cell in row), strict=True)) for row in view.rows]


def marked(view: views.View) -> set[tuple[str, str]]:
    return {(row[0].text, cell.text) for row in view.rows for cell in row if cell.marked}


def running(trial: str) -> TrialState:
    return replace(standing(trial, epochs(50)[:1]), status="running")


# --- how it stands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "one", "word"),
    [
        ({}, {}, "finished"),
        ({}, {"status": "failed", "error": "no memory"}, "ended with failures"),
        ({}, {"status": "waiting"}, "ended with failures"),
        ({"signal": 15}, {"status": "waiting"}, "interrupted"),
        ({"ended": None}, {"status": "running"}, "running"),
    ],
)
def test_the_state_follows_session_and_trials(
    tmp_path: Path, session: dict[str, object], one: dict[str, str], word: str
) -> None:
    changed = TrialState.from_json(standing("r02-s1", epochs(50)).to_json() | one)
    search = search_of(tmp_path, sessions=[SESSION | session], standings={"r02-s1": changed})
    assert state.state(search, search.changed + timedelta(minutes=1)).word == word


@pytest.mark.parametrize(("status", "word"), [("waiting", "limit reached"), ("finished", "finished")])
def test_a_limit_that_ended_the_search_is_told(tmp_path: Path, status: str, word: str) -> None:
    changed = TrialState.from_json(standing("r02-s1", epochs(50)).to_json() | {"status": status})
    session = SESSION | {"limit": "--time-budget 2h was used up"}
    search = search_of(tmp_path, sessions=[session], standings={"r02-s1": changed})
    found = state.state(search, search.changed)
    assert found.word == word
    assert "as --time-budget 2h was used up: " in found.sentence


def test_of_a_study_the_best_is_told(tmp_path: Path) -> None:
    search = read_search(write_study(tmp_path, fresh_seeds=2))
    best = max(search.standings, key=lambda one: one.best_miou or 0)
    words = f"The best of them is {best.trial} with {best.best_miou:.2f} % mIoU."
    assert state.state(search, search.changed).sentence.endswith(words)


def test_a_search_long_silent_has_perhaps_died(tmp_path: Path) -> None:
    search = search_of(tmp_path, sessions=[OPEN], standings={"r02-s1": running("r02-s1")})
    found = state.state(search, search.changed + timedelta(minutes=11))
    assert found.word == "silent"
    assert "it has died, or an epoch takes very long. 3 of 4 trials have ended." in found.sentence


def test_slow_epochs_are_waited_for(tmp_path: Path) -> None:
    folder = write_search(tmp_path, sessions=[OPEN], standings={"r02-s1": running("r02-s1")})
    write_trial(folder / "r02-s1", [replace(epochs(50)[0], train_seconds=3600.0)])
    search = read_search(folder)
    assert state.state(search, search.changed + timedelta(hours=4)).word == "running"
    assert state.state(search, search.changed + timedelta(hours=6)).word == "silent"


def test_times_are_told_with_their_zone() -> None:
    assert state.when(datetime(2026, 3, 1, 14, 5, tzinfo=UTC)) == "2026-03-01 14:05 UTC"


# --- tables ---------------------------------------------------------------------------------------------------------


def test_settings_show_what_varies_and_mark_what_is_not_the_baselines(tmp_path: Path) -> None:
    view = views.settings_view(search_of(tmp_path))
    assert lines(view) == [{"run": "r01", "accumulation": "1"}, {"run": "r02", "accumulation": "2"}]
    assert marked(view) == {("r02", "2")}
    assert "optimizer lr 0.01" in view.words


def test_a_setting_that_a_row_does_not_have_is_told_apart_from_none(tmp_path: Path) -> None:
    adamw = {"kind": "adamw", "lr": 0.001, "weight_decay": 1e-4}
    trials = {name: run.model_dump(mode="json") for name, run in RUNS.items()}
    trials["r02-s0"]["optimizer"] = adamw
    trials["r02-s0"]["max_grad_norm"] = 1.0
    second = lines(views.settings_view(search_of(tmp_path, trials=trials)))[1]
    first = lines(views.settings_view(search_of(tmp_path, trials=trials)))[0]
    assert (second["optimizer momentum"], first["max grad norm"]) == ("–", "none")


def test_early_ends_are_told_with_their_reasons(tmp_path: Path) -> None:
    stopped = replace(standing("r02-s0", epochs(50)[:2]), status="stopped", stopped_by="ASHA, epoch 2")
    view = views.early_ends(search_of(tmp_path, standings={"r02-s0": stopped}))
    assert lines(view) == [
        {"trial": "r02-s0", "epochs": "2 of 3", "how and why": "stopped: ASHA, epoch 2", "best mIoU": "40.00"}
    ]
    assert views.early_ends(search_of(tmp_path / "whole")).words == "Every trial went to its last epoch."


def test_the_leaderboard_is_best_first_with_notes(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    cut(folder / "r01-s0", EPOCHS)
    board = lines(views.leaderboard(read_search(folder)))
    assert [line["trial"] for line in board] == ["r02-s1", "r02-s0", "r01-s1", "r01-s0"]
    assert board[0]["gain"] == "+2.50"
    assert board[-1]["status"].startswith("finished; epochs.json cannot be read")


def test_costs_are_hours_of_the_devices_that_trials_have(tmp_path: Path) -> None:
    search = search_of(tmp_path)
    everything = lines(views.costs(search, price=100.0))[-1]
    assert everything == {
        "run": "all",
        "trials": "4",
        "epochs": "12",
        "GPU-hours": "0.06",  # 12 epochs of 36 seconds on half a GPU
        "cost": "6.00",
        "images per second": "20.0",
        "seconds per epoch": "36.0",
        "of that validation": "6.0",
    }
    assert "cost" not in lines(views.costs(search, price=None))[0]


def test_a_study_tells_costs_by_what_trials_were_for(tmp_path: Path) -> None:
    found = lines(views.costs(read_search(write_study(tmp_path, fresh_seeds=2)), price=None))
    assert [(line["trials of"], line["trials"]) for line in found] == [
        ("declared rows", "2"),
        ("sampled", "21"),
        ("fresh seeds", "6"),
        ("all", "29"),
    ]


def test_a_study_shows_the_settings_of_its_rows_and_of_its_best(tmp_path: Path) -> None:
    view = views.settings_view(read_search(write_study(tmp_path)))
    assert [line["run"] for line in lines(view)][:2] == ["r01", "r02"]
    assert 5 <= len(view.rows) <= 7
    assert "tables/settings.csv" in view.words


def test_a_leaderboard_of_two_goals_has_latency(tmp_path: Path) -> None:
    assert "ms" in views.leaderboard(read_search(write_study(tmp_path, latency=True))).columns
    assert "ms" not in views.leaderboard(read_search(write_study(tmp_path / "one"))).columns


def test_without_gpus_the_machine_is_shared_by_the_trials_at_once(tmp_path: Path) -> None:
    search = search_of(tmp_path, sessions=[SESSION | {"gpus_per_trial": 0.0}])
    assert views.cost_basis(search.manifest.sessions[-1]) == (0.5, "machine-hours")
    assert "0.5 of the machine" in views.costs(search, price=None).words


def test_every_session_is_told(tmp_path: Path) -> None:
    second = SESSION | {"ended": None, "commit": None, "command": ["python", "-m", "tune_bisenet.run", "a b"]}
    made = [
        (line["what"], line["value"]) for line in lines(state.made(search_of(tmp_path, sessions=[SESSION, second])))
    ]
    assert ("session 2", "2026-03-01 10:00 UTC to open") in made
    assert ("command", "python -m tune_bisenet.run 'a b'") in made
    assert ("commit", "not from a checkout") in made
    assert ("data digest", "feedbeef at 32x64") in made


def test_study_and_limits_are_told(tmp_path: Path) -> None:
    search = read_search(write_study(tmp_path, limits={"trials": 24, "time_budget_seconds": 7200, "gpu_hours": 3}))
    made = {line["what"]: line["value"] for line in lines(state.made(search))}
    assert made["study"] == "sampled search in postgresql://me:***@host/studies"
    assert made["sampler"] == "tpe, for miou"
    assert made["limits"] == "24 trials, 2:00:00 hours, 3 GPU-hours"
