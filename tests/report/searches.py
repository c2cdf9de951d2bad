"""A small search in its folder: two rows, two seeds, three epochs, every number known. And a sampled one."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers.rows import CONFIG, plain_epoch, plain_manifest, plain_row
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json

from tune_bisenet import records
from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.config import SGD, AdamW, Expect, Param, Run
from tune_bisenet.records import (
    BEST_PREDICTIONS,
    ENDED_WELL,
    SEARCH,
    TRIALS,
    BestPredictions,
    Epoch,
    Latency,
    Manifest,
    Origin,
    SavedState,
    Status,
    TrialRecord,
    TrialSpec,
    TrialState,
    measure,
    predictions_to_bytes,
    to_json,
)
from tune_bisenet.storage import Storage

PROXY = "Proxy: 3 epochs stand for 50. Its mIoU is not that of the full runs."

ROW_EPOCHS = 50
"""On the scale of a space's own rows."""

MIOU = {"r01-s0": 50.0, "r01-s1": 51.0, "r02-s0": 52.0, "r02-s1": 53.5}
"""The mIoU of the last epoch, which is the best."""


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
            iou=(*[value] * (len(CITYSCAPES) - 1), None),
            images_per_second=20.0,
            train_seconds=30.0,
            val_seconds=6.0,
        )
        for number, value in enumerate(reached, start=1)
    ]


def best(seed: int = 0) -> BestPredictions:
    """Two validation images, both kept to look at; the label's first line is void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CITYSCAPES), (2, 64, 128), dtype=np.uint8)
    labels[:, 0] = VOID
    confusions = np.zeros((2, len(CITYSCAPES), len(CITYSCAPES)), np.int32)
    confusions[:] = 10 * np.eye(len(CITYSCAPES), dtype=np.int32)
    confusions[:, 0, 1] = 30
    return BestPredictions(
        confusions=confusions,
        groups=("street one", "street two"),
        names=("street one", "street two"),
        images=rng.integers(0, 256, (2, 3, 32, 64), dtype=np.uint8),
        labels=labels,
        predictions=rng.integers(0, len(CITYSCAPES), (2, 64, 128), dtype=np.uint8),
    )


def state_of(trial: str, history: Sequence[Epoch]) -> TrialState:
    """Return the state of a trial that has finished, or waits if it has no epochs."""
    status: Status = "finished" if history else "waiting"
    return TrialState.of_run(trial, RUNS[trial], status=status, **measure(history))


def manifest(**changes: Any) -> Manifest:
    """Return how the search was made; `changes` are of the manifest's fields, as plain values or not."""
    data = {"digests": {"32x64": "feedbeef"}, "train_images": 40, "val_images": 2}
    return plain_manifest(**({"name": "small search", "trials": RUNS, "data": data} | changes))


def write_search(place: Path, *, states: Mapping[str, TrialState] | None = None, **changes: Any) -> Storage:
    """Write the whole search; `states` and fields of the manifest may be others."""
    folder = begin(place, **changes)
    known = {name: state_of(name, epochs(MIOU[name])) for name in RUNS} | dict(states or {})
    folder.write(TRIALS, to_json(SavedState(states=tuple(known.values()))))
    for number, name in enumerate(RUNS):
        write_trial(folder, name, epochs(MIOU[name]), best(number), state=known[name])
    return folder


def begin(place: Path, **changes: Any) -> Storage:
    """Write a search that has only its manifest."""
    folder = Storage.at(str(place))
    folder.make()
    folder.write(SEARCH, to_json(manifest(**changes)))
    return folder


def write_trial(
    folder: Storage,
    trial: str,
    history: Sequence[Epoch],
    kept: BestPredictions | None = None,
    *,
    spec: TrialSpec | None = None,
    state: TrialState | None = None,
) -> None:
    """Write the record of a trial with these epochs into a search, and the predictions of its best.

    It has ended if `state` has, or without that if it has all its epochs.
    """
    spec = spec or TrialSpec(trial=trial, run=RUNS.get(trial, RUNS["r01-s0"]))
    latency = None
    if state and (ms := state.latency_ms):
        latency = Latency(median_ms=ms, low_ms=ms, high_ms=ms, repeats=1, device="CPU")
    record = TrialRecord.of_spec(spec, history, latency)
    if state and state.status in ENDED_WELL:
        record = replace(record, state=replace(state, **record.measured))
    elif state is None and history and history[-1].epoch == spec.run.num_epochs:
        record = replace(record, state=replace(record.state, status="finished"))
    records.write_trial(folder, record)
    if kept:
        (folder / trial).write(BEST_PREDICTIONS, predictions_to_bytes(kept))


