"""What a driver can carry: thousands of trivial trials over 64 pretended GPUs, by the search that trains real ones.

A trial here writes what a real one writes but weights and pictures, and reports its epochs at once: what is timed is
Tune, the supply, the ledger and the files of a search. Declared rows by default; `--sampled` asks a study for each.

    python benchmarks/scale.py --trials 1000 [--sampled]
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console

from tune_bisenet import ledger, preflight, ray_session, trial
from tune_bisenet.arguments import parse
from tune_bisenet.launch import _Session

NUM_GPUS = 64
NUM_EPOCHS = 2


def train(config: dict[str, Any], *, job: dict[str, Any]) -> None:
    """In place of `trial.train`: the same files and reports, without a network."""
    import json

    from ray import tune

    from tune_bisenet.config import Job, Run
    from tune_bisenet.results import EPOCHS, Epoch
    from tune_bisenet.storage import Storage

    run, asked = Run.model_validate(config["run"]), Job.model_validate(job)
    folder = Storage.at(asked.storage) / asked.trial_name(run)
    folder.make()
    history = []
    for number in range(1, run.num_epochs + 1):
        miou = 10.0 * number + run.optimizer.lr + run.seed % 7
        measured = {"loss": 1.0, "loss_main": 1.0, "loss_aux1": 0.0, "loss_aux2": 0.0, "lr": 0.01, "grad_norm": 1.0}
        history.append(
            Epoch(
                epoch=number,
                iterations=number,
                miou=miou,
                iou=(miou,) * 19,
                pixel_accuracy=50.0,
                images_per_second=1.0,
                train_seconds=0.0,
                val_seconds=0.0,
                **measured,
            )
        )
        folder.write(EPOCHS, json.dumps([epoch.to_json() for epoch in history]).encode())
        best = {"diverged": False, "best_miou": miou, "best_epoch": number, "total_seconds": 0.0, "latency_ms": None}
        tune.report(vars(history[-1]) | best)


def timed(owner: type, name: str) -> list[float]:
    """Seconds of every call of a method from now on."""
    method: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    return seconds


def run(num_trials: int, *, sampled: bool) -> None:
    trial.train = train
    snapshots, writes = timed(TuneController, "checkpoint"), timed(ledger.Ledger, "write")
    with tempfile.TemporaryDirectory() as place:
        flags = {"storage": place, "name": "scale", "data": "streets", "scheduler": "fifo", "epochs": str(NUM_EPOCHS)}
        if sampled:
            flags |= {"space": "around10", "trials": str(num_trials)}
        else:
            flags |= {"space": "smoke", "runs": "a", "seeds": ",".join(map(str, range(num_trials)))}
        asked, mistyped = parse(flags)
        flight = preflight.check(asked, mistyped, default_name="scale", progress=lambda _done, _total: None)
        ray_session.configure_environment()
        ray.init(address="local", num_cpus=NUM_GPUS, num_gpus=NUM_GPUS, include_dashboard=False, log_to_driver=False)
        cluster = ray_session.Cluster((ray_session.Node(id="here", cpus=NUM_GPUS, gpus=NUM_GPUS),))
        resources = ray_session.allot(cluster, asked, num_trials=num_trials)
        started = time.perf_counter()
        session = _Session.of(flight, resources, at_once=lambda: NUM_GPUS)
        code = session.run(Console(file=(Path(place) / "said").open("w")), ["benchmark"])
        seconds = time.perf_counter() - started
        kind = "drawn by a study" if sampled else "declared"
        files = [path for path in Path(place).rglob("*") if path.is_file()]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"{num_trials} trials {kind}, {resources.concurrency} at once, exit code {code}: {seconds:.0f} s")
        print(
            f"  {num_trials * NUM_EPOCHS / seconds:.1f} results a second, {seconds / num_trials * 1000:.0f} ms a trial"
        )
        print(f"  driver at most {memory:.0f} MiB")
        for name, taken in (("Tune's snapshots", snapshots), ("ledger", writes)):
            longest, median = max(taken, default=0), statistics.median(taken or [0])
            print(
                f"  {name}: {len(taken)} calls, {sum(taken):.1f} s in all, median {median:.3f}, at most {longest:.2f} s"
            )
        size = sum(path.stat().st_size for path in files)
        print(f"  storage: {len(files)} files, {size / 2**20:.0f} MiB without weights; trials.json "
              f"{(Path(place) / 'scale' / 'trials.json').stat().st_size / 2**20:.1f} MiB")  # fmt: skip
        ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampled", action="store_true")
    given = parser.parse_args()
    run(given.trials, sampled=given.sampled)
