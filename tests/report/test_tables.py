"""The report's tables: every number of the search, alike in CSV and Parquet."""

import csv
import io
from pathlib import Path

import pyarrow.parquet
import pytest
from searches import MIOU, RUNS, write_search, write_trial

from tune_bisenet.data.classes import CLASS_NAMES
from tune_bisenet.report.judging import judge_search
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.tables import files, mean_iou, settings, tables


@pytest.fixture
def search(tmp_path: Path) -> SearchRecord:
    return read_search(write_search(tmp_path))


def test_every_table_has_its_lines(search: SearchRecord) -> None:
    lines = {name: len(table) for name, table in tables(search, judge_search(search)).items()}
    assert lines == {"verdicts": 2, "leaderboard": 4, "epochs": 12, "iou": 4 * 19, "settings": 4, "params": 0}


def test_epochs_are_in_long_form(search: SearchRecord) -> None:
    last = tables(search, judge_search(search))["epochs"][-1]
    assert (last["trial"], last["run"], last["seed"], last["epoch"], last["miou"]) == ("r02-s1", "r02", 1, 3, 53.5)
    assert "iou" not in last


def test_iou_is_that_of_the_best_epoch_and_empty_for_a_class_that_does_not_occur(search: SearchRecord) -> None:
    lines = [line for line in tables(search, judge_search(search))["iou"] if line["trial"] == "r01-s1"]
    assert [line["class"] for line in lines] == list(CLASS_NAMES)
    assert [line["iou"] for line in lines] == [51.0] * 18 + [None]


def test_the_verdicts_hold_promise_measurement_and_interval(search: SearchRecord) -> None:
    line = tables(search, judge_search(search))["verdicts"][1]
    assert (line["run"], line["kind"], line["promised_low"], line["promised_high"]) == ("r02", "gain", 1, 3)
    assert line["estimate"] == pytest.approx(2.25)  # 2.0 at seed 0, 2.5 at seed 1
    assert line["interval_low"] < 2.25 < line["interval_high"]


def test_the_leaderboard_has_gains_and_notes(search: SearchRecord) -> None:
    board = {line["trial"]: line for line in tables(search, judge_search(search))["leaderboard"]}
    assert (board["r02-s1"]["gain"], board["r01-s1"]["gain"]) == (2.5, None)
    assert board["r02-s1"]["notes"] == ""


def test_settings_are_leaves_with_the_size_in_words() -> None:
    found = settings(RUNS["r02-s0"])
    assert (found["optimizer lr"], found["accumulation"], found["image_size"]) == (0.01, 2, "32x64")
    assert not {"name", "seed", "expect"} & found.keys()


def test_csv_and_parquet_hold_the_same(search: SearchRecord) -> None:
    written = dict(files(tables(search, judge_search(search))))
    assert sorted(written) == sorted(
        f"{name}.{kind}"
        for name in ("verdicts", "leaderboard", "epochs", "iou", "settings")
        for kind in ("csv", "parquet")
    )
    for name in ("epochs", "iou", "leaderboard"):
        from_csv = list(csv.DictReader(io.StringIO(written[f"{name}.csv"].decode())))
        from_parquet = pyarrow.parquet.read_table(io.BytesIO(written[f"{name}.parquet"])).to_pylist()
        assert [line["trial"] for line in from_csv] == [line["trial"] for line in from_parquet]
        assert list(from_csv[0]) == list(from_parquet[0])


def test_a_table_without_lines_has_no_file() -> None:
    assert list(files({"nothing": []})) == []


def test_the_mean_iou_of_a_row_is_over_its_seeds(search: SearchRecord) -> None:
    assert mean_iou(search)["r02"] == [(MIOU["r02-s0"] + MIOU["r02-s1"]) / 2] * 18 + [None]


def test_a_row_without_epochs_has_no_mean_iou(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    for seed in (0, 1):
        write_trial(folder / f"r02-s{seed}", [])
    assert list(mean_iou(read_search(folder))) == ["r01"]
