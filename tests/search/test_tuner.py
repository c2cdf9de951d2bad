"""Real Tune searches: which trials stop early, what a second search takes over, how errors of trials are read."""

import faulthandler
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import pytest
import ray
from helpers.rows import plain_epoch, plain_row
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console

from tune_bisenet.config import Expect, Resources, Run
from tune_bisenet.options import Limits
from tune_bisenet.records import TrialSpec, measure, to_plain
from tune_bisenet.rungs import AshaRule, MedianRule, Stopper, StoppingRule, protected_rows
from tune_bisenet.search import tuner
from tune_bisenet.search.console import SearchProgress
from tune_bisenet.search.failures import FAILURE, LACKS, STACK_SIGNAL, WARNING
from tune_bisenet.search.searcher import GridSearcher
from tune_bisenet.search.state import SearchState, SessionOutcome
from tune_bisenet.search.tuner import StoppingScheduler, TuneCallback
from tune_bisenet.storage import Storage, StorageRefusedError

NUM_EPOCHS = 6  # one rung, after epoch 3
ASHA = AshaRule(min_peers=1)


def hundred(_run: Run) -> int:
    """Return the iterations of an epoch."""
    return 100


def scheduler_of(rule: StoppingRule | None = ASHA, **fields: Any) -> StoppingScheduler:
    return StoppingScheduler(Stopper(rule=rule, iterations_per_epoch=hundred, **fields))


def row(name: str, expect: Expect | None = None) -> Run:
    return plain_row(name, warmup=100, expect=expect, num_epochs=NUM_EPOCHS)


def config_of(run: Run) -> dict[str, Any]:
    return to_plain(TrialSpec(trial=run.name, run=run))


class Curve(TypedDict, total=False):
    miou: float
    """The same after every epoch."""
    first_epoch: int
    """1 unless the trial resumes."""
    nan_from: int
    """The epoch from which on the loss is NaN."""


def reporter(curves: dict[str, Curve]) -> Callable[[dict[str, Any]], None]:
    """Return a trainable; a closure, because workers can't import this file."""

    def report(config: dict[str, Any]) -> None:
        curve = curves[config["trial"]]
        for epoch in range(curve.get("first_epoch", 1), NUM_EPOCHS + 1):
            diverged = epoch >= curve.get("nan_from", NUM_EPOCHS + 1)
            tune.report({"epoch": epoch, "miou": curve["miou"], "diverged": diverged})

    return report


def name_of(trial: Trial) -> str:
    return str(trial.config["trial"])


