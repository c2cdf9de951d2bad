"""A small search as it lies on storage: two rows, two seeds, three epochs, every number known. And a sampled one."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from rows import plain_epoch, plain_row

from tune_bisenet.config import SGD, AdamW, Expect, Run
from tune_bisenet.data.classes import NUM_CLASSES, VOID
from tune_bisenet.records import (
    BEST_PREDICTIONS,
    EPOCHS,
    KNOWN,
    RUN,
    SEARCH,
    TRIALS,
    BestPredictions,
    Epoch,
    Known,
    Origin,
    Param,
    Status,
    TrialSpec,
    TrialState,
    best_of,
    predictions_to_bytes,
)
from tune_bisenet.storage import Storage

PROXY = "Proxy: 3 epochs stand for 50. Its mIoU is not that of the full runs."

ROW_EPOCHS = 50
"""On the scale of a space's own rows."""

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
    run = plain_row(name, warmup=1, num_epochs=3, image_size=(32, 64), seed=seed, expect=Expect(miou=(45, 55)))
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
        plain_epoch(
            number,
            value,
            iterations=10 * number,
            loss=3.0 / number,
            loss_main=2.0 / number,
            loss_aux1=0.5 / number,
            loss_aux2=0.5 / number,
            iou=(*[value] * (NUM_CLASSES - 1), None),
            images_per_second=20.0,
            train_seconds=30.0,
            val_seconds=6.0,
        )
        for number, value in enumerate(reached, start=1)
    ]


