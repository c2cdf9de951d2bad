"""A sampled search without Ray and torch: its trials reach what arithmetic says. For the tests that kill it.

Everything that remembers is the real thing: folders, ledger, supply, study. `python light_search.py JSON` runs a
search in child processes that are killed at random moments, until one comes to its end; it prints how many were killed.
"""

import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from light_space import NUM_EPOCHS, curve_of, earlier_trials, end_of, ended, question
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from sqlalchemy import Pool, event

from tune_bisenet import records
from tune_bisenet.config import Run, Sampler
from tune_bisenet.records import EPOCHS, Epoch, Known, TrialSpec, best_of
from tune_bisenet.search import state
from tune_bisenet.search.prepare import read_suggested
from tune_bisenet.search.searcher import Asked, read_epochs
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage
from tune_bisenet.study.place import StudyPlace, study_place
from tune_bisenet.study.study import Study
from tune_bisenet.study.translation import name_of

# --- a place --------------------------------------------------------------------------------------------------------


def make_place() -> Iterator[Path]:
    """A folder in memory where there is such, removed afterwards: thousands of commits take no time there."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="tb-", dir=memory if memory.is_dir() else None))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def close_connections() -> Iterator[None]:
    """Whatever is connected to a database in the meantime is closed afterwards, as the end of a process does."""
    connections: list[Any] = []

    def keep(connection: Any, _record: Any) -> None:
        connections.append(connection)

    event.listen(Pool, "connect", keep)
    yield
    event.remove(Pool, "connect", keep)
    for connection in connections:
        connection.close()


# --- a driver -------------------------------------------------------------------------------------------------------


def reported(history: Sequence[Epoch]) -> dict[str, Any]:
    """What the trial tells after its last epoch so far."""
    best = best_of(history)
    return vars(history[-1]) | {
        "best_miou": best.miou,
        "best_epoch": best.epoch,
        "total_seconds": sum(epoch.seconds for epoch in history),
        "latency_ms": None,
    }


@dataclass(kw_only=True)
class Search:
    """One search and how it is made. `run` is a session of it: it goes on from whatever is there."""

    folder: Storage
    limit: int
    sampler: Sampler = "tpe"
    seed: int = 0
    at_once: int = 1
    known: tuple[Known, ...] = ()
    url: str | None = None
    between: Callable[[], None] = lambda: None
    """Called after each epoch."""
    clock: Callable[[], float] = time.monotonic
    """The ledger's, by which it saves storage some writes."""

    @property
    def place(self) -> StudyPlace:
        return study_place(self.folder, url=self.url, cache_dir=Path(self.folder.path) / "cache")

    def run(self) -> str:
        """As `launch` and `search` do it. Returns what trouble ended it, if any did."""
        self.folder.make()
        with state.exclusive(self.folder):
            suggested = read_suggested(self.folder)
            book = self.book(suggested)
            book.write()
            supply = self.supply(book, suggested)
            if supply.begin():
                self._train_all(book, supply)
            book.close()
            supply.close()
            return supply.trouble

    def book(self, suggested: Mapping[str, TrialSpec]) -> SearchState:
        """What the last session has left of it, or a new one."""
        earlier = records.complete_states(self.folder, state.read_trials(self.folder).standings, suggested)
        return SearchState(
            self.folder,
            [state.restore(name, one.run, earlier) for name, one in suggested.items()],
            captions=[],
            baseline="a",
            scheduler_state=lambda: {"seen": [], "stops": {}},
            clock=self.clock,
        )

    def supply(self, book: SearchState, suggested: Mapping[str, TrialSpec]) -> Asked:
        study = Study(
            self.place.open(),
            "light",
            question(sampler=self.sampler, seed=self.seed),
            limit=self.limit,
            checkpoint_of=lambda trial: f"{trial}/best.pt",
        )
        return Asked(
            study,
            self.folder,
            book,
            suggested=suggested,
            known=self.known,
            limit=self.limit,
            at_once=lambda: self.at_once,
            num_epochs=NUM_EPOCHS,
            snapshot=self.place.snapshot,
        )

    def _train_all(self, book: SearchState, supply: Asked) -> None:
        """As many as are handed out at once, an epoch of each in turn."""
        running: dict[str, Run] = {}
        while True:
            while (found := supply.next()) is not None:
                running[found[0]] = found[1]
                book.started(found[0])
            if supply.trouble or (supply.exhausted and not running):
                return
            for name, run in list(running.items()):
                if self._train_epoch(name, run, book, supply):
                    del running[name]

    def _train_epoch(self, name: str, run: Run, book: SearchState, supply: Asked) -> bool:
        """Whether it was the last one."""
        folder = self.folder / name
        history, whole = read_epochs(folder), curve_of(run)
        if book[name].epochs == len(history):  # else its last epoch is not yet heard of
            history = whole[: len(history) + 1]
            folder.write(EPOCHS, json.dumps([epoch.to_json() for epoch in history]).encode())
        book.heard(name, reported(history))
        book.write_if_due()
        supply.heard(name, epoch=len(history), miou=history[-1].miou)
        self.between()
        if len(history) < len(whole):
            return False
        status = end_of(run)[1]
        book.ended(name, diverged=status == "diverged", stopped_by="" if status == "finished" else status)
        supply.ended(book[name])
        return True