def last_epochs(
    scheduler: StoppingScheduler, runs: list[Run], curves: dict[str, Curve], storage: Path, **tune_config: Any
) -> dict[str, int]:
    """Run one trial after the other in this order; return the last epoch that each reported, 0 for none."""
    specs = {run.name: config_of(run) for run in runs}
    tuner = tune.Tuner(
        reporter(curves),
        param_space={
            "trial": tune.grid_search(list(specs)),
            "run": tune.sample_from(lambda config: specs[config["trial"]]["run"]),
        },
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=1,
            reuse_actors=True,
            trial_name_creator=name_of,
            trial_dirname_creator=name_of,
            **tune_config,
        ),
        run_config=tune.RunConfig(storage_path=str(storage), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    ended = [results[index] for index in range(len(results))]
    return {result.config["trial"]: (result.metrics or {}).get("epoch", 0) for result in ended if result.config}


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def in_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs in the Ray of this module."""
    return pytest.mark.ray(pytest.mark.slow(pytest.mark.usefixtures("one_ray")(test)))


@in_ray
def test_bad_rows_stop_at_the_rung_diverged_ones_at_once_and_the_baseline_completes(tmp_path: Path) -> None:
    runs = [row("r02"), row("r01"), row("r03"), row("r04", Expect(gain=(0.5, 0.5), over="r01")), row("r05")]
    curves: dict[str, Curve] = {
        "r02": {"miou": 50.0},
        "r01": {"miou": 10.0},
        "r03": {"miou": 20.0},
        "r04": {"miou": 60.0, "nan_from": 2},
        "r05": {"miou": 40.0},
    }
    scheduler = scheduler_of(protected=protected_rows(runs))
    ended = last_epochs(scheduler, runs, curves, tmp_path)
    assert ended == {"r02": 6, "r01": 6, "r03": 3, "r04": 2, "r05": 6}
    assert scheduler.stopper.stops.keys() == {"r03", "r04"}
    for number in ("20.00", "epoch 3", "30.00", "2 others"):
        assert number in scheduler.stopper.stops["r03"]


@in_ray
def test_a_second_search_judges_by_what_the_first_has_seen(tmp_path: Path) -> None:
    first = scheduler_of()
    curves: dict[str, Curve] = {"r01": {"miou": 50.0}, "r02": {"miou": 40.0}}
    assert last_epochs(first, [row("r01"), row("r02")], curves, tmp_path) == {"r01": 6, "r02": 3}

    saved = json.loads(json.dumps(first.stopper.to_json()))
    second = StoppingScheduler(scheduler_of().stopper.restored(saved))
    runs = [row("r01"), row("r02"), row("r03"), row("r04"), row("r05")]
    curves = {
        "r01": {"miou": 30.0, "first_epoch": 3},  # repeats the rung, where it went on
        "r02": {"miou": 90.0, "first_epoch": 4},  # was stopped, but the driver died before it noted so
        "r03": {"miou": 99.0, "first_epoch": 4},  # resumes beyond the rung: not to be recorded there
        "r04": {"miou": 44.0},  # below 45, the median of 50 and 40
        "r05": {"miou": 45.0},  # above 44, the median of 50, 40 and 44
    }
    assert last_epochs(second, runs, curves, tmp_path) == {"r01": 6, "r02": 4, "r03": 6, "r04": 3, "r05": 6}
    assert second.stopper.seen == {6: {"r01": {3: 50.0}, "r02": {3: 40.0}, "r04": {3: 44.0}, "r05": {3: 45.0}}}
    assert second.stopper.stops["r02"] == first.stopper.stops["r02"]


@in_ray
def test_a_trial_that_resumes_at_its_end_and_reports_nothing_harms_no_other(tmp_path: Path) -> None:
    curves: dict[str, Curve] = {"r01": {"first_epoch": NUM_EPOCHS + 1}, "r02": {"miou": 40.0}}
    scheduler = scheduler_of()
    assert last_epochs(scheduler, [row("r01"), row("r02")], curves, tmp_path) == {"r01": 0, "r02": 6}
    assert scheduler.stopper.seen == {6: {"r02": {3: 40.0}}}


@in_ray
@pytest.mark.parametrize(("rule", "last_of_r02"), [(None, 6), (MedianRule(min_peers=1), 3)], ids=str)
def test_every_rule_and_none_stop_what_they_should_and_diverged_trials(
    tmp_path: Path, rule: StoppingRule | None, last_of_r02: int
) -> None:
    curves: dict[str, Curve] = {"r01": {"miou": 50.0}, "r02": {"miou": 40.0}, "r03": {"miou": 60.0, "nan_from": 4}}
    runs = [row("r01"), row("r02"), row("r03")]
    ended = last_epochs(scheduler_of(rule), runs, curves, tmp_path, metric="miou", mode="max")
    assert ended == {"r01": 6, "r02": last_of_r02, "r03": 4}


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


class Intruder(Callback):
    """Replaces the pickled errors in storage, at the last moment before Tune reads them."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace
        self.replaced: set[str] = set()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for trial in trials:
            assert trial.storage is not None
            (Path(trial.storage.trial_fs_path) / "error.pkl").write_bytes(pickle.dumps(Exploit(self.trace)))
            self.replaced.add(name_of(trial))


def callback_of(names: Sequence[str], folder: Path, **fields: Any) -> tuple[SearchState, TuneCallback]:
    """Return the callback of a search of these trials, two at once, and the search's state."""
    specs = {name: TrialSpec(trial=name, run=row(name)) for name in names}
    state = SearchState(Storage.at(str(folder)), [], captions=[], baseline=None, scheduler_state=dict)
    callback = TuneCallback(
        state,
        Stopper(rule=None, iterations_per_epoch=hundred),
        SearchProgress(Console(quiet=True)),
        GridSearcher(specs, state, share=True),
        Limits(),
        **{"resources": resources(), "outcome": SessionOutcome()} | fields,
    )
    return state, callback


def resources(**fields: Any) -> Resources:
    defaults = {"cpus_per_trial": 1, "gpus_per_trial": 0.0, "max_concurrent": None, "concurrency": 2}
    return Resources.model_validate(defaults | fields)


def run_with(
    trainable: Callable[[dict[str, Any]], None], names: Sequence[str], callbacks: list[Callback], folder: Path
) -> None:
    """Run trials of these names under Tune, each of which has two tries."""
    tuner = tune.Tuner(
        trainable,
        param_space={
            "trial": tune.grid_search(list(names)),
            "run": tune.sample_from(lambda config: config_of(row(config["trial"]))["run"]),
        },
        tune_config=tune.TuneConfig(
            scheduler=scheduler_of(None), trial_name_creator=name_of, trial_dirname_creator=name_of
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / "tune"),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    tuner.fit()


@in_ray
def test_errors_of_trials_are_read_as_text_and_no_pickle_in_storage_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(config: dict[str, Any]) -> None:
        if config["trial"] == "dies":
            os._exit(1)
        raise ValueError("out of luck")

    state, callback = callback_of(["raises", "dies"], tmp_path)
    intruder = Intruder(tmp_path / "the code ran")
    run_with(fail, ["raises", "dies"], [callback, intruder], tmp_path)
    assert intruder.replaced == {"raises", "dies"}
    assert not intruder.trace.exists()
    assert {trial.trial: trial.status for trial in state.states} == {"raises": "failed", "dies": "failed"}
    assert state["raises"].error == "ValueError: out of luck"
    assert "process" in state["dies"].error.lower() or "worker" in state["dies"].error.lower()
    assert "raises failed and is tried again from its last epoch:\nray::" in caplog.text
    assert "dies lost its process (" in caplog.text
    assert "\x1b" not in caplog.text


@in_ray
def test_a_trial_that_blocks_is_found_with_its_stack_and_tried_again_and_one_that_does_not_answer_is_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "SECONDS_BETWEEN_LOOKS", 0.5)
    epoch = asdict(plain_epoch(1, 10.0)) | {"diverged": False} | measure([plain_epoch(1, 10.0)], latency_ms=None)

    def run_trial(config: dict[str, Any]) -> None:
        faulthandler.register(STACK_SIGNAL)
        first = tmp_path / config["trial"]
        if not first.exists():
            first.touch()
            if config["trial"] == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        tune.report(epoch)

    state, callback = callback_of(["blocked", "stopped"], tmp_path, stall_timeout=20.0)
    run_with(run_trial, ["blocked", "stopped"], [callback], tmp_path)
    assert [trial.epochs for trial in state.states] == [1, 1], "each had a second try"
    (blocked,) = (record.getMessage() for record in caplog.records if "blocked has stalled" in record.getMessage())
    assert "did not answer" not in blocked
    assert "test_tuner.py" in blocked
    assert "in run_trial" in blocked
    (stopped,) = (record.getMessage() for record in caplog.records if "stopped has stalled" in record.getMessage())
    assert "its process did not answer" in stopped


@in_ray
def test_a_trial_that_says_that_nothing_mends_its_error_has_one_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(config: dict[str, Any]) -> None:
        with (tmp_path / "tries").open("a") as file:
            file.write(config["trial"])
        tune.report({FAILURE: "the checkpoint is of another run.\nDelete it."})

    state, callback = callback_of(["r01"], tmp_path)
    run_with(refuse, ["r01"], [callback], tmp_path)
    assert (tmp_path / "tries").read_text() == "r01"
    assert (state["r01"].status, state["r01"].error) == ("failed", "the checkpoint is of another run. Delete it.")
    assert "r01 failed:\nthe checkpoint" in caplog.text


def test_storage_that_denies_access_ends_the_search_and_no_trial_has_failed(tmp_path: Path) -> None:
    state, callback = callback_of(["r01"], tmp_path)
    ended = pytest.raises(StorageRefusedError, match=r"^s3://x: AWS Error ACCESS_DENIED\. Allow it\.$")
    with ended, tuner._restartable(SessionOutcome()):
        callback._on_failure("r01", "s3://x: AWS Error ACCESS_DENIED. Allow it.", lacks="access")
    assert state["r01"].status == "waiting"


# --- memory -----------------------------------------------------------------------------------------------------------

KILLED = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 4a25) was "
    "11.45GB used / 23.54GB limit (0.486488) OOM kill reason: Memory usage 12175695872B exceeded threshold"
)
"""The beginning of what Ray 2.60 says."""


