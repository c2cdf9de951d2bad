"""What a new search takes over from an earlier one on storage: only what was trained as it would be trained here."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from light_search import Search, close_connections, make_place, trials_in
from light_space import FACTS, ROWS, SPACE, curve_of, ended, question, row, sample
from optuna.trial import BaseTrial
from optuna.trial import TrialState as OptunaState

from tune_bisenet.config import Run
from tune_bisenet.records import EPOCHS, RUN, SEARCH, TRIALS, Known, TrialSpec, TrialState
from tune_bisenet.report.read import read_search
from tune_bisenet.search.prepare import read_suggested
from tune_bisenet.spaces import RowOverrides
from tune_bisenet.storage import Storage
from tune_bisenet.study import sampling, warm
from tune_bisenet.study.study import Study, open_storage
from tune_bisenet.study.translation import name_of

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)

HERE = warm.Here(
    draw=question().draw,
    rows=question().rows,
    data_digests={"32x64": "feedbeef"},
    backbone_digest="none",
    precision="fp32",
    objectives=("miou",),
)

SESSION = {
    "started": "2026-03-01T10:00:00+00:00",
    "ended": None,
    "signal": None,
    "command": [],
    "commit": None,
    "python": "3.11",
    "packages": {},
    "cpus_per_trial": 1,
    "gpus_per_trial": 0,
    "trials_at_once": 1,
}

STUDY = {"name": "light", "url": "sqlite:///study.db", "sampler": "tpe", "objectives": ["miou"]}


def manifest(runs: Mapping[str, Run], **changes: Any) -> dict[str, Any]:
    return {
        "name": "earlier",
        "choices": {"space": "rows", "scheduler": "asha", "precision": "fp32"},
        "space": {"name": "rows", "title": "Rows", "baseline": "a"},
        "trials": {name: run.model_dump(mode="json") for name, run in runs.items()},
        "data": {"name": "streets", "digests": {"32x64": "feedbeef"}, "train_images": 8, "val_images": 3},
        "backbone": {"name": "none", "digest": "none"},
        "proxy": None,
        "sessions": [SESSION],
    } | changes


def write_json(folder: Storage, name: str, value: object) -> None:
    folder.make()
    folder.write(name, json.dumps(value).encode())


def standing_of(trial: str, run: Run) -> TrialState:
    one = TrialSpec(trial=trial, run=run, origin="row", number=None, params={}, distributions={})
    return ended(one)


def write_grid(
    place: Path, runs: Mapping[str, Run], *, standings: Mapping[str, TrialState] | None = None, **changes: Any
) -> Storage:
    """A grid search that has ended; `changes` are of its manifest."""
    folder = Storage.at(str(place / "earlier"))
    write_json(folder, SEARCH, manifest(runs, **changes))
    known = {name: standing_of(name, run) for name, run in runs.items()} | dict(standings or {})
    write_json(folder, TRIALS, {"standings": [one.to_json() for one in known.values()], "scheduler": {}})
    for name, run in runs.items():
        write_json(folder / name, EPOCHS, [epoch.to_json() for epoch in curve_of(run)[: known[name].epochs]])
    return folder


def taken(folder: Storage, here: warm.Here = HERE) -> warm.Taken:
    return warm.take_over(read_search(folder), here)


def refused(folder: Storage, here: warm.Here = HERE) -> str:
    with pytest.raises(ValueError, match="--warm-start") as said:
        taken(folder, here)
    assert folder.uri in str(said.value)
    return str(said.value)


A, B = ROWS
SEEDS = {f"{run.name}-s{seed}": run.model_copy(update={"seed": seed}) for seed in (0, 1) for run in ROWS}


# --- a grid ---------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_grid_are_points_of_the_space_whatever_their_seed(place: Path) -> None:
    folder = write_grid(place, SEEDS)
    found = taken(folder)
    assert not found.left_out
    assert [one.suggested.trial for one in found.known] == list(SEEDS)
    for one in found.known:
        run = SEEDS[one.suggested.trial]
        assert one.suggested.run == run
        assert one.suggested.origin == "row"
        assert one.suggested.params == HERE.rows[run.name][1].params
        assert one.standing == standing_of(one.suggested.trial, run)
        assert [epoch.miou for epoch in one.epochs] == [epoch.miou for epoch in curve_of(run)]
        assert one.source == f"{folder.uri}/{one.suggested.trial}"


def test_what_was_taken_over_is_in_the_study_and_survives_json(place: Path) -> None:
    known = taken(write_grid(place, SEEDS)).known
    again = [Known.from_json(json.loads(json.dumps(one.to_json()))) for one in known]
    assert again == list(known)
    url = f"sqlite:///{place / 'study.db'}"
    study = Study(open_storage(url), "light", question(), limit=3, checkpoint_of=lambda trial: trial)
    study.reconcile([], again)
    trials = trials_in(Search(folder=Storage.at(str(place)), limit=0, url=url))
    assert [(name_of(trial), trial.state) for trial in trials] == [(name, OptunaState.COMPLETE) for name in SEEDS]
    first = study.next()
    assert first is not None
    assert first.origin == "sampled", "its rows are known already"


@pytest.mark.parametrize(("lr", "status"), [(0.002, "stopped"), (0.09, "diverged")])
def test_what_ended_early_comes_with_its_curve(place: Path, lr: float, status: str) -> None:
    early = row("a", lr)
    point = sampling.point_at(dict(HERE.rows["a"][1].params) | {"lr": lr}, HERE.draw)
    here = replace(HERE, rows={"a": (early, point)})
    (one,) = taken(write_grid(place, {"a": early}), here).known
    assert one.standing.status == status
    assert [epoch.epoch for epoch in one.epochs] == [1, 2]
    assert one.epochs[-1].diverged == (status == "diverged")
    assert math.isnan(one.epochs[-1].loss) == (status == "diverged")


def test_what_did_not_end_well_is_left_out_with_the_reason(place: Path) -> None:
    waiting = TrialState(trial="a-s0", run="a", seed=0, num_epochs=3)
    standings = {
        "a-s0": waiting,
        "b-s0": replace(waiting, trial="b-s0", run="b", status="failed", error="no memory"),
        "a-s1": replace(waiting, trial="a-s1", seed=1, status="running", epochs=2),
    }
    found = taken(write_grid(place, SEEDS, standings=standings))
    assert [one.suggested.trial for one in found.known] == ["b-s1"]
    assert found.left_out == {
        "a-s0": "it has not ended well (waiting)",
        "b-s0": "it has not ended well (failed)",
        "a-s1": "it has not ended well (running)",
    }


def test_a_damaged_curve_is_left_out(place: Path) -> None:
    folder = write_grid(place, {"a": A, "b": B})
    (folder / "a").write(EPOCHS, b"[{")
    found = taken(folder)
    assert [one.suggested.trial for one in found.known] == ["b"]
    assert "a" in found.left_out


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"num_epochs": 50}, "num_epochs 50, here 3"),
    "batches": ({"batch_size": 2}, "batch_size 2, here 4"),
    "a row of the same name": ({"accumulation": 4}, "accumulation 4, here 1"),
    "a head of another width": ({"head_width": 64}, "head_width 64, here 256"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_row_that_was_trained_otherwise_is_left_out_with_what_differs(place: Path, difference: str) -> None:
    changes, words = DIFFERENCES[difference]
    found = taken(write_grid(place, {"a": A.model_copy(update=changes), "b": B}))
    assert [one.suggested.trial for one in found.known] == ["b"]
    assert found.left_out == {"a": f"it was trained otherwise ({words})"}


def test_a_row_that_this_space_does_not_have_is_left_out(place: Path) -> None:
    found = taken(write_grid(place, {"a": A, "r99": row("r99", 0.01)}))
    assert found.left_out == {"r99": "it is no row of this space"}


def test_where_nothing_can_be_used_the_search_is_refused_with_reasons(place: Path) -> None:
    folder = write_grid(place, {"a": A.model_copy(update={"num_epochs": 50}), "r99": row("r99", 0.01)})
    said = refused(folder)
    assert "none of its trials can be used here" in said
    assert "a: it was trained otherwise (num_epochs 50, here 3)." in said
    assert "r99: it is no row of this space." in said


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frames": (
        {"data": {"name": "/cityscapes", "digests": {"32x64": "other"}, "train_images": 8, "val_images": 3}},
        "its frames (/cityscapes) are not those of this search.",
    ),
    "size": (
        {"data": {"name": "streets", "digests": {"96x192": "feedbeef"}, "train_images": 8, "val_images": 3}},
        "its images were 96x192 and are 32x64 here.",
    ),
    "backbone": (
        {"backbone": {"name": "imagenet", "digest": "5c106cde"}},
        "its backbone (imagenet) is not that of this search.",
    ),
    "precision": (
        {"choices": {"scheduler": "asha", "precision": "bf16"}},
        "its precision was bf16 and is fp32 here.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_search_with_other_means_is_refused_as_a_whole(place: Path, what: str) -> None:
    changes, words = REFUSED[what]
    assert words in refused(write_grid(place, SEEDS, **changes))


def test_all_that_differs_is_said_at_once(place: Path) -> None:
    both = REFUSED["backbone"][0] | REFUSED["precision"][0]
    said = refused(write_grid(place, SEEDS, **both))
    assert REFUSED["backbone"][1] in said
    assert REFUSED["precision"][1] in said


def test_where_latency_is_a_goal_trials_without_it_are_left_out(place: Path) -> None:
    objectives = ("miou", "latency")
    draw = sampling.draw_with(SPACE, RowOverrides(), FACTS, objectives)
    rows = {run.name: (run, sampling.point_of(run, SPACE, draw, objectives)) for run in ROWS}
    here = replace(HERE, draw=draw, rows=rows, objectives=objectives)
    standings = {"b": replace(standing_of("b", B), latency_ms=12.5)}
    found = taken(write_grid(place, {"a": A, "b": B}, standings=standings), here)
    assert [one.standing.latency_ms for one in found.known] == [12.5]
    assert found.known[0].suggested.params["head_width"] == 256
    assert found.left_out == {"a": "its latency was not measured"}


# --- a sampled search -----------------------------------------------------------------------------------------------


def searched(place: Path, *, limit: int) -> Search:
    """A sampled search that has come to its end."""
    search = Search(folder=Storage.at(str(place / "earlier")), limit=limit, sampler="random")
    search.run()
    runs = {name: one.run for name, one in read_suggested(search.folder).items()}
    write_json(search.folder, SEARCH, manifest(runs, study=STUDY))
    return search


def test_trials_of_an_earlier_sampled_search_come_by_their_values(place: Path) -> None:
    search = searched(place, limit=8)
    found = taken(search.folder)
    suggested = read_suggested(search.folder)
    assert not found.left_out
    assert {one.source.rpartition("/")[2] for one in found.known} == set(suggested)
    assert {one.standing.status for one in found.known} > {"finished"}
    for one in found.known:
        earlier = suggested[one.source.rpartition("/")[2]]
        assert one.suggested.run.fingerprint() == earlier.run.fingerprint()
        assert one.suggested.params == earlier.params
        assert (one.suggested.origin, one.suggested.number) == (earlier.origin, None)
        standing = replace(one.standing, trial=earlier.trial, run=earlier.run.name, stopped_by="")
        assert standing == ended(earlier)


def test_what_an_earlier_search_sampled_has_a_name_that_no_trial_here_will_have(place: Path) -> None:
    known = taken(searched(place, limit=4).folder).known
    names = [(one.suggested.trial, one.suggested.run.name, one.standing.trial, one.standing.run) for one in known]
    assert names[:2] == [("a",) * 4, ("b",) * 4]
    assert all(set(four) == {f"earlier-t{number:04d}"} for number, four in enumerate(names[2:], start=2))


def test_a_search_begun_with_an_earlier_one_goes_on_from_there(place: Path) -> None:
    known = taken(searched(place, limit=12).folder).known
    search = Search(folder=Storage.at(str(place / "next")), limit=3, known=known)
    search.run()
    assert all(one.origin == "sampled" for one in read_suggested(search.folder).values())
    assert len(trials_in(search)) >= 15


def test_values_that_this_space_was_not_written_for_are_left_out(place: Path) -> None:
    def narrower(trial: BaseTrial) -> Run:
        trial.suggest_float("dropout", 0, 1)
        return sample(trial)

    search = searched(place, limit=4)
    space = replace(SPACE, sample=narrower, around=None, point=None)
    draw = sampling.draw_with(space, RowOverrides(), FACTS, ("miou",))
    found = taken(search.folder, replace(HERE, draw=draw))
    drawn = {name for name, one in read_suggested(search.folder).items() if one.origin == "sampled"}
    assert found.left_out.keys() == drawn
    assert all(reason.startswith("it is no point of this space: ") for reason in found.left_out.values())


def test_fresh_seeds_of_a_row_are_known_and_those_of_a_drawn_run_are_left_out(place: Path) -> None:
    search = searched(place, limit=4)
    suggested = read_suggested(search.folder)
    drawn = next(one for one in suggested.values() if one.origin == "sampled")
    fresh = {f"{one.run.name}-s1": one.run.model_copy(update={"seed": 1}) for one in (suggested["a"], drawn)}
    standings: Sequence[TrialState] = [ended(one) for one in suggested.values()]
    for name, run in fresh.items():
        one = TrialSpec(trial=name, run=run, origin="confirm", number=None, params={}, distributions={})
        write_json(search.folder / name, RUN, one.to_json())
        write_json(search.folder / name, EPOCHS, [epoch.to_json() for epoch in curve_of(run)])
        standings = [*standings, ended(one)]
    write_json(search.folder, TRIALS, {"standings": [one.to_json() for one in standings], "scheduler": {}})
    found = taken(search.folder)
    assert "a-s1" in {one.suggested.trial for one in found.known}
    assert found.left_out == {f"{drawn.trial}-s1": "it is no row of this space"}
