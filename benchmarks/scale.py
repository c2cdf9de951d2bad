"""What a driver can carry: thousands of trivial trials over 64 pretended GPUs, by the search that trains real ones.

A trial here writes what a real one writes but weights and pictures, and sleeps instead of training: what is timed is
Tune, the supply, the ledger and the files of a search. Declared rows by default; `--sampled` asks a study for each.

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
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console

from tune_bisenet import records
from tune_bisenet.config import Run, TrialContext
from tune_bisenet.options import parse_options
from tune_bisenet.records import EPOCHS, Epoch
from tune_bisenet.report import keeper
from tune_bisenet.search import prepare, trainable
from tune_bisenet.search.driver import run_search
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage
from tune_bisenet.study.place import StudyPlace
from tune_bisenet.study.study import Study
from tune_bisenet.training.tensorboard import HParamsTable

NUM_GPUS = 64
TIMED = "timed.json"
WORKERS = "workers"

LONGEST_START = 900.0
"""Seconds that a worker waits for the others before its first trial begins, at most."""


# --- a trial that trains nothing --------------------------------------------------------------------------------------


def train(config: dict[str, Any], *, job: dict[str, Any], seconds: float) -> None:
    """In place of `trial.train`: the same files and reports, without a network."""
    run, asked = Run.model_validate(config["run"]), TrialContext.model_validate(job)
    if seconds:
        wait_for_all_workers(Path(asked.storage).parent / WORKERS)
    began = time.time()
    folder = Storage.at(asked.storage) / asked.trial_name(run)
    folder.make()
    history: list[Epoch] = []
    for number in range(1, run.num_epochs + 1):
        time.sleep(seconds / run.num_epochs)
        history.append(epoch_of(run, number))
        folder.write(EPOCHS, json.dumps([epoch.to_json() for epoch in history]).encode())
        best = {"best_miou": history[-1].miou, "best_epoch": number, "total_seconds": seconds, "latency_ms": None}
        tune.report(vars(history[-1]) | best | {"diverged": False})
    folder.write(TIMED, json.dumps({"worker": os.getpid(), "began": began, "ended": time.time()}).encode())


def wait_for_all_workers(folder: Path) -> None:
    """A cluster's nodes start their workers side by side; here all share a few cores, which takes minutes."""
    (folder / f"{os.getpid()}").touch()
    deadline = time.monotonic() + LONGEST_START
    while len(list(folder.iterdir())) < NUM_GPUS and time.monotonic() < deadline:
        time.sleep(1)


def epoch_of(run: Run, number: int) -> Epoch:
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


def timed(owner: Any, name: str) -> list[float]:
    """Seconds of every call of a function or method from now on."""
    function: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    return seconds


def measures() -> dict[str, list[float]]:
    """What a driver does beside Tune's own loop, by name."""
    return {
        "Tune's snapshot": timed(TuneController, "save_to_dir"),
        "ledger": timed(SearchState, "write"),
        "each trial's own ending": timed(records, "keep"),
        "TensorBoard's table": timed(HParamsTable, "_write"),
        "page and files of the report (thread)": timed(keeper, "write_safely"),
        "the study's next trial": timed(Study, "next"),
        "the study's snapshot": timed(StudyPlace, "snapshot"),
    }


@dataclass(frozen=True)
class Timed:
    """One trial's beginning and end (s since 1970), and the process it ran in."""

    worker: int
    began: float
    ended: float


def lost(trials: Sequence[Timed], seconds: float) -> list[float]:
    """Seconds between the beginnings of two trials of a worker that were not the trial's own."""
    of_worker: dict[int, list[float]] = defaultdict(list)
    for one in sorted(trials, key=lambda one: one.began):
        of_worker[one.worker].append(one.began)
    return [after - before - seconds for begins in of_worker.values() for before, after in pairwise(begins)]