@pytest.mark.parametrize(("concurrency", "fewer"), [(2, [1]), (5, [4, 3, 2, 1]), (16, [12, 9, 7, 6])])
def test_where_memory_runs_out_fewer_trials_run_at_once_and_none_has_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, concurrency: int, fewer: list[int]
) -> None:
    names = [f"r{number}" for number in range(20)]
    state, callback = callback_of(names, tmp_path, resources=resources(concurrency=concurrency))
    for number in fewer:
        callback.is_to_restart = False
        for _ in range(2):  # Ray kills several at once: they count as one
            callback.on_killed_for_memory(KILLED)
        assert (callback.outcome.max_concurrent, callback.is_to_restart) == (number, True)
    assert "ended the process: 11.45GB of 23.54GB were in use on 127.0.0.1. Those" in caplog.text
    assert {trial.status for trial in state.states} == {"waiting"}


def test_the_last_trial_is_alone_however_many_could_run(tmp_path: Path) -> None:
    state, callback = callback_of(["r01", "r02"], tmp_path, resources=resources(concurrency=8))
    state.on_error("r02", "for another reason")
    trial_result(callback, "r01", {FAILURE: "you tried to allocate 9 TB", LACKS: "memory"})
    assert state["r01"].error.startswith("out of memory: you tried to allocate 9 TB No other trial")
    assert callback.outcome.max_concurrent is None