def cut(folder: Storage, name: str) -> None:
    """Leave only the first half of a file, as a crash or a full disk does."""
    content = folder.read(name)
    assert content
    folder.write(name, content[: len(content) // 2])


LR_OF_BEST = 0.03
"""Where the mIoU of the sampled search peaks; ten times off it loses six points."""

STUDY: dict[str, Any] = {
    "name": "sampled search",
    "url": "postgresql://me:***@host/studies",
    "sampler": "tpe",
    "objectives": ["miou"],
    "warm_start": [],
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


def ended(spec: TrialSpec, miou: float, *, status: Status = "finished", latency_ms: float | None = None) -> TrialState:
    """Return the state of a trial that came to `miou`; stopped or diverged, after two of three epochs."""
    waiting = TrialState.of_run(spec.trial, spec.run, latency_ms=latency_ms)
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
    **changes: Any,
) -> Storage:
    """Write a sampled search: two declared rows, `trials` in all, one stopped in five, one diverged, one failed.

    At fresh seeds the best sampled trial leads both rows by about `gain_on_fresh`. `changes` are of the manifest.
    """
    fields = {
        "name": "sampled search",
        "config": CONFIG | {"space": "around", "limits": {"trials": trials or None}},
        "space": {"title": "Around two rows", "baseline": "r01", "measured_share": 0.1},
        "study": STUDY | {"objectives": ["miou", "latency"] if latency else ["miou"]},
        "trials": {},
    }
    folder = begin(place, **(fields | changes))
    states = [_write_sample(folder, index, number=known + index, latency=latency) for index in range(trials)]
    best_first = sorted(states[2:], key=lambda state: (state.status != "finished", -(state.best_miou or 0)))
    for seed in range(1, fresh_seeds + 1):
        gains = {best_first[0].run: gain_on_fresh + 0.1 * seed, "r01": 0.0, "r02": 0.1}
        states += [_write_fresh(folder, name, seed, miou=50 + gain) for name, gain in gains.items()]
    earlier = []
    for number in range(known):
        spec = suggested(f"t{number:04d}", "sampled", number=number, params=point(number))
        state, history = ended(spec, miou_at(spec.params)), tuple(epochs(miou_at(spec.params)))
        source = f"s3://bucket/earlier/{spec.trial}"
        earlier.append(TrialRecord(spec=spec, state=state, epochs=history, source=source))
    if earlier:
        records.write_known(folder, tuple(earlier))
    folder.write(TRIALS, to_json(SavedState(states=tuple(states))))
    return folder


def _write_sample(folder: Storage, index: int, *, number: int, latency: bool) -> TrialState:
    params = point(number)
    trial = f"r{index + 1:02d}" if index < 2 else f"t{number:04d}"
    spec = suggested(trial, "row" if index < 2 else "sampled", number=number, params=params)
    ends: dict[int, Status] = {3: "diverged", 5: "failed"}
    status: Status = ends.get(index, "stopped" if index > 6 and index % 5 == 0 else "finished")
    milliseconds = 10 + 2 * (number % 7) + 0.1 * number if latency and status == "finished" else None
    state = ended(spec, miou_at(params), status=status, latency_ms=milliseconds)
    history = epochs(miou_at(params), state.epochs)
    write_trial(folder, trial, history, best(len(trial)) if history else None, spec=spec, state=state)
    return state


def _write_fresh(folder: Storage, name: str, seed: int, *, miou: float) -> TrialState:
    spec = suggested(f"{name}-s{seed}", "confirm", number=None, params={}, name=name, seed=seed)
    write_trial(folder, spec.trial, epochs(miou), best(len(spec.trial)), spec=spec)
    return ended(spec, miou)
