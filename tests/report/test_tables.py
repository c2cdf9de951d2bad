"""The report's tables: those of the page, and those of files, alike in CSV and Parquet."""

import csv
import io
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from helpers.rows import SESSION
from searches import (
    MIOU,
    cut,
    epochs,
    point,
    state_of,
    suggested,
    write_search,
    write_study,
    write_trial,
)

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.records import TRIAL
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.tables import (
    Marked,
    cost_table,
    file_tables,
    leaderboard_table,
    mean_class_iou,
    search_state,
    settings_table,
    shown_rows,
    table_files,
)
from tune_bisenet.report.verdicts import judge_search


def search_of(folder: Path, **changes: object) -> SearchRecord:
    return read_search(write_search(folder, **changes))  # type: ignore[arg-type]


@pytest.fixture
def search(tmp_path: Path) -> SearchRecord:
    return search_of(tmp_path / "small")


@pytest.mark.parametrize(
    ("session", "changes", "word"),
    [
        ({}, {}, "finished"),
        ({}, {"status": "failed", "error": "no memory"}, "ended with failures"),
        ({}, {"status": "waiting"}, "ended with failures"),
        ({"signal": 15}, {"status": "waiting"}, "interrupted"),
        ({"ended": None}, {"status": "running"}, "running"),
        ({"limit": "--time-budget 2h was used up"}, {"status": "waiting"}, "limit reached"),
        ({"limit": "--time-budget 2h was used up"}, {}, "finished"),
    ],
)
def test_the_state_follows_session_and_trials(
    tmp_path: Path, session: dict[str, object], changes: dict[str, Any], word: str
) -> None:
    changed = replace(state_of("r02-s1", epochs(50)), **changes)
    search = search_of(tmp_path, sessions=[SESSION | session], states={"r02-s1": changed})
    found, sentence = search_state(search, search.changed + timedelta(minutes=1))
    assert found == word
    assert str(session.get("limit", "")) in sentence


def test_a_search_silent_for_longer_than_its_epochs_take_has_perhaps_died(tmp_path: Path) -> None:
    running = replace(state_of("r02-s1", epochs(50)[:1]), status="running")
    folder = write_search(tmp_path, sessions=[SESSION | {"ended": None}], states={"r02-s1": running})
    search = read_search(folder)
    assert search_state(search, search.changed + timedelta(minutes=11))[0] == "silent"
    write_trial(folder, "r02-s1", [replace(epochs(50)[0], train_seconds=3600.0)])
    slow = read_search(folder)
    assert search_state(slow, slow.changed + timedelta(hours=4))[0] == "running"
    assert search_state(slow, slow.changed + timedelta(hours=6))[0] == "silent"