def test_trials_that_a_gpu_has_no_room_for_get_the_next_larger_share_of_it(tmp_path: Path) -> None:
    state, callback = callback_of(["r01", "r02"], tmp_path, resources=resources(gpus_per_trial=0.25))
    for share in (1 / 3, 0.5, 1.0):
        callback.is_to_restart = False
        for name in ("r01", "r02"):  # several at once: they count as one
            trial_result(callback, name, NO_GPU_MEMORY)
        assert callback.is_to_restart
        assert callback.gpus_per_trial == callback.outcome.gpus_per_trial == pytest.approx(share)
        assert callback.outcome.max_concurrent is None, "each has the memory of its share, whatever runs beside it"
    callback.is_to_restart = False
    trial_result(callback, "r01", NO_GPU_MEMORY)
    assert (state["r01"].status, callback.is_to_restart) == ("failed", False)
    assert state["r01"].error.startswith("out of memory: CUDA out of memory. No other trial")


@pytest.mark.parametrize("gpus", [0.6, 0.9])
def test_after_more_than_half_a_gpu_comes_a_whole_one(tmp_path: Path, gpus: float) -> None:
    _state, callback = callback_of(["r01"], tmp_path, resources=resources(gpus_per_trial=gpus))
    trial_result(callback, "r01", NO_GPU_MEMORY)
    assert callback.gpus_per_trial == 1


NO_GPU_MEMORY = {FAILURE: "CUDA out of memory.", LACKS: "GPU memory"}


def trial_result(callback: TuneCallback, name: str, result: dict[str, Any]) -> None:
    trial = Trial("stub", config=config_of(row(name)), trial_name_creator=name_of, stub=True)
    callback.on_trial_result(0, [trial], trial, result)


def test_what_a_trial_warns_of_is_logged_and_kept_for_the_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = SessionOutcome()
    _state, callback = callback_of(["r01"], tmp_path, outcome=outcome)
    callback._workers["r01"] = tuner._Worker(None, None, heard_at=0.0)
    epoch = plain_epoch(1, 10.0)
    result = asdict(epoch) | {"diverged": False} | measure([epoch], latency_ms=None)
    trial_result(callback, "r01", result | {WARNING: "Its frames were packed again."})
    assert outcome.warnings == ["r01: Its frames were packed again."]
    assert outcome.warnings[0] in caplog.text


# --- without a cluster ------------------------------------------------------------------------------------------------


def test_a_result_without_its_keys_breaks_an_invariant() -> None:
    trial = Trial("stub", config=config_of(row("r01")), trial_name_creator=name_of, stub=True)
    with pytest.raises(AssertionError, match="r01 reported no diverged, miou"):
        scheduler_of().on_trial_result(None, trial, {"epoch": 3, "done": False})


@pytest.mark.parametrize(
    ("metric", "mode", "accepted"),
    [(None, None, True), ("miou", "max", True), ("loss", "max", False), ("miou", "min", False)],
)
def test_tune_may_name_the_same_metric_and_mode_but_no_other(
    metric: str | None, mode: str | None, accepted: bool
) -> None:
    assert scheduler_of().set_search_properties(metric, mode, anything="else") is accepted


def test_a_scheduler_can_be_pickled_as_tune_does_when_it_starts() -> None:
    scheduler = scheduler_of(stops={"r03": "slow"})
    copied = pickle.loads(pickle.dumps(scheduler))
    assert copied.stopper.to_json() == scheduler.stopper.to_json()
    assert copied.debug_string() == "stopped early: 1"
