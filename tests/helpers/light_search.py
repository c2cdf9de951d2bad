"""A sampled search without Ray and torch: training is arithmetic, so each trial's result is known to the last digit.

Everything that remembers is the real thing: folders, search state, searcher, study.
`python -m helpers.light_search JSON` runs a search in child processes that are killed at random moments, until one
completes; it prints how many were killed.
"""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from helpers.rows import plain_epoch, plain_row
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial, FrozenTrial
from optuna.trial import TrialState as OptunaState
from sqlalchemy import Pool, event

from tune_bisenet.config import SGD, AdamW, CrossEntropy, Expect, Objective, Param, Run, Sampler
from tune_bisenet.records import (
    Epoch,
    Status,
    TrialRecord,
    TrialSpec,
    TrialState,
    measure,
    read_saved_state,
    read_trial,
    write_trial,
)
from tune_bisenet.search.prepare import read_specs
from tune_bisenet.search.searcher import StudySearcher
from tune_bisenet.search.state import SearchState, complete_states, exclusive, restore
from tune_bisenet.spaces import DataFacts, Grid, RowOverrides, Sampled
from tune_bisenet.storage import Storage
from tune_bisenet.study.sampling import SampledRun, SearchSpace
from tune_bisenet.study.study import StudyDatabase, StudySetup, name_in_search, study_database

NUM_EPOCHS = 3
NUM_KILLS = 15
FACTS = DataFacts(num_train=8, num_val=3, suggested_image_size=(32, 64))
UNLUCKY = 1.1
"""An auxiliary weight above this makes no run: one draw in four."""


def row(name: str, lr: float, *, momentum: float = 0.9, expect: Expect | None = None) -> Run:
    optimizer = SGD(lr=lr, momentum=momentum, weight_decay=1e-4)
    return plain_row(name, optimizer=optimizer, warmup=1, num_epochs=NUM_EPOCHS, image_size=(32, 64), expect=expect)


ROWS = (row("a", 0.01), row("b", 0.02, expect=Expect(gain=(0, 5), over="a")))


def sample(trial: BaseTrial) -> Run:
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        drawn = row("drawn", lr, momentum=trial.suggest_float("momentum", 0.5, 0.99))
    else:
        drawn = row("drawn", lr).model_copy(update={"optimizer": AdamW(lr=lr, weight_decay=1e-4)})
    aux_weight = trial.suggest_float("aux_weight", 0.0, 1.5)
    if aux_weight > UNLUCKY:
        raise ValueError(f"an auxiliary weight of {aux_weight:g} is out of luck")
    accumulation = trial.suggest_categorical("accumulation", [1, 2, 4])
    return drawn.model_copy(update={"loss": CrossEntropy(aux_weight=aux_weight), "accumulation": accumulation})


def point(run: Run) -> dict[str, Param]:
    assert isinstance(run.optimizer, SGD)
    return {
        "lr": run.optimizer.lr,
        "optimizer": "sgd",
        "momentum": run.optimizer.momentum,
        "aux_weight": run.loss.aux_weight,
        "accumulation": run.accumulation,
    }


SPACE = Sampled("around two rows", sample, around=Grid("two rows", ROWS), point=point)


def search_space(
    space: Sampled = SPACE, *, objectives: tuple[Objective, ...] = ("miou",), **overrides: Any
) -> SearchSpace:
    return SearchSpace(
        name="light", space=space, settings=RowOverrides(**overrides), facts=FACTS, objectives=objectives
    )


def setup_of(
    space: Sampled = SPACE,
    *,
    sampler: Sampler = "tpe",
    seed: int = 0,
    objectives: tuple[Objective, ...] = ("miou",),
    database: StudyDatabase | None = None,
    **known: Any,
) -> StudySetup:
    scaled = search_space(space, objectives=objectives)
    seeded = [declared.model_copy(update={"seed": seed}) for declared in space.rows]
    return StudySetup(
        space=scaled,
        rows={run.name: replace(scaled.sample_row(run), run=run) for run in seeded},
        sampler=sampler,
        seed=seed,
        test_draws=(SampledRun(run=row("drawn", 0.01), params={}, distributions={}),),
        database=database or database_at("sqlite://"),
        **known,
    )


def database_at(url: str, folder: Storage | None = None, secret: str | None = None) -> StudyDatabase:
    nowhere = Path(tempfile.gettempdir())
    return study_database(folder or Storage.at(str(nowhere)), address=url, secret=secret, cache_dir=nowhere)


def miou_after(run: Run, epoch: int) -> float:
    """In percent: it peaks at a rate of 0.02, and half of what is missing comes with each epoch."""
    best = 60 - 8 * abs(math.log10(run.optimizer.lr / 0.02)) - run.loss.aux_weight - 0.1 * run.accumulation
    return best * (1 - 0.5**epoch)


