"""Measure what a driver can carry: thousands of trivial trials over 64 pretended GPUs, in a real search.

A trial of this benchmark writes what a real one writes except weights and pictures, and sleeps instead of training.
So what is timed is Tune, the searcher, the search's state and its files. Declared rows by default; `--sampled` asks a
study for each trial.

    python benchmarks/scale.py --trials 1000 [--seconds 30] [--epochs 2] [--sampled]
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console

from tune_bisenet.config import Run
from tune_bisenet.options import parse_options
from tune_bisenet.records import Epoch, TrialRecord, TrialSpec, from_plain, measure, write_trial
from tune_bisenet.report import page
from tune_bisenet.search import state, tuner
from tune_bisenet.search.driver import run_search
from tune_bisenet.search.prepare import prepare_search
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage
from tune_bisenet.study.study import Study, StudyDatabase
from tune_bisenet.training.tensorboard import HParamsTable

NUM_GPUS = 64
TIMED = "timed.json"
WORKERS = "workers"

MAX_START_SECONDS = 900.0
"""How long a worker waits for the others, at most, before its first trial begins."""


# --- a trial that trains nothing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialTimes:
    """The beginning and the end of one trial (s since 1970), and the process it ran in."""

    worker: int
    began: float
    ended: float


def train(config: dict[str, Any], *, context: dict[str, Any], seconds: float) -> None:
    """Write the files and reports of `train_trial` without a network; sleep `seconds` in all."""
    spec, search = from_plain(TrialSpec, config), Storage.at(context["storage"])
    if seconds:
        wait_for_all_workers(Path(context["storage"]).parent / WORKERS)
    began = time.time()
    history: list[Epoch] = []
    for number in range(1, spec.run.num_epochs + 1):
        time.sleep(seconds / spec.run.num_epochs)
        history.append(make_epoch(spec.run, number))
        write_trial(search, TrialRecord.of_spec(spec, history))
        tune.report(asdict(history[-1]) | measure(history) | {"diverged": False})
    times = TrialTimes(worker=os.getpid(), began=began, ended=time.time())
    (search / spec.trial).write(TIMED, json.dumps(asdict(times)).encode())


def wait_for_all_workers(folder: Path) -> None:
    """Wait until every worker has started: here all share a few cores, which takes minutes.

    A cluster's nodes start their workers side by side.
    """
    (folder / f"{os.getpid()}").touch()
    deadline = time.monotonic() + MAX_START_SECONDS
    while len(list(folder.iterdir())) < NUM_GPUS and time.monotonic() < deadline:
        time.sleep(1)


def make_epoch(run: Run, number: int) -> Epoch:
    """Return the measurements of epoch `number`, which differ from row to row and from seed to seed."""
    miou = 10.0 * number + run.optimizer.lr + run.seed % 7
    return Epoch(
        epoch=number,
        iterations=number,
        loss=1.0,
        loss_main=1.0,
        loss_aux1=0.0,
        loss_aux2=0.0,
        lr=0.01,
        grad_norm=1.0,
        miou=miou,
        iou=(miou,) * 19,
        pixel_accuracy=50.0,
        images_per_second=1.0,
        train_seconds=0.0,
        val_seconds=0.0,
    )


# --- what is measured -------------------------------------------------------------------------------------------------


def record_calls(owner: Any, name: str) -> list[float]:
    """Return a list that gets the seconds of every later call of this function or method."""
    function: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    return seconds


def record_driver() -> dict[str, list[float]]:
    """Return, by name, the seconds of what a driver does beside Tune's own loop; the lists fill as it works."""
    return {
        "Tune's snapshot": record_calls(TuneController, "save_to_dir"),
        "the search's state: trials.json, leaderboard": record_calls(SearchState, "write"),
        "the end of each trial, in its folder": record_calls(state, "end_trial"),
        "TensorBoard's table": record_calls(HParamsTable, "write"),
        "page and files of the report (thread)": record_calls(page, "write_safely"),
        "the study's next trial": record_calls(Study, "ask"),
        "the study's snapshot": record_calls(StudyDatabase, "snapshot"),
    }


def lost_seconds(trials: Sequence[TrialTimes], seconds: float) -> list[float]:
    """Return the seconds between the beginnings of two trials of a worker that were not the trial's own `seconds`."""
    begins: dict[int, list[float]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.began):
        begins[trial.worker].append(trial.began)
    return [after - before - seconds for times in begins.values() for before, after in pairwise(times)]


