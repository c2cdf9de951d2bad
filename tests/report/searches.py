"""A small search as it lies on storage: two rows, two seeds, three epochs, every number known."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tune_bisenet.config import SGD, CrossEntropy, Expect, Run, WarmupPoly
from tune_bisenet.data.classes import NUM_CLASSES, VOID
from tune_bisenet.evidence import BEST, Best, best_to_bytes
from tune_bisenet.results import EPOCHS, SEARCH, TRIALS, Epoch, Standing, best_of
from tune_bisenet.storage import Storage

PROXY = "Proxy: 3 epochs stand for 50. Its mIoU is not that of the full runs."

MIOU = {"r01-s0": 50.0, "r01-s1": 51.0, "r02-s0": 52.0, "r02-s1": 53.5}
"""Of the last epoch, which is the best."""

SESSION: dict[str, Any] = {
    "started": "2026-03-01T10:00:00+00:00",
    "ended": "2026-03-01T12:00:00+00:00",
    "signal": None,
    "command": ["python", "-m", "tune_bisenet.run", "--name", "small search"],
    "commit": "0123456789abcdef",
    "python": "3.11.9",
    "packages": {"torch": "2.15.0"},
    "cpus_per_trial": 4,
    "gpus_per_trial": 0.5,
    "trials_at_once": 2,
}


def row(name: str, seed: int, **changes: object) -> Run:
    run = Run(
        name=name,
        optimizer=SGD(lr=0.01, momentum=0.9, weight_decay=1e-4),
        schedule=WarmupPoly(warmup_iterations=1, power=0.9),
        loss=CrossEntropy(aux_weight=1.0),
        accumulation=1,
        max_grad_norm=None,
        num_epochs=3,
        image_size=(32, 64),
        seed=seed,
        expect=Expect(miou=(45, 55)),
    )
    return run.model_copy(update=changes)


RUNS = {
    f"{name}-s{seed}": row(name, seed, **changes)
    for seed in (0, 1)
    for name, changes in {
        "r01": {},
        "r02": {"accumulation": 2, "expect": Expect(gain=(1, 3), over="r01", note="It still sees two images.")},
    }.items()
}


def epochs(miou: float, count: int = 3) -> list[Epoch]:
    """Each epoch gains ten points; the last of three reaches `miou`. The last class never occurs."""
    reached = [miou - 10 * (3 - number) for number in range(1, count + 1)]
    return [
        Epoch(
            epoch=number,
            iterations=10 * number,
            loss=3.0 / number,
            loss_main=2.0 / number,
            loss_aux1=0.5 / number,
            loss_aux2=0.5 / number,
            lr=0.01,
            grad_norm=1.0,
            miou=value,
            iou=(*[value] * (NUM_CLASSES - 1), None),
            pixel_accuracy=90.0,
            images_per_second=20.0,
            train_seconds=30.0,
            val_seconds=6.0,
        )
        for number, value in enumerate(reached, start=1)
    ]


def best(seed: int = 0) -> Best:
    """Two validation images, both kept to look at; the label's first line is void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, (2, 64, 128), dtype=np.uint8)
    labels[:, 0] = VOID
    confusions = np.zeros((2, NUM_CLASSES, NUM_CLASSES), np.int32)
    confusions[:] = 10 * np.eye(NUM_CLASSES, dtype=np.int32)
    confusions[:, 0, 1] = 30
    return Best(
        confusions=confusions,
        names=("street one", "street two"),
        images=rng.integers(0, 256, (2, 3, 32, 64), dtype=np.uint8),
        labels=labels,
        predictions=rng.integers(0, NUM_CLASSES, (2, 64, 128), dtype=np.uint8),
    )


def standing(trial: str, history: Sequence[Epoch]) -> Standing:
    run = RUNS[trial]
    waiting = Standing(trial=trial, run=run.name, seed=run.seed, num_epochs=run.num_epochs)
    if not history:
        return waiting
    top = best_of(history)
    return replace(
        waiting,
        status="finished",
        epochs=len(history),
        best_miou=top.miou,
        best_epoch=top.epoch,
        last_miou=history[-1].miou,
        pixel_accuracy=history[-1].pixel_accuracy,
        seconds=math.fsum(epoch.seconds for epoch in history),
    )


def manifest(**changes: object) -> dict[str, Any]:
    return {
        "name": "small search",
        "choices": {"space": "small", "scheduler": "fifo", "precision": "fp32", "seeds": [0, 1]},
        "space": {"name": "small", "title": "Two rows", "baseline": "r01"},
        "trials": {name: run.model_dump(mode="json") for name, run in RUNS.items()},
        "data": {"name": "streets", "digests": {"32x64": "feedbeef"}, "train_images": 40, "val_images": 2},
        "backbone": {"name": "none", "digest": "none"},
        "proxy": None,
        "sessions": [SESSION],
    } | changes


def write_search(place: Path, *, standings: Mapping[str, Standing] | None = None, **changes: object) -> Storage:
    """The whole search; `standings` and fields of the manifest may be others."""
    folder = Storage.at(str(place))
    folder.make()
    write_json(folder, SEARCH, manifest(**changes))
    known = {name: standing(name, epochs(MIOU[name])) for name in RUNS} | dict(standings or {})
    write_json(folder, TRIALS, {"standings": [one.to_json() for one in known.values()], "scheduler": {}})
    for number, name in enumerate(RUNS):
        write_trial(folder / name, epochs(MIOU[name]), best(number))
    return folder


def write_trial(folder: Storage, history: Sequence[Epoch], kept: Best | None = None) -> None:
    folder.make()
    write_json(folder, EPOCHS, [epoch.to_json() for epoch in history])
    if kept:
        folder.write(BEST, best_to_bytes(kept))


def write_json(folder: Storage, name: str, value: object) -> None:
    folder.write(name, json.dumps(value).encode())


def cut(folder: Storage, name: str) -> None:
    """Leave only the first half of a file, as a crash or a full disk does."""
    content = folder.read(name)
    assert content
    folder.write(name, content[: len(content) // 2])