def rates(trials: Sequence[Timed], parts: int = 5) -> list[float]:
    """Trials a second in each part of a search, from the first end to the last."""
    ends = sorted(one.ended for one in trials)
    cuts = [ends[part * (len(ends) - 1) // parts] for part in range(parts + 1)]
    return [len(ends) / parts / max(after - before, 1e-9) for before, after in pairwise(cuts)]


def memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def size_mib(paths: Sequence[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 2**20


# --- one search -------------------------------------------------------------------------------------------------------


def run(num_trials: int, *, num_epochs: int, seconds: float, sampled: bool) -> None:
    trainable.train_trial = partial(train, seconds=seconds)  # type: ignore[assignment]
    taken = measures()
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": NUM_GPUS, "num_gpus": NUM_GPUS})
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / WORKERS).mkdir()
        asked, mistyped = parse_options(
            flags_of(place, head.address, num_trials, num_epochs=num_epochs, sampled=sampled)
        )
        flight = prepare.prepare_search(asked, mistyped, default_name="scale", progress=lambda _done, _total: None)
        before = memory_mib()
        with (Path(place) / "said").open("w") as said:
            code = run_search(flight, Console(file=said), ["benchmark"])
        kind = "drawn by a study" if sampled else "declared"
        what = f"{num_trials} trials of {num_epochs} epochs in {seconds:g} s, {kind}"
        print(f"{what}, {NUM_GPUS} pretended GPUs, exit code {code}")
        print(f"  driver at most {memory_mib():.0f} MiB, {before:.0f} of them before the search")
        folder = Path(place) / "scale"
        trials = [Timed(**json.loads(path.read_text())) for path in folder.glob(f"*/{TIMED}")]
        show_trials(trials, num_epochs=num_epochs, seconds=seconds)
        show_measures(taken)
        show_storage(folder)
    head.shutdown()


def flags_of(place: str, address: str, num_trials: int, *, num_epochs: int, sampled: bool) -> dict[str, str]:
    flags = {"storage": place, "name": "scale", "address": address, "data": "streets", "scheduler": "fifo"}
    flags |= {"epochs": str(num_epochs)}
    if sampled:
        return flags | {"space": "around10", "trials": str(num_trials)}
    return flags | {"space": "smoke", "runs": "a", "seeds": ",".join(map(str, range(num_trials)))}


def show_trials(trials: Sequence[Timed], *, num_epochs: int, seconds: float) -> None:
    span = max(one.ended for one in trials) - min(one.ended for one in trials)
    cost = sorted(lost(trials, seconds))
    by_part = ", ".join(f"{rate:.1f}" for rate in rates(trials))
    print(f"  {len(trials) * num_epochs / span:.1f} results a second; trials a second by fifths: {by_part}")
    print(
        f"  lost per trial: median {statistics.median(cost):.2f} s, 95 % under {cost[int(0.95 * len(cost))]:.2f} s,"
        f" n = {len(cost)}"
    )


def show_measures(taken: dict[str, list[float]]) -> None:
    for name, calls in taken.items():
        if calls:
            print(
                f"  {name}: {len(calls)} times, {sum(calls):.1f} s in all, median {statistics.median(calls):.3f},"
                f" at most {max(calls):.2f} s"
            )


def show_storage(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != TIMED]
    tunes = [path for path in files if "tune" in path.relative_to(folder).parts[:1]]
    print(
        f"  storage without weights: {len(files)} files, {size_mib(files):.1f} MiB,"
        f" of them Tune's {len(tunes)} with {size_mib(tunes):.1f}"
    )
    largest = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: -path.stat().st_size)
    print("  largest: " + ", ".join(f"{path.name} {size_mib([path]):.2f} MiB" for path in largest[:5]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0, help="what a trial sleeps, in all its epochs")
    parser.add_argument("--epochs", type=int, default=2, help="results of a trial")
    parser.add_argument("--sampled", action="store_true")
    given = parser.parse_args()
    if given.trials <= NUM_GPUS:
        sys.exit(f"--trials: more than {NUM_GPUS}, so that workers have a second one")
    run(given.trials, num_epochs=given.epochs, seconds=given.seconds, sampled=given.sampled)