# --- what it left ---------------------------------------------------------------------------------------------------


def trials_in(search: Search) -> list[FrozenTrial]:
    """By number, as the study has them."""
    storage = RDBStorage(search.place.url, skip_compatibility_check=True, skip_table_creation=True)
    return optuna.load_study(study_name="light", storage=storage).get_trials(deepcopy=False)


def results(trials: Sequence[FrozenTrial]) -> dict[str, tuple[Any, ...]]:
    """Of each trial what it was, and what it came to."""
    return {
        name_of(trial): (trial.state.name, trial.number, trial.params, trial.values, trial.intermediate_values)
        for trial in trials
        if trial.state is not OptunaState.FAIL
    }


def assert_whole(search: Search, trials: Sequence[FrozenTrial]) -> None:
    """Nothing lost, nothing twice, nothing left over; study, ledger and folders agree."""
    own = [trial for trial in trials if "source" not in trial.user_attrs and trial.state is not OptunaState.FAIL]
    names = [name_of(trial) for trial in own]
    assert len(trials) - len({trial.number for trial in trials}) == 0
    assert len(set(names)) == len(names) == search.limit
    assert [trial.user_attrs["source"] for trial in trials if "source" in trial.user_attrs] == [
        one.source for one in search.known
    ]
    standings = {one.trial: one for one in state.read_trials(search.folder).standings}
    suggested = read_suggested(search.folder)
    assert set(standings) == set(suggested) == set(names)
    for trial in own:
        one, standing = suggested[name_of(trial)], standings[name_of(trial)]
        whole = curve_of(one.run)
        assert standing == ended(one) or (standing.status, standing.epochs, standing.best_miou) == (
            ended(one).status,
            len(whole),
            best_of(whole).miou,
        )
        assert trial.params == one.params
        assert trial.intermediate_values == {epoch.epoch: epoch.miou for epoch in whole}
        assert [epoch.epoch for epoch in read_epochs(search.folder / one.trial)] == [epoch.epoch for epoch in whole]
        finished = standing.status == "finished"
        assert trial.state is (OptunaState.COMPLETE if finished else OptunaState.PRUNED)
        assert trial.value == (standing.best_miou if finished else standing.last_miou)
        assert trial.user_attrs["status"] == standing.status


# --- killed at random -----------------------------------------------------------------------------------------------


def killed(search: Search, *, seed: int, mean_seconds: float, max_kills: int) -> int:
    """Run the search in processes that are killed at random moments; how many were."""
    wanted = {
        "place": search.folder.path,
        "limit": search.limit,
        "sampler": search.sampler,
        "at_once": search.at_once,
        "num_known": len(search.known),
        "url": search.url,
        "seed_of_kills": seed,
        "mean_seconds": mean_seconds,
        "max_kills": max_kills,
    }
    command = [sys.executable, "-W", "error", __file__, json.dumps(wanted)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def run_and_kill(search: Search, rng: random.Random, *, mean_seconds: float, max_kills: int) -> int:
    """Sessions that live `mean_seconds` on average, until one comes to its end; how many were killed."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            _run_and_exit(search)
        if kills < max_kills:
            time.sleep(rng.expovariate(1 / mean_seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "a session failed"
            return kills
        kills += 1


def _run_and_exit(search: Search) -> None:
    try:
        search.run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    wanted = json.loads(sys.argv[1])
    search = Search(
        folder=Storage.at(wanted["place"]),
        limit=wanted["limit"],
        sampler=wanted["sampler"],
        at_once=wanted["at_once"],
        known=earlier_trials(wanted["num_known"]),
        url=wanted["url"],
    )
    rng = random.Random(wanted["seed_of_kills"])
    print(  # noqa: T201 - what the test reads
        run_and_kill(search, rng, mean_seconds=wanted["mean_seconds"], max_kills=wanted["max_kills"])
    )


if __name__ == "__main__":
    main()
