"""The manifest: what a search was made of, session by session."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from driving import write_frames, write_space

from tune_bisenet import options
from tune_bisenet.config import Resources, Run
from tune_bisenet.search import driver, prepare, state
from tune_bisenet.search.prepare import CACHE_VARIABLE, PreparedSearch
from tune_bisenet.storage import Storage

RESOURCES = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)
COMMAND = ["python", "-m", "tune_bisenet.run", "--epochs", "2"]


@pytest.fixture
def flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedSearch:
    """A search of two rows and two seeds on eleven small frames."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {"a": 0.01, "b": 0.02}, num_epochs=2, baseline="a")
    flags = {"space": str(tmp_path / "space.py"), "data": str(tmp_path / "frames"), "backbone": "none", "seeds": "3,4"}
    asked, mistyped = options.parse_options({**flags, "storage": str(tmp_path / "kept"), "name": "mine"})
    return prepare.prepare_search(asked, mistyped, default_name="default", progress=lambda _done, _total: None)


@pytest.fixture
def runs(flight: PreparedSearch) -> dict[str, Run]:
    return {f"{run.name}-s{run.seed}": run for run in flight.survey.runs}


def test_it_says_all_that_is_needed_to_repeat_a_search(flight: PreparedSearch, runs: dict[str, Run]) -> None:
    record = driver.open_manifest(flight, runs, command=COMMAND, resources=RESOURCES)
    assert record["name"] == "mine"
    assert record["space"]["baseline"] == "a"
    assert {name: Run.model_validate(run) for name, run in record["trials"].items()} == runs
    assert record["data"]["digests"] == {"32x64": next(iter(flight.packs.values())).digest}
    assert (record["data"]["train_images"], record["data"]["val_images"]) == (8, 3)
    (session,) = record["sessions"]
    assert session["command"] == COMMAND
    assert {"tune-bisenet", *driver.PACKAGES} == set(session["packages"])
    assert session["cpus_per_trial"] == 1
    assert session["commit"] is None or len(session["commit"].removesuffix("+changes")) == 40
    assert datetime.fromisoformat(session["started"]).utcoffset() is not None
    assert session["ended"] is None


def test_a_session_that_ends_says_when_and_by_which_signal(flight: PreparedSearch, runs: dict[str, Run]) -> None:
    record = driver.open_manifest(flight, runs, command=COMMAND, resources=RESOURCES)
    (session,) = driver.close_manifest(record, 15, "")["sessions"]
    assert session["signal"] == 15
    assert session["started"] <= session["ended"]
    assert driver.close_manifest(record, None, "")["sessions"][0]["signal"] is None
    assert record["sessions"][0]["ended"] is None, "the record that was given stays as it was"


def test_a_resumed_search_adds_a_session(flight: PreparedSearch, runs: dict[str, Run], tmp_path: Path) -> None:
    driver.write_manifest(
        flight.survey.folder, driver.open_manifest(flight, runs, command=COMMAND, resources=RESOURCES)
    )
    resume = {"storage": str(tmp_path / "kept"), "name": "mine", "resume": True}
    asked, mistyped = options.parse_options(resume)
    again = prepare.prepare_search(asked, mistyped, default_name="default", progress=lambda _done, _total: None)
    assert again.survey.runs == flight.survey.runs
    assert again.survey.choices == flight.survey.choices
    record = driver.open_manifest(again, runs, command=[*COMMAND, "--resume"], resources=RESOURCES)
    assert [session["command"][-1] for session in record["sessions"]] == ["2", "--resume"]


def test_it_is_written_whole_into_a_folder_made_for_it(tmp_path: Path) -> None:
    folder = Storage.at(str(tmp_path)) / "deep" / "search"
    driver.write_manifest(folder, {"name": "Löwe"})
    assert json.loads((tmp_path / "deep" / "search" / "search.json").read_text()) == {"name": "Löwe"}
    assert state.read_manifest(folder) == {"name": "Löwe"}
    assert [path.name for path in (tmp_path / "deep" / "search").iterdir()] == ["search.json"]