def test_the_leaderboard_is_best_first_with_notes(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    cut(folder / "r01-s0", TRIAL)
    board = leaderboard_table(read_search(folder)).lines
    assert [(line["run"], line["seed"]) for line in board] == [("r02", "1"), ("r02", "0"), ("r01", "1"), ("r01", "0")]
    assert board[0]["over r01"] == "+2.50"
    assert "trial.json cannot be read" in board[-1]["status"]
    assert isinstance(board[-1]["status"], Marked)


def test_costs_are_hours_of_the_devices_that_trials_have(search: SearchRecord) -> None:
    assert cost_table(search, price=100.0).lines[-1] == {
        "run": "all",
        "trials": "4",
        "epochs": "12",
        "GPU-hours": "0.06",  # 12 epochs of 36 seconds on half a GPU
        "cost": "6.00",
        "images per second": "20.0",
        "seconds per epoch": "36.0",
        "of that validation": "6.0",
    }
    assert "cost" not in cost_table(search, price=None).lines[0]


def test_without_gpus_the_machine_is_shared_by_the_trials_at_once(tmp_path: Path) -> None:
    search = search_of(tmp_path, sessions=[SESSION | {"gpus_per_trial": 0.0}])
    assert search.devices_per_trial == (0.5, "machine-hours")


def test_a_study_has_costs_by_origin_and_the_settings_of_its_rows_and_its_best(tmp_path: Path) -> None:
    search = read_search(write_study(tmp_path, fresh_seeds=2))
    costs = [(line["trials of"], line["trials"]) for line in cost_table(search, price=None).lines]
    assert costs == [("declared rows", "2"), ("sampled", "21"), ("fresh seeds", "6"), ("all", "29")]
    assert [line["run"] for line in settings_table(search).lines] == shown_rows(search)
    assert shown_rows(search)[:2] == ["r01", "r02"]
    assert 5 <= len(shown_rows(search)) <= 7


def test_every_table_has_its_lines(search: SearchRecord) -> None:
    tables = file_tables(search, judge_search(search))
    counts = {name: len(table) for name, table in tables.items()}
    of_trials = {"leaderboard": 4, "epochs": 12, "iou": 4 * 19, "settings": 4, "params": 0}
    assert counts == {"verdicts": 2, "noise": 1 + 18} | of_trials
    last = tables["epochs"][-1]
    assert (last["trial"], last["run"], last["seed"], last["epoch"], last["miou"]) == ("r02-s1", "r02", 1, 3, 53.5)
    ious = [line for line in tables["iou"] if line["trial"] == "r01-s1"]
    assert [line["class"] for line in ious] == list(CITYSCAPES.names)
    assert [line["iou"] for line in ious] == [51.0] * 18 + [None]
    gains = {line["trial"]: line["gain"] for line in tables["leaderboard"]}
    assert (gains["r02-s1"], gains["r01-s1"]) == (2.5, None)
    claim = tables["verdicts"][1]
    assert (claim["run"], claim["expected_low"], claim["expected_high"]) == ("r02", 1, 3)
    assert claim["interval_low"] < claim["estimate"] < claim["interval_high"]
    assert claim["estimate"] == pytest.approx(2.25)  # 2.0 at seed 0, 2.5 at seed 1
    assert (tables["settings"][1]["accumulation"], tables["settings"][1]["image_size"]) == (2, "32x64")


def test_csv_and_parquet_hold_the_same(search: SearchRecord) -> None:
    written = dict(table_files(search, judge_search(search)))
    assert {name.split(".")[0] for name in written} == {"verdicts", "noise", "leaderboard", "epochs", "iou", "settings"}
    for name in ("epochs", "iou", "leaderboard"):
        from_csv = list(csv.DictReader(io.StringIO(written[f"{name}.csv"].decode())))
        from_parquet = pyarrow.parquet.read_table(io.BytesIO(written[f"{name}.parquet"])).to_pylist()
        assert [line["trial"] for line in from_csv] == [line["trial"] for line in from_parquet]
        assert list(from_csv[0]) == list(from_parquet[0])


def test_the_mean_iou_of_a_row_is_over_its_seeds(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    assert mean_class_iou(read_search(folder))["r02"] == [(MIOU["r02-s0"] + MIOU["r02-s1"]) / 2] * 18 + [None]
    for seed in (0, 1):
        write_trial(folder, f"r02-s{seed}", [])
    assert list(mean_class_iou(read_search(folder))) == ["r01"]


def test_the_table_of_parameters_has_every_trial(tmp_path: Path) -> None:
    search = read_search(write_study(tmp_path, trials=8, known=2, fresh_seeds=1, latency=True))
    tables = file_tables(search, judge_search(search))
    params = {line["trial"]: line for line in tables["params"] if not line["known_from"]}
    assert len(params) == 11
    assert (params["r01"]["origin"], params["r01"]["number"], params["r01"]["state"]) == ("row", 2, "finished")
    assert params["r01"]["params_sgd_lr"] is None  # an AdamW
    assert params["r01"]["params_adamw_lr"] == point(2)["adamw_lr"]
    assert params["r01"]["latency_ms"] == pytest.approx(14.2)
    assert params["r01-s1"]["number"] is None


def test_a_column_of_mixed_values_is_written_as_words(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=4)
    mixed = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": [1, "all", True]}})
    for name in ("r01", "r02"):
        (folder / name).delete(TRIAL)
    for number, value in enumerate([1, "all", True, 1]):
        trial = f"t{number:04d}"
        spec = suggested(trial, "sampled", number=number, params={})
        write_trial(folder, trial, [], spec=replace(spec, params={"n": value}, distributions={"n": mixed}))
    search = read_search(folder)
    judgement = judge_search(search)
    assert [line["params_n"] for line in file_tables(search, judgement)["params"]] == ["1", "all", "True", "1"]
    assert "params.parquet" in dict(table_files(search, judgement))