def end_of(run: Run) -> tuple[int, Status]:
    """Return a run's last epoch and its status: large rates diverge, small ones are stopped."""
    if run.optimizer.lr > 0.06:
        return 2, "diverged"
    return (2, "stopped") if run.optimizer.lr < 0.003 else (run.num_epochs, "finished")


def curve_of(run: Run) -> list[Epoch]:
    """Return all epochs of a run."""
    last, status = end_of(run)
    return [
        plain_epoch(
            number,
            miou_after(run, number),
            iterations=2 * number,
            loss=math.nan if (status, number) == ("diverged", last) else 1 / number,
            loss_main=1 / number,
            lr=run.optimizer.lr,
            iou=(miou_after(run, number),) * 19,
        )
        for number in range(1, last + 1)
    ]


def ended(spec: TrialSpec) -> TrialState:
    """Return the state of the trial at its end."""
    return TrialState.of_run(spec.trial, spec.run, status=end_of(spec.run)[1], **measure(curve_of(spec.run)))


def record_of(spec: TrialSpec, epochs: int | None = None, *, source: str = "", **changes: Any) -> TrialRecord:
    """Return a trial as its folder has it: ended, or waiting after so many epochs."""
    state = ended(spec) if epochs is None else TrialState.of_run(spec.trial, spec.run)
    history = tuple(curve_of(spec.run)[:epochs])
    return TrialRecord(spec=spec, state=replace(state, **changes), epochs=history, source=source)


def earlier_trials(count: int) -> tuple[TrialRecord, ...]:
    """Return trials of another search, drawn at random: with eleven, the sampler knows what it is after."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    known: list[TrialRecord] = []
    while len(known) < count:
        trial = study.ask()
        try:
            run = search_space().sample_run(trial).model_copy(update={"name": f"e{trial.number}"})
        except ValueError:
            continue
        sampled = SampledRun(run=run, params=trial.params, distributions=trial.distributions)
        spec = sampled.spec(run.name, origin="sampled", number=trial.number)
        known.append(record_of(spec, source=f"/earlier/{spec.trial}"))
    return tuple(known)


def make_place() -> Iterator[Path]:
    """Yield a folder in memory where there is such: thousands of commits take no time there."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="tb-", dir=memory if memory.is_dir() else None))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def close_connections() -> Iterator[None]:
    """Close all connections to databases afterwards, as the end of a process does."""
    connections: list[Any] = []

    def keep(connection: Any, _record: Any) -> None:
        connections.append(connection)

    event.listen(Pool, "connect", keep)
    yield
    event.remove(Pool, "connect", keep)
    for connection in connections:
        connection.close()


@dataclass(kw_only=True)
class Search:
    """One search and how it is made. `run` is a session of it, which resumes whatever is there."""

    folder: Storage
    limit: int
    sampler: Sampler = "tpe"
    seed: int = 0
    at_once: int = 1
    known: tuple[TrialRecord, ...] = ()
    url: str | None = None
    secret: str | None = None
    between: Callable[[], None] = lambda: None
    """Called after each epoch."""
    clock: Callable[[], float] = time.monotonic
    """The clock of the search's state, by which it saves storage some writes."""

    @property
    def database(self) -> StudyDatabase:
        cache_dir = Path(self.folder.path) / "cache"
        return study_database(self.folder, address=self.url, secret=self.secret, cache_dir=cache_dir)

    def run(self) -> None:
        """Run a session as the driver does."""
        self.folder.make()
        with exclusive(self.folder):
            specs = read_specs(self.folder)
            state = self.state(specs)
            state.write()
            searcher = self.searcher(state, specs)
            if searcher.begin():
                self._train_all(state, searcher)
            state.close()
            searcher.close()

    def state(self, specs: Mapping[str, TrialSpec]) -> SearchState:
        """Return what the last session has left of it, or a new one."""
        earlier = complete_states(self.folder, read_saved_state(self.folder).states, specs)
        return SearchState(
            self.folder,
            [restore(name, spec.run, earlier) for name, spec in specs.items()],
            captions=[],
            baseline="a",
            scheduler_state=lambda: {"seen": [], "stops": {}},
            clock=self.clock,
        )

    def searcher(self, state: SearchState, specs: Mapping[str, TrialSpec]) -> StudySearcher:
        setup = setup_of(
            sampler=self.sampler, seed=self.seed, database=self.database, suggested=specs, known=self.known
        )
        return StudySearcher(
            setup,
            self.folder,
            state,
            name="light",
            limit=self.limit,
            max_running=lambda: self.at_once,
            attributes={},
        )

    def _train_all(self, state: SearchState, searcher: StudySearcher) -> None:
        """Train as many as are handed out at once, an epoch of each in turn."""
        running: dict[str, TrialSpec] = {}
        while True:
            while (spec := searcher.next()) is not None:
                running[spec.trial] = spec
                state.on_start(spec.trial)
            if searcher.exhausted and not running:
                return
            for name, spec in list(running.items()):
                if self._train_epoch(spec, state, searcher):
                    del running[name]

    def _train_epoch(self, spec: TrialSpec, state: SearchState, searcher: StudySearcher) -> bool:
        """Return whether it was the last one."""
        name, whole = spec.trial, curve_of(spec.run)
        history = epochs_in(self.folder / name)
        if state[name].epochs == len(history):  # else its last epoch was not reported before the driver died
            history = whole[: len(history) + 1]
            write_trial(self.folder, TrialRecord.of_spec(spec, history))
        state.on_result(name, measure(history))
        state.write_if_due()
        searcher.on_result(name, epoch=len(history), miou=history[-1].miou)
        self.between()
        if len(history) < len(whole):
            return False
        status = end_of(spec.run)[1]
        state.on_end(spec, diverged=status == "diverged", stopped_by="" if status == "finished" else status)
        searcher.on_end(state[name])
        return True


