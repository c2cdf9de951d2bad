"""What a new search takes over from an earlier one, and the runs that confirm its best with fresh seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.light_search import (
    ROWS,
    SPACE,
    Search,
    close_connections,
    curve_of,
    ended,
    make_place,
    record_of,
    row,
    sample,
    search_space,
    setup_of,
    trials_in,
)
from helpers.rows import plain_manifest
from optuna.trial import BaseTrial

from tune_bisenet.config import Run
from tune_bisenet.records import (
    ENDED_WELL,
    KNOWN,
    SEARCH,
    TRIAL,
    TRIALS,
    KnownTrials,
    Latency,
    Origin,
    SavedState,
    Status,
    StudyInfo,
    TrialSpec,
    TrialState,
    read_record,
    to_json,
    write_trial,
)
from tune_bisenet.report.read import read_search
from tune_bisenet.search.prepare import read_specs
from tune_bisenet.storage import Storage
from tune_bisenet.study.study import StudySetup
from tune_bisenet.study.warm_start import fresh_runs, warm_start

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)

MANIFEST = plain_manifest(space={"title": "Rows", "baseline": "a", "measured_share": 0.1})


def write_grid(place: Path, runs: Mapping[str, Run], *, states: Sequence[TrialState] = (), **changes: Any) -> Storage:
    """Write a grid search that has ended, but for trials with other `states`; `changes` are of its manifest."""
    folder = Storage.at(str(place / "earlier"))
    folder.make()
    folder.write(SEARCH, to_json(MANIFEST.model_copy(update={"trials": dict(runs)} | changes)))
    known = {name: ended(TrialSpec(trial=name, run=run)) for name, run in runs.items()}
    known |= {state.trial: state for state in states}
    for name, run in runs.items():
        record = record_of(TrialSpec(trial=name, run=run))
        if known[name].status not in ENDED_WELL:
            record = record_of(record.spec, epochs=known[name].epochs)
        elif ms := known[name].latency_ms:
            record = replace(record, latency=Latency(median_ms=ms, low_ms=ms, high_ms=ms, repeats=1, device="CPU"))
        write_trial(folder, record)
    folder.write(TRIALS, to_json(SavedState(states=tuple(known.values()))))
    return folder


def start(folder: Storage, setup: StudySetup | None = None) -> StudySetup:
    return warm_start(
        setup or setup_of(),
        read_search(folder),
        data_digests={"32x64": "feedbeef"},
        backbone_digest="none",
        precision="fp32",
    )


def error_of(folder: Storage) -> str:
    with pytest.raises(ValueError, match="--warm-start") as refused:
        start(folder)
    assert folder.uri in str(refused.value)
    return str(refused.value)


A, B = ROWS
SEEDS = {f"{run.name}-s{seed}": run.model_copy(update={"seed": seed}) for seed in (0, 1) for run in ROWS}


def test_the_rows_of_a_grid_are_points_of_the_space_whatever_their_seed(place: Path) -> None:
    folder = write_grid(place, SEEDS)
    setup = start(folder)
    assert not setup.left_out
    assert [known.spec.trial for known in setup.known] == list(SEEDS)
    for known in setup.known:
        run = SEEDS[known.spec.trial]
        assert (known.spec.run, known.spec.origin) == (run, "row")
        assert known.spec.params == setup.rows[run.name].params
        assert known.state == ended(TrialSpec(trial=known.spec.trial, run=run))
        assert [epoch.miou for epoch in known.epochs] == [epoch.miou for epoch in curve_of(run)]
        assert known.source == f"{folder.uri}/{known.spec.trial}"


def test_what_did_not_end_well_is_left_out_with_the_reason(place: Path) -> None:
    waiting = TrialState(trial="a-s0", run="a", seed=0, num_epochs=3)
    states = [
        waiting,
        replace(waiting, trial="b-s0", run="b", status="failed", error="no memory"),
        replace(waiting, trial="a-s1", seed=1, status="running", epochs=2),
    ]
    setup = start(write_grid(place, SEEDS, states=states))
    assert [known.spec.trial for known in setup.known] == ["b-s1"]
    for name, status in (("a-s0", "waiting"), ("b-s0", "failed"), ("a-s1", "running")):
        assert status in setup.left_out[name]


def test_a_trial_with_a_damaged_record_is_left_out(place: Path) -> None:
    folder = write_grid(place, {"a": A, "b": B})
    (folder / "a").write(TRIAL, b"[{")
    setup = start(folder)
    assert [known.spec.trial for known in setup.known] == ["b"]
    assert setup.left_out.keys() == {"a"}


def test_rows_that_were_trained_otherwise_are_left_out_and_nothing_else_is_an_error(place: Path) -> None:
    others = {"a": A.model_copy(update={"num_epochs": 50}), "r99": row("r99", 0.01)}
    setup = start(write_grid(place, others | {"b": B}))
    assert [known.spec.trial for known in setup.known] == ["b"]
    assert "num_epochs 50, here 3" in setup.left_out["a"]
    assert "no row" in setup.left_out["r99"]
    message = error_of(write_grid(place, others))
    assert all(reason in message for reason in ("num_epochs 50, here 3", "r99: "))


def test_a_search_on_other_means_is_refused_with_all_that_differs(place: Path) -> None:
    other_frames = MANIFEST.data.model_copy(update={"digests": {"32x64": "other"}})
    config = MANIFEST.config.model_copy(update={"precision": "bf16"})
    message = error_of(write_grid(place, SEEDS, data=other_frames, backbone_digest="5c106cde", config=config))
    assert all(word in message for word in ("frames", "backbone", "bf16", "fp32"))
    other_size = write_grid(place, SEEDS, data=MANIFEST.data.model_copy(update={"digests": {"96x192": "feedbeef"}}))
    assert all(size in error_of(other_size) for size in ("96x192", "32x64"))


def test_with_latency_as_an_objective_trials_without_it_are_left_out(place: Path) -> None:
    setup = setup_of(objectives=("miou", "latency"))
    states = [replace(ended(TrialSpec(trial="b", run=B)), latency_ms=12.5)]
    setup = start(write_grid(place, {"a": A, "b": B}, states=states), setup)
    assert [known.state.latency_ms for known in setup.known] == [12.5]
    assert setup.known[0].spec.params["head_width"] == 256
    assert "latency" in setup.left_out["a"]


def searched(place: Path, *, limit: int) -> Search:
    """Return a sampled search that has ended."""
    search = Search(folder=Storage.at(str(place / "earlier")), limit=limit, sampler="random")
    search.run()
    study = StudyInfo(name="light", url="sqlite:///study.db", sampler="random", objectives=("miou",))
    search.folder.write(SEARCH, to_json(MANIFEST.model_copy(update={"study": study})))
    return search


def test_trials_of_an_earlier_sampled_search_come_by_their_parameters_under_a_name_of_their_own(place: Path) -> None:
    search = searched(place, limit=14)
    setup = start(search.folder)
    suggested = read_specs(search.folder)
    assert not setup.left_out
    assert {known.source.rpartition("/")[2] for known in setup.known} == set(suggested)
    assert {known.state.status for known in setup.known} == {"finished", "stopped", "diverged"}
    for known in setup.known:
        earlier = suggested[known.source.rpartition("/")[2]]
        spec, state = known.spec, known.state
        assert spec.run.fingerprint() == earlier.run.fingerprint()
        assert (spec.params, spec.origin, spec.number) == (earlier.params, earlier.origin, None)
        name = earlier.trial if earlier.origin == "row" else f"earlier-{earlier.trial}"
        assert {spec.trial, spec.run.name, state.trial, state.run} == {name}
        assert replace(state, trial=earlier.trial, run=earlier.run.name, stopped_by="") == ended(earlier)
        assert [epoch.epoch for epoch in known.epochs] == list(range(1, state.epochs + 1))
        assert known.epochs[-1].diverged == (state.status == "diverged")


def test_a_search_begun_with_an_earlier_one_continues_from_there(place: Path) -> None:
    known = start(searched(place, limit=12).folder).known
    search = Search(folder=Storage.at(str(place / "next")), limit=3, known=known)
    search.run()
    written = read_record(KnownTrials, search.folder, KNOWN)
    assert written
    assert written.trials == known
    assert all(spec.origin == "sampled" for spec in read_specs(search.folder).values())
    assert len(trials_in(search)) >= 15


def test_parameters_that_this_space_was_not_written_for_are_left_out(place: Path) -> None:
    def sample_more(trial: BaseTrial) -> Run:
        trial.suggest_float("dropout", 0, 1)
        return sample(trial)

    search = searched(place, limit=4)
    space = search_space(replace(SPACE, sample=sample_more, around=None, point=None))
    setup = start(search.folder, replace(setup_of(), space=space))
    drawn = {name for name, spec in read_specs(search.folder).items() if spec.origin == "sampled"}
    assert setup.left_out.keys() == drawn


def test_fresh_seeds_of_a_row_are_known_and_those_of_a_sampled_run_are_left_out(place: Path) -> None:
    search = searched(place, limit=4)
    suggested = read_specs(search.folder)
    drawn = next(spec for spec in suggested.values() if spec.origin == "sampled")
    states = [ended(spec) for spec in suggested.values()]
    for earlier in (suggested["a"], drawn):
        run = earlier.run.model_copy(update={"seed": 1})
        fresh = TrialSpec(trial=f"{earlier.trial}-s1", run=run, origin="confirm")
        write_trial(search.folder, record_of(fresh))
        states.append(ended(fresh))
    search.folder.write(TRIALS, to_json(SavedState(states=tuple(states))))
    setup = start(search.folder)
    assert "a-s1" in {known.spec.trial for known in setup.known}
    assert setup.left_out.keys() == {f"{drawn.trial}-s1"}


Trial = tuple[TrialSpec, TrialState]


def trial(
    name: str, miou: float | None, *, origin: Origin = "sampled", status: Status = "finished", seed: int = 0
) -> Trial:
    run = row(name, 0.01).model_copy(update={"seed": seed})
    return TrialSpec(trial=name, run=run, origin=origin), TrialState.of_run(name, run, status=status, best_miou=miou)


def fresh(*trials: Trial, baseline: str | None = "r01", count: int = 1) -> list[tuple[str, int]]:
    rows = {name: row(name, 0.01) for name in ("r01", "r02")}
    return [(run.name, run.seed) for run in fresh_runs(trials, rows, baseline=baseline, count=count)]


R01, R02 = trial("r01", 50.0, origin="row"), trial("r02", 52.0, origin="row")
T02, T03 = trial("t02", 55.0), trial("t03", 54.0)


def test_the_best_sampled_run_the_baseline_and_the_best_row_get_the_same_fresh_seeds() -> None:
    names = ["t02", "r01", "r02"]
    assert fresh(R01, R02, T02, T03, count=2) == [(name, seed) for seed in (1, 2) for name in names]
    assert fresh(trial("r01", 53.0, origin="row"), R02, T02) == [("t02", 1), ("r01", 1)], "the best row is the baseline"
    assert fresh(T02, T03, baseline=None) == [("t02", 1)]


def test_a_seed_that_anything_was_chosen_by_is_not_fresh() -> None:
    assert fresh(trial("r01", 50.0, origin="row", seed=4), T02)[0] == ("t02", 5)


def test_only_trials_trained_to_their_end_with_seeds_of_the_search_are_candidates() -> None:
    others = [
        trial("t04", 70.0, status="stopped"),
        trial("t05", None, status="failed"),
        trial("t06", 70.0, status="diverged"),
        trial("t07", 60.0, origin="confirm", seed=7),
    ]
    assert fresh(R01, T03, *others) == [("t03", 1), ("r01", 1)]
    assert fresh(R01, R02, *others) == []