def rates(trials: Sequence[TrialTimes], parts: int = 5) -> list[float]:
    """Return trials a second in each part of a search, from the first end to the last."""
    ends = sorted(trial.ended for trial in trials)
    cuts = [ends[part * (len(ends) - 1) // parts] for part in range(parts + 1)]
    return [len(ends) / parts / max(after - before, 1e-9) for before, after in pairwise(cuts)]


def memory_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def size_mib(paths: Sequence[Path]) -> float:
    """Return the size of all these files together."""
    return sum(path.stat().st_size for path in paths) / 2**20


# --- one search -------------------------------------------------------------------------------------------------------


def run(num_trials: int, *, num_epochs: int, seconds: float, sampled: bool) -> None:
    """Run one search in a temporary folder, and print what was measured."""
    tuner.make_trainable = lambda: partial(train, seconds=seconds)
    calls = record_driver()
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": NUM_GPUS, "num_gpus": NUM_GPUS})
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / WORKERS).mkdir()
        flags = make_flags(directory, head.address, num_trials, num_epochs=num_epochs, sampled=sampled)
        search = prepare_search(*parse_options(flags), default_name="scale", progress=lambda _done, _total: None)
        memory_before = memory_mib()
        with (Path(directory) / "terminal.txt").open("w") as terminal:
            code = run_search(search, Console(file=terminal), ["benchmark"])
        kind = "drawn by a study" if sampled else "declared"
        title = f"{num_trials} trials of {num_epochs} epochs in {seconds:g} s, {kind}"
        print(f"{title}, {NUM_GPUS} pretended GPUs, exit code {code}")
        print(f"  driver at most {memory_mib():.0f} MiB, {memory_before:.0f} of them before the search")
        folder = Path(directory) / "scale"
        trials = [TrialTimes(**json.loads(path.read_text())) for path in folder.glob(f"*/{TIMED}")]
        print_trials(trials, num_epochs=num_epochs, seconds=seconds)
        print_calls(calls)
        print_storage(folder)
    head.shutdown()


def make_flags(directory: str, address: str, num_trials: int, *, num_epochs: int, sampled: bool) -> dict[str, str]:
    """Return the flags of the search, as `parse_options` takes them."""
    flags = {"storage": directory, "name": "scale", "address": address, "data": "streets", "scheduler": "fifo"}
    flags |= {"epochs": str(num_epochs)}
    if sampled:
        return flags | {"space": "around10", "trials": str(num_trials)}
    return flags | {"space": "smoke", "runs": "a", "seeds": ",".join(map(str, range(num_trials)))}


def print_trials(trials: Sequence[TrialTimes], *, num_epochs: int, seconds: float) -> None:
    """Print how fast results came, and what each trial lost."""
    span = max(trial.ended for trial in trials) - min(trial.ended for trial in trials)
    lost = sorted(lost_seconds(trials, seconds))
    by_part = ", ".join(f"{rate:.1f}" for rate in rates(trials))
    print(f"  {len(trials) * num_epochs / span:.1f} results a second; trials a second by fifths: {by_part}")
    print(
        f"  lost per trial: median {statistics.median(lost):.2f} s, 95 % under {lost[int(0.95 * len(lost))]:.2f} s,"
        f" n = {len(lost)}"
    )


def print_calls(calls: dict[str, list[float]]) -> None:
    """Print what the driver did beside Tune's own loop."""
    for name, seconds in calls.items():
        if seconds:
            print(
                f"  {name}: {len(seconds)} times, {sum(seconds):.1f} s in all, median {statistics.median(seconds):.3f},"
                f" at most {max(seconds):.2f} s"
            )


def print_storage(folder: Path) -> None:
    """Print how much the search has left in its folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != TIMED]
    from_tune = [path for path in files if "tune" in path.relative_to(folder).parts[:1]]
    print(
        f"  storage without weights: {len(files)} files, {size_mib(files):.1f} MiB,"
        f" of them Tune's {len(from_tune)} with {size_mib(from_tune):.1f}"
    )
    largest = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: -path.stat().st_size)
    print("  largest: " + ", ".join(f"{path.name} {size_mib([path]):.2f} MiB" for path in largest[:5]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0, help="what a trial sleeps, in all its epochs")
    parser.add_argument("--epochs", type=int, default=2, help="results of a trial")
    parser.add_argument("--sampled", action="store_true")
    arguments = parser.parse_args()
    if arguments.trials <= NUM_GPUS:
        sys.exit(f"--trials {arguments.trials}: give more than {NUM_GPUS}, so that workers have a second one.")
    run(arguments.trials, num_epochs=arguments.epochs, seconds=arguments.seconds, sampled=arguments.sampled)