def epochs_in(folder: Storage) -> list[Epoch]:
    record = read_trial(folder)
    return list(record.epochs) if record else []


def trials_in(search: Search) -> list[FrozenTrial]:
    """Return the study's trials by number."""
    url = search.database.url.render_as_string(hide_password=False)
    storage = RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)
    return stored_trials("light", storage)


def stored_trials(study: str, storage: str | RDBStorage) -> list[FrozenTrial]:
    """Return a study's trials by number. Every NaN of their curves is one object, so that equal ones compare equal."""
    trials = optuna.load_study(study_name=study, storage=storage).trials
    for trial in trials:
        curve = trial.intermediate_values
        trial.intermediate_values = {epoch: math.nan if math.isnan(curve[epoch]) else curve[epoch] for epoch in curve}
    return trials


def results(trials: Sequence[FrozenTrial]) -> dict[str, tuple[Any, ...]]:
    """Return what each trial was, and what it came to."""
    return {
        name_in_search(trial): (trial.state.name, trial.number, trial.params, trial.values, trial.intermediate_values)
        for trial in trials
        if trial.state is not OptunaState.FAIL
    }


def assert_whole(search: Search, trials: Sequence[FrozenTrial]) -> None:
    """Assert that nothing is lost, doubled or left over, and that study, state and folders agree."""
    own = [trial for trial in trials if "source" not in trial.user_attrs and trial.state is not OptunaState.FAIL]
    names = [name_in_search(trial) for trial in own]
    assert len(trials) - len({trial.number for trial in trials}) == 0
    assert len(set(names)) == len(names) == search.limit
    assert [trial.user_attrs["source"] for trial in trials if "source" in trial.user_attrs] == [
        known.source for known in search.known
    ]
    states = {state.trial: state for state in read_saved_state(search.folder).states}
    specs = read_specs(search.folder)
    assert set(states) == set(specs) == set(names)
    for trial in own:
        spec, state = specs[name_in_search(trial)], states[name_in_search(trial)]
        whole = curve_of(spec.run)
        assert replace(state, stopped_by="") == ended(spec)
        assert trial.params == spec.params
        assert trial.intermediate_values == {epoch.epoch: epoch.miou for epoch in whole}
        assert [epoch.epoch for epoch in epochs_in(search.folder / spec.trial)] == [epoch.epoch for epoch in whole]
        finished = state.status == "finished"
        assert trial.state is (OptunaState.COMPLETE if finished else OptunaState.PRUNED)
        assert trial.value == (state.best_miou if finished else state.last_miou)
        assert trial.user_attrs["status"] == state.status


def assert_kills_change_nothing(
    search_of: Callable[[int], Search], *, undisturbed: Search | None = None, mean_seconds: float = 0.15
) -> None:
    """Run searches, each made from a seed, in processes that are killed at random moments, until NUM_KILLS were.

    Each must be whole at its end, with the results of `undisturbed` if there is such a search.
    """
    kills = 0
    for seed in itertools.count():
        search = search_of(seed)
        kept = ("limit", "sampler", "at_once", "url", "secret")
        arguments = {name: getattr(search, name) for name in kept} | {
            "place": search.folder.path,
            "num_known": len(search.known),
            "seed_of_kills": seed,
            "mean_seconds": mean_seconds,
        }
        command = [sys.executable, "-W", "error", "-m", "helpers.light_search", json.dumps(arguments)]
        ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr
        assert_whole(search, trials_in(search))
        if undisturbed:
            assert results(trials_in(search)) == results(trials_in(undisturbed))
        kills += int(ran.stdout)
        if kills >= NUM_KILLS:
            return


def main() -> None:
    """Run sessions that live `mean_seconds` on average until one completes; print how many were killed."""
    arguments = json.loads(sys.argv[1])
    folder, known = Storage.at(arguments.pop("place")), earlier_trials(arguments.pop("num_known"))
    rng = random.Random(arguments.pop("seed_of_kills"))
    mean_seconds = arguments.pop("mean_seconds")
    search = Search(folder=folder, known=known, **arguments)
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                search.run()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if kills < NUM_KILLS:
            time.sleep(rng.expovariate(1 / mean_seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "a session failed"
            break
        kills += 1
    print(kills)  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
