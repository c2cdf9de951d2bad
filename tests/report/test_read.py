"""Reading a search: all that is there, whatever is damaged, wherever it lies."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
from searches import MIOU, RUNS, best, cut, epochs, manifest, standing, write_json, write_search, write_trial

from tune_bisenet import records
from tune_bisenet.records import BEST_PREDICTIONS, EPOCHS, SEARCH, TRIALS, predictions_to_bytes
from tune_bisenet.report.read import read_best, read_search
from tune_bisenet.storage import Storage


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return write_search(tmp_path / "small")


def test_a_search_comes_back_as_it_was_written(folder: Storage) -> None:
    search = read_search(folder)
    assert list(search.trials) == list(RUNS)
    assert [row.name for row in search.rows] == ["r01", "r02"]
    record = search.trials["r02-s1"]
    assert record.run == RUNS["r02-s1"]
    assert list(record.epochs) == epochs(MIOU["r02-s1"])
    assert record.standing == standing("r02-s1", epochs(MIOU["r02-s1"]))
    assert record.confusions is not None
    assert np.array_equal(record.confusions, best().confusions)
    assert search.all_notes == []


def test_pictures_come_back_as_they_were_written(folder: Storage) -> None:
    read = read_best(folder / "r01-s0")
    for name, value in vars(best(0)).items():
        assert np.array_equal(getattr(read, name), value), name


def test_a_search_in_object_storage_is_read_the_same(folder: Storage, tmp_path: Path) -> None:
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    elsewhere = read_search(Storage(filesystem, "small", "s3://bucket/small"))
    here = read_search(folder)
    assert elsewhere.standings == here.standings
    assert [record.epochs for record in elsewhere.trials.values()] == [rec.epochs for rec in here.trials.values()]
    assert all(record.confusions is not None for record in elsewhere.trials.values())


def test_a_newer_manifest_may_say_more(tmp_path: Path) -> None:
    assert read_search(write_search(tmp_path, something_new={"a": 1})).manifest.name == "small search"


def test_news_is_the_latest_change_of_a_trial(folder: Storage) -> None:
    for path in Path(folder.path).rglob("*.json"):
        os.utime(path, (1_800_000_000, 1_800_000_000))
    os.utime(Path(folder.path) / "r02-s0" / EPOCHS, (1_900_000_000, 1_900_000_000))
    assert read_search(folder).changed.timestamp() == 1_900_000_000


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EPOCHS, BEST_PREDICTIONS])
def test_a_truncated_file_of_a_trial_costs_that_trial_a_note(folder: Storage, name: str) -> None:
    cut(folder / "r02-s0", name)
    search = read_search(folder)
    (note,) = search.all_notes
    assert note.startswith(f"r02-s0: {name} ")
    assert len(search.trials["r01-s0"].epochs) == 3


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"{}x", b'[{"epoch": 1}]', b'"words"', b"\xff\xfe", b"[[]]", b"7", b"null"]
)
def test_epochs_of_another_shape_cost_a_note(folder: Storage, content: bytes) -> None:
    (folder / "r01-s1").write(EPOCHS, content)
    record = read_search(folder).trials["r01-s1"]
    assert record.epochs == ()
    assert record.notes


@pytest.mark.parametrize("change", [{"miou": "high"}, {"iou": [1.0]}, {"epoch": 1.5}, {"unheard_of": 1}])
def test_an_epoch_with_a_wrong_value_costs_a_note(folder: Storage, change: dict[str, object]) -> None:
    write_json(folder / "r01-s1", EPOCHS, [epochs(50.0)[0].to_json() | change])
    assert read_search(folder).trials["r01-s1"].notes


def test_every_flipped_byte_of_the_predictions_is_survived(folder: Storage) -> None:
    content = predictions_to_bytes(best())
    for place in range(0, len(content), len(content) // 60):
        flipped = bytes([content[place] ^ 0xFF])
        (folder / "r01-s0").write(BEST_PREDICTIONS, content[:place] + flipped + content[place + 1 :])
        assert len(read_search(folder).trials) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        replace(best(), confusions=np.zeros((2, 3, 3), np.int32)),
        replace(best(), confusions=np.zeros(5, np.int32)),
    ],
)
def test_counts_of_other_classes_cost_a_note(folder: Storage, wrong: object) -> None:
    (folder / "r01-s0").write(BEST_PREDICTIONS, predictions_to_bytes(wrong))  # type: ignore[arg-type]
    record = read_search(folder).trials["r01-s0"]
    assert record.confusions is None
    assert record.notes


def test_pictures_that_do_not_belong_together_are_an_error(folder: Storage) -> None:
    (folder / "r01-s0").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), names=("only one",))))
    with pytest.raises(ValueError, match="belong together"):
        read_best(folder / "r01-s0")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"standings": 3}', b'{"standings": [{"trial": 1}]}'])
def test_lost_standings_are_made_from_the_epochs(folder: Storage, content: bytes) -> None:
    folder.write(TRIALS, content)
    broken = [replace(one, loss=math.nan) for one in epochs(52.0)[:2]]
    write_trial(folder / "r02-s0", epochs(52.0)[:1])
    write_trial(folder / "r02-s1", broken)
    search = read_search(folder)
    assert search.standings[0] == standing("r01-s0", epochs(50.0))
    assert [one.status for one in search.standings] == ["finished", "running", "finished", "diverged"]
    (note,) = search.notes
    assert note.startswith(TRIALS)


def test_lost_standings_are_those_that_trials_ended_with(folder: Storage) -> None:
    before = read_search(folder).standings
    stopped = replace(before[1], status="stopped", stopped_by="below the median (ASHA)")
    records.keep_ending(folder / stopped.trial, stopped)
    folder.delete(TRIALS)
    assert read_search(folder).standings[1] == stopped


def test_a_search_that_has_only_begun_has_waiting_trials(tmp_path: Path) -> None:
    folder = Storage.at(str(tmp_path))
    write_json(folder, SEARCH, manifest())
    search = read_search(folder)
    assert {one.status for one in search.standings} == {"waiting"}
    assert all(not record.epochs and not record.notes for record in search.trials.values())


def test_a_folder_without_a_search_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no search in .*expected search\.json there. Point to STORAGE/NAME\."):
        read_search(Storage.at(str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"name": "x", "trials": {"a": {}}}'])
def test_a_damaged_manifest_is_told_so(tmp_path: Path, content: bytes) -> None:
    folder = Storage.at(str(tmp_path))
    folder.write(SEARCH, content)
    with pytest.raises(ValueError, match=r"search\.json is damaged"):
        read_search(folder)
