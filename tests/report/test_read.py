"""Reading a search: all that is there, whatever is damaged, wherever it is."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
from searches import (
    MIOU,
    RUNS,
    STUDY,
    best,
    cut,
    epochs,
    manifest,
    point,
    row,
    state_of,
    write_search,
    write_study,
    write_trial,
)

from tune_bisenet.records import (
    BEST_PREDICTIONS,
    KNOWN,
    SEARCH,
    TRIAL,
    TRIALS,
    SavedState,
    predictions_to_bytes,
    to_json,
)
from tune_bisenet.report.read import read_best, read_search
from tune_bisenet.storage import Storage


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return write_search(tmp_path / "small")


def change(folder: Storage, name: str, edit: Callable[[Any], None]) -> None:
    """Edit what a JSON file holds, as if it had been written so."""
    record = json.loads(folder.read(name) or b"")
    record.pop("checksum", None)
    edit(record)
    folder.write(name, json.dumps(record).encode())


def test_a_search_comes_back_as_it_was_written(folder: Storage) -> None:
    search = read_search(folder)
    assert list(search.trials) == list(RUNS)
    assert [run.name for run in search.rows] == ["r01", "r02"]
    record = search.trials["r02-s1"]
    assert record.run == RUNS["r02-s1"]
    assert list(record.epochs) == epochs(MIOU["r02-s1"])
    assert record.state == state_of("r02-s1", epochs(MIOU["r02-s1"]))
    assert record.confusions is not None
    assert np.array_equal(record.confusions, best().confusions)
    assert record.groups == best().groups
    assert search.all_notes == []
    kept = read_best(folder / "r01-s0")
    for name, value in vars(best(0)).items():
        assert np.array_equal(getattr(kept, name), value), name


def test_a_search_in_object_storage_is_read_the_same(folder: Storage, tmp_path: Path) -> None:
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    remote, local = read_search(Storage(filesystem, "small", "s3://bucket/small")), read_search(folder)
    assert list(remote.trials.values()) == list(local.trials.values())
    assert all(record.confusions is not None for record in remote.trials.values())


def test_news_is_the_latest_change_of_a_trial(folder: Storage) -> None:
    for path in Path(folder.path).rglob("*.json"):
        os.utime(path, (1_800_000_000, 1_800_000_000))
    os.utime(Path(folder.path) / "r02-s0" / TRIAL, (1_900_000_000, 1_900_000_000))
    assert read_search(folder).changed.timestamp() == 1_900_000_000


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{}x", b"\xff\xfe", b"null", b"{}"])
def test_a_trial_of_another_shape_costs_a_note(folder: Storage, content: bytes) -> None:
    (folder / "r01-s1").write(TRIAL, content)
    record = read_search(folder).trials["r01-s1"]
    assert record.epochs == ()
    assert record.notes


def test_the_record_of_another_trial_costs_a_note(folder: Storage) -> None:
    (folder / "r01-s1").write(TRIAL, (folder / "r01-s0").read(TRIAL) or b"")
    record = read_search(folder).trials["r01-s1"]
    assert (record.epochs, record.run.seed) == ((), 1)
    assert "trial.json is that of r01-s0" in record.notes


@pytest.mark.parametrize("wrong", [{"miou": "high"}, {"iou": [1.0]}, {"epoch": 1.5}, {"epoch": 2}])
def test_an_epoch_with_a_wrong_value_costs_a_note(folder: Storage, wrong: dict[str, object]) -> None:
    change(folder / "r01-s1", TRIAL, lambda record: record["epochs"][0].update(wrong))
    trial = read_search(folder).trials["r01-s1"]
    assert trial.epochs == ()
    assert trial.notes


def test_every_flipped_byte_of_the_predictions_is_survived(folder: Storage) -> None:
    content = predictions_to_bytes(best())
    for index in range(0, len(content), len(content) // 60):
        flipped = bytes([content[index] ^ 0xFF])
        (folder / "r01-s0").write(BEST_PREDICTIONS, content[:index] + flipped + content[index + 1 :])
        assert len(read_search(folder).trials) == 4


@pytest.mark.parametrize("shape", [(2, 3, 3), (5,)])
def test_counts_of_other_classes_cost_a_note(folder: Storage, shape: tuple[int, ...]) -> None:
    wrong = predictions_to_bytes(replace(best(), confusions=np.zeros(shape, np.int32)))
    (folder / "r01-s0").write(BEST_PREDICTIONS, wrong)
    record = read_search(folder).trials["r01-s0"]
    assert record.confusions is None
    assert record.notes


def test_counts_without_their_groups_cost_a_note(folder: Storage) -> None:
    (folder / "r01-s0").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), groups=("only one",))))
    record = read_search(folder).trials["r01-s0"]
    assert (record.confusions, record.groups) == (None, ())
    assert record.notes


def test_pictures_that_do_not_belong_together_are_an_error(folder: Storage) -> None:
    (folder / "r01-s0").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), names=("only one",))))
    with pytest.raises(ValueError, match="belong together"):
        read_best(folder / "r01-s0")


@pytest.mark.parametrize("content", [b"{", b'{"states": [{"trial": 1}]}', None])
def test_lost_states_are_those_of_the_trials_folders(folder: Storage, content: bytes | None) -> None:
    if content is None:
        folder.delete(TRIALS)
    else:
        folder.write(TRIALS, content)
    write_trial(folder, "r02-s0", epochs(52.0)[:1])
    search = read_search(folder)
    assert search.states[0] == state_of("r01-s0", epochs(50.0))
    # in declared order, the first seed of both rows before the second
    assert [state.status for state in search.states] == ["finished", "running", "finished", "finished"]
    assert [note.partition(" ")[0] for note in search.notes] == ([] if content is None else [TRIALS])


def test_a_number_in_trials_json_that_is_not_the_trials_own_is_not_used_but_told(folder: Storage) -> None:
    change(folder, TRIALS, lambda saved: saved["states"][0].update(best_miou=99.0, epochs=7))
    search = read_search(folder)
    assert search.states[0] == state_of("r01-s0", epochs(50.0))
    (note,) = search.all_notes
    assert note == "r01-s0: trials.json is wrong about it and not used: epochs is 7, not 3, best_miou is 99.0, not 50.0"


def test_numbers_of_a_trial_whose_record_is_lost_are_told_to_be_unchecked(folder: Storage) -> None:
    (folder / "r01-s0").delete(TRIAL)
    trial = read_search(folder).trials["r01-s0"]
    assert (trial.state, trial.epochs) == (state_of("r01-s0", epochs(50.0)), ())
    assert trial.notes == ("its numbers are those of trials.json, as its trial.json is lost",)


def test_an_end_that_the_trials_own_record_does_not_know_is_not_believed(folder: Storage) -> None:
    write_trial(folder, "r02-s0", epochs(52.0)[:2])
    search = read_search(folder)
    assert (search.trials["r02-s0"].state.status, search.trials["r02-s0"].state.epochs) == ("running", 2)
    assert "status is finished, not running" in search.trials["r02-s0"].notes[0]


def test_what_trials_json_has_not_heard_yet_is_no_contradiction(folder: Storage) -> None:
    behind = [state_of("r01-s0", epochs(50.0)[:1]), state_of("r01-s1", [])]
    states = [replace(state, status="running") for state in behind]
    folder.write(TRIALS, to_json(SavedState(states=tuple(states))))
    search = read_search(folder)
    assert search.all_notes == []
    assert search.trials["r01-s0"].state == state_of("r01-s0", epochs(50.0))


def test_a_folder_without_a_search_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no search in .*expected search\.json"):
        read_search(Storage.at(str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name": "x", "trials": {"a": {}}}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: bytes) -> None:
    folder = Storage.at(str(tmp_path))
    folder.write(SEARCH, content)
    with pytest.raises(ValueError, match=r"search\.json is damaged"):
        read_search(folder)


def test_trials_of_a_study_are_read_from_their_folders_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=4, fresh_seeds=1)
    (folder / "tables").make()
    folder.write(SEARCH, to_json(manifest(study=STUDY, trials={"r03": row("r03", 0)})))
    search = read_search(folder)
    names = list(search.trials)
    assert names[:5] == ["r01", "r02", "t0002", "t0003", "r03"], "a row that has not begun waits before fresh seeds"
    assert {name[-3:] for name in names[5:]} == {"-s1"} == {name[-3:] for name in search.fresh_trials}
    assert search.notes == ()
    assert search.trials["t0002"].spec.params == point(2)
    assert [run.name for run in search.declared_rows] == ["r01", "r02", "r03"]


@pytest.mark.parametrize("wrong", [{"distributions": {}}, {"distributions": {"optimizer": "{}"}}, {"params": 3}])
def test_a_damaged_point_costs_its_trial_and_a_note(tmp_path: Path, wrong: dict[str, object]) -> None:
    folder = write_study(tmp_path, trials=8)
    change(folder / "t0004", TRIAL, lambda record: record["spec"].update(wrong))
    search = read_search(folder)
    assert "t0004" not in search.trials
    (note,) = search.notes
    assert note.startswith("t0004: trial.json cannot be read")


def test_damaged_earlier_searches_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=8, known=3)
    assert len(read_search(folder).known) == 3
    content = folder.read(KNOWN)
    assert content
    folder.write(KNOWN, content.replace(b'"seed": 0', b'"seed": 1', 1))
    search = read_search(folder)
    assert search.known == ()
    assert search.notes[0].startswith("known.json cannot be read")
    assert "checksum" in search.notes[0]
    cut(folder, KNOWN)
    assert read_search(folder).notes[0].startswith("known.json cannot be read")
