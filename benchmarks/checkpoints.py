"""Measure what keeping its state costs a training, written in line or aside, in a thread beside the next epoch.

Trains on noise and keeps `best.pt` and the state after every epoch, as a trial does whose every epoch is its best. The
ways take turns, so that all meet what else the machine does.

    python benchmarks/checkpoints.py [--size 96x192] [--batches 8] [--rounds 5] [--threads 1] [--folder DIR_OR_URI]
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from tune_bisenet.config import SGD, CrossEntropy, Run, WarmupPoly
from tune_bisenet.records import Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.training import benchmark, checkpoint, engine
from tune_bisenet.training.engine import Training

EPOCHS = 2
"""Epochs of one turn."""


def timed(way: str, training: Training, folder: Storage) -> tuple[float, float]:
    """Return the seconds of an epoch that is kept, by the clock and of CPU: those of `EPOCHS` by their number."""
    history: list[Epoch] = []
    training.epochs_done = 0
    began = (0.0, 0.0)

    def keep(state: checkpoint.State, epochs: list[Epoch]) -> None:
        checkpoint.save_best(state, epochs[-1], folder, identity="x")
        checkpoint.save(state, epochs, folder, identity="x")

    with ThreadPoolExecutor(1) as pool:
        keeping: Future[None] | None = None
        for end in engine.fit(training):
            if keeping:
                keeping.result()
            now = (time.perf_counter(), time.process_time())
            began = now if not history else began
            history.append(replace(end.epoch, epoch=len(history) + 1))
            if len(history) > EPOCHS:
                break
            if way == "aside":
                keeping = pool.submit(keep, checkpoint.state_of(training).copied(), [*history])
            elif way == "in line":
                keep(
                    checkpoint.state_of(training),
                    history,
                )
        return (now[0] - began[0]) / EPOCHS, (now[1] - began[1]) / EPOCHS


def run(size: tuple[int, int], num_batches: int, rounds: int, threads: int, folder: Storage) -> None:
    """Print the seconds of an epoch that is not kept, and what each way adds to it."""
    torch.set_num_threads(threads)
    row = Run(
        name="r",
        optimizer=SGD(lr=1e-3, momentum=0.9, weight_decay=1e-4),
        schedule=WarmupPoly(warmup_iterations=0, power=0.9),
        loss=CrossEntropy(aux_weight=1.0),
        accumulation=1,
        max_grad_norm=None,
        num_epochs=10**6,
        image_size=size,
    )
    noise = benchmark._noise(row, size, num_batches=num_batches)
    training = engine.begin(row, noise, device=torch.device("cpu"), precision="fp32", backbone=None)
    folder.make()
    ways = ("not kept", "in line", "aside")
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            spent = timed(way, training, folder)
            print(f"{way}: {spent[0]:.2f} s by the clock, {spent[1]:.2f} of CPU", flush=True)
            if turn:  # caches fill in the first
                seconds[way].append(spent)
    for kind, name in enumerate(("by the clock", "of CPU")):
        of = {way: [spent[kind] for spent in seconds[way]] for way in ways}
        print(f"{name}: an epoch that is not kept {statistics.median(of['not kept']):.2f} s")
        for way in ways[1:]:
            added = [spent - plain for spent, plain in zip(of[way], of["not kept"], strict=True)]
            print(f"  {way} + {statistics.median(added):.2f} s, {min(added):.2f} to {max(added):.2f}, n = {rounds}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="96x192")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder")
    given = parser.parse_args()
    height, width = map(int, given.size.split("x"))
    with tempfile.TemporaryDirectory() as directory:
        storage = Storage.at(given.folder or directory)
        run((height, width), given.batches, given.rounds, given.threads, storage)