def best(seed: int = 0) -> BestPredictions:
    """Two validation images, both kept to look at; the label's first line is void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, (2, 64, 128), dtype=np.uint8)
    labels[:, 0] = VOID
    confusions = np.zeros((2, NUM_CLASSES, NUM_CLASSES), np.int32)
    confusions[:] = 10 * np.eye(NUM_CLASSES, dtype=np.int32)
    confusions[:, 0, 1] = 30
    return BestPredictions(
        confusions=confusions,
        names=("street one", "street two"),
        images=rng.integers(0, 256, (2, 3, 32, 64), dtype=np.uint8),
        labels=labels,
        predictions=rng.integers(0, NUM_CLASSES, (2, 64, 128), dtype=np.uint8),
    )


def standing(trial: str, history: Sequence[Epoch]) -> TrialState:
    run = RUNS[trial]
    waiting = TrialState(trial=trial, run=run.name, seed=run.seed, num_epochs=run.num_epochs)
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


def write_search(place: Path, *, standings: Mapping[str, TrialState] | None = None, **changes: object) -> Storage:
    """The whole search; `standings` and fields of the manifest may be others."""
    folder = Storage.at(str(place))
    folder.make()
    write_json(folder, SEARCH, manifest(**changes))
    known = {name: standing(name, epochs(MIOU[name])) for name in RUNS} | dict(standings or {})
    write_json(folder, TRIALS, {"standings": [one.to_json() for one in known.values()], "scheduler": {}})
    for number, name in enumerate(RUNS):
        write_trial(folder / name, epochs(MIOU[name]), best(number))
    return folder


def write_trial(folder: Storage, history: Sequence[Epoch], kept: BestPredictions | None = None) -> None:
    folder.make()
    write_json(folder, EPOCHS, [epoch.to_json() for epoch in history])
    if kept:
        folder.write(BEST_PREDICTIONS, predictions_to_bytes(kept))


def write_json(folder: Storage, name: str, value: object) -> None:
    folder.write(name, json.dumps(value).encode())


def cut(folder: Storage, name: str) -> None:
    """Leave only the first half of a file, as a crash or a full disk does."""
    content = folder.read(name)
    assert content
    folder.write(name, content[: len(content) // 2])


# --- a sampled search -----------------------------------------------------------------------------------------------

LR_OF_BEST = 0.03
"""Where the mIoU of the sampled search peaks; ten times off it loses six points."""

STUDY: dict[str, Any] = {
    "name": "sampled search",
    "url": "postgresql://me:***@host/studies",
    "sampler": "tpe",
    "objectives": ["miou"],
    "warm_start": [],
    "best_of_rows": None,
}

RANGES = {
    "optimizer": CategoricalDistribution(["sgd", "adamw"]),
    "sgd_lr": FloatDistribution(1e-3, 1e-1, log=True),
    "sgd_momentum": FloatDistribution(0.8, 0.98),
    "adamw_lr": FloatDistribution(1e-4, 1e-2, log=True),
    "aux_weight": FloatDistribution(0.0, 1.5),
    "accumulation": CategoricalDistribution([1, 2, 4]),
    "warmup_iterations": IntDistribution(500, 3000),
}


def point(number: int) -> dict[str, Param]:
    """The values of a trial of the study: two of three are SGD."""
    rng = random.Random(number)
    common = {
        "aux_weight": rng.uniform(0, 1.5),
        "accumulation": rng.choice([1, 2, 4]),
        "warmup_iterations": rng.randint(500, 3000),
    }
    if number % 3 == 2:
        return {"optimizer": "adamw", "adamw_lr": 10 ** rng.uniform(-4, -2), **common}
    return {"optimizer": "sgd", "sgd_lr": 10 ** rng.uniform(-3, -1), "sgd_momentum": rng.uniform(0.8, 0.98), **common}


def miou_at(params: Mapping[str, Param]) -> float:
    """What a point reaches: its learning rate decides, and a little the weight of the auxiliary losses."""
    rate = float(params.get("sgd_lr") or 10 * float(params["adamw_lr"] or 0))
    return 55 - 6 * abs(math.log10(rate / LR_OF_BEST)) - 0.4 * abs(float(params["aux_weight"] or 0) - 0.5)


def suggested(
    trial: str, origin: Origin, *, number: int | None, params: Mapping[str, Param], **changes: object
) -> TrialSpec:
    name = str(changes.pop("name", trial))
    if params.get("optimizer") == "adamw":
        changes["optimizer"] = AdamW(lr=float(params["adamw_lr"] or 0), weight_decay=1e-4)
    elif params:
        rate, momentum = float(params["sgd_lr"] or 0), float(params["sgd_momentum"] or 0)
        changes["optimizer"] = SGD(lr=rate, momentum=momentum, weight_decay=1e-4)
    expect = Expect(miou=(45, 60)) if origin == "row" else None
    run = row(name, 0).model_copy(update={"expect": expect} | changes)
    return TrialSpec(
        trial=trial,
        run=run,
        row=run.model_copy(update={"num_epochs": ROW_EPOCHS}),
        origin=origin,
        number=number,
        params=dict(params),
        distributions={key: distribution_to_json(RANGES[key]) for key in params},
    )


def told(one: TrialSpec, miou: float, *, status: Status = "finished", latency_ms: float | None = None) -> TrialState:
    """How the trial stands if it came to `miou`; stopped or diverged, after two of three epochs."""
    waiting = TrialState(trial=one.trial, run=one.run.name, seed=one.run.seed, num_epochs=3, latency_ms=latency_ms)
    if status == "failed":
        return replace(waiting, status=status, error="no memory")
    reached, last = (3, miou) if status == "finished" else (2, miou - 10)
    return replace(waiting, status=status, epochs=reached, best_miou=last, best_epoch=reached, last_miou=last)


def write_study(
    place: Path,
    *,
    trials: int = 24,
    known: int = 0,
    fresh_seeds: int = 0,
    latency: bool = False,
    gain_on_fresh: float = 0.5,
    **changes: object,
) -> Storage:
    """A sampled search: two declared rows, `trials` in all, one stopped in five, one diverged, one failed.

    At fresh seeds the best sampled trial leads both rows by about `gain_on_fresh`. `changes` are of the manifest.
    """
    folder = Storage.at(str(place))
    folder.make()
    record = manifest(
        name="sampled search",
        space={"name": "around", "title": "Around two rows", "baseline": "r01"},
        study=STUDY | {"objectives": ["miou", "latency"] if latency else ["miou"]},
        limits={"trials": trials, "time_budget_seconds": None, "gpu_hours": None},
        trials={},
    )
    write_json(folder, SEARCH, record | changes)
    standings = [_write_sample(folder, place, number=known + place, latency=latency) for place in range(trials)]
    standings += [
        _write_fresh(folder, name, seed, miou=50 + gain)
        for seed in range(1, fresh_seeds + 1)
        for name, gain in {_chosen(standings): gain_on_fresh + 0.1 * seed, "r01": 0.0, "r02": 0.1}.items()
    ]
    if known:
        write_json(folder, KNOWN, [_known(number).to_json() for number in range(known)])
    write_json(folder, TRIALS, {"standings": [one.to_json() for one in standings], "scheduler": {}})
    return folder


def _chosen(standings: Sequence[TrialState]) -> str:
    """The best sampled trial."""
    return max(standings[2:], key=lambda one: (one.status == "finished", one.best_miou or 0)).run


def _write_sample(folder: Storage, place: int, *, number: int, latency: bool) -> TrialState:
    params = point(number)
    trial = f"r{place + 1:02d}" if place < 2 else f"t{number:04d}"
    one = suggested(trial, "row" if place < 2 else "sampled", number=number, params=params)
    ends: dict[int, Status] = {3: "diverged", 5: "failed"}
    status: Status = ends.get(place, "stopped" if place > 6 and place % 5 == 0 else "finished")
    milliseconds = 10 + 2 * (number % 7) + 0.1 * number if latency and status == "finished" else None
    standing = told(one, miou_at(params), status=status, latency_ms=milliseconds)
    _write_suggested(folder, one, epochs(miou_at(params), standing.epochs))
    return standing


def _write_fresh(folder: Storage, name: str, seed: int, *, miou: float) -> TrialState:
    one = suggested(f"{name}-s{seed}", "confirm", number=None, params={}, name=name, seed=seed)
    _write_suggested(folder, one, epochs(miou))
    return told(one, miou)


def _write_suggested(folder: Storage, one: TrialSpec, history: Sequence[Epoch]) -> None:
    (folder / one.trial).make()
    write_json(folder / one.trial, RUN, one.to_json())
    if history:
        write_trial(folder / one.trial, history, best(len(one.trial)))


def _known(number: int) -> Known:
    params = point(number)
    one = suggested(f"t{number:04d}", "sampled", number=number, params=params)
    history = tuple(epochs(miou_at(params)))
    return Known(
        suggested=one, standing=told(one, miou_at(params)), epochs=history, source=f"s3://bucket/earlier/{one.trial}"
    )
