"""The Ray edge of one trial: a plain dict becomes a `Run`, epochs become reports, and storage is where it goes on.

A trial's folder is the whole truth about it. Whatever killed a trial, a worker or a driver, the next attempt finds
`last.pt` there and goes on; Tune's own checkpoints are not used (docs/decisions/0001-storage-is-the-state.md).
"""

import faulthandler
import json
import logging
import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ray import tune

from tune_bisenet import records
from tune_bisenet.config import Run, TrialContext, format_size
from tune_bisenet.data.catalog import open_source
from tune_bisenet.data.packed import Packed, open_packed
from tune_bisenet.data.packing import fetch, prepare
from tune_bisenet.records import EPOCHS, LATENCY, Epoch, best_of
from tune_bisenet.storage import Storage, patience_seconds
from tune_bisenet.training import benchmark, checkpoint, engine
from tune_bisenet.training.engine import EpochEnd, Training
from tune_bisenet.training.tensorboard import TrialWriter, triptych

_log = logging.getLogger(__name__)

NUM_PICTURED_EPOCHS: Final = 8
"""How often, in all, validation pictures are written."""

FIRST_EPOCH_DEADLINE_SECONDS: Final = 4 * 3600.0
DEADLINE_FACTOR: Final = 20.0
MIN_DEADLINE_SECONDS: Final = 600.0


def train_trial(config: dict[str, Any], *, job: dict[str, Any]) -> None:
    """Tune's function trainable. `config["run"]` is a `Run` and `job` a `Job`, both as plain dicts."""
    _check_shared(Storage.at(job["storage"]))
    run_trial(Run.model_validate(config["run"]), TrialContext.model_validate(job), report=tune.report)


def _check_shared(search: Storage) -> None:
    """ValueError if this node does not see the search's folder: it would write to a disk of its own."""
    if search.local_path is not None and not search.exists():
        raise ValueError(
            f"this node does not see {search.path}: on several machines --storage must be a URI, such as "
            "s3://bucket/searches, or a path that all of them share."
        )


def run_trial(run: Run, job: TrialContext, *, report: Callable[[dict[str, Any]], None]) -> None:
    """Train `run` from where its folder left off to its end, reporting each epoch after it is safe on storage."""
    folder = Storage.at(job.storage) / job.trial_name(run)
    folder.make()
    training, data = _begin(run, job)
    identity = job.identity(run)
    history = checkpoint.resume(training, folder, identity=identity)
    latency_ms = _latency_ms(training, folder) if job.measures_latency else None
    with ExitStack() as stack:
        tracker = stack.enter_context(_Board(folder, run=run, job=job, completed_epochs=len(history)))
        stack.callback(faulthandler.cancel_dump_traceback_later)
        if history:  # the driver may have died before it heard of this epoch
            report(result_of(history, latency_ms=latency_ms))
        _die_if_hung(history)
        for end in engine.fit(training):
            history.append(end.epoch)
            _keep(training, end, history, data, folder, identity=identity)
            tracker.add(end, history, data)
            report(result_of(history, latency_ms=latency_ms))
            if end.epoch.diverged:
                return
            _die_if_hung(history)
        tracker.finish()


def result_of(history: list[Epoch], *, latency_ms: float | None) -> dict[str, Any]:
    """What Tune, its scheduler and the leaderboard are told: the last epoch, and the best so far. mIoU never lacks.

    `latency_ms` are the milliseconds of one prediction, None where they are not measured.
    """
    best = best_of(history)
    return asdict(history[-1]) | {
        "diverged": history[-1].diverged,
        "best_miou": best.miou,
        "best_epoch": best.epoch,
        "total_seconds": sum(epoch.seconds for epoch in history),
        "latency_ms": latency_ms,
    }


def _begin(run: Run, job: TrialContext) -> tuple[Training, Packed]:
    torch.set_num_threads(job.cpus_per_trial)
    torch.backends.cudnn.benchmark = True  # crops and batches keep their size
    data = _open_data(run, job)
    training = engine.begin(
        run,
        data,
        device=torch.device("cuda" if job.use_gpu else "cpu"),
        precision=job.precision,
        backbone=checkpoint.load_backbone(job.backbone),
    )
    return training, data


def _open_data(run: Run, job: TrialContext) -> Packed:
    """This node's pack of the data; fetched or packed now if it has none. ValueError if it is not the driver's data."""
    size = format_size(run.image_size)
    pack = Path(job.packs[size])
    if pack.exists():
        data = open_packed(pack)
    else:
        data = _fetched(pack.name, job) or prepare(
            open_source(job.data), image_size=run.image_size, cache_dir=Path(job.cache_dir)
        )
    if data.digest != job.data_digests[size]:
        raise ValueError(
            f"{job.data} holds other frames on this node (digest {data.digest}) than where the search was started "
            f"({job.data_digests[size]}). Give every node the same data."
        )
    return data


def _fetched(key: str, job: TrialContext) -> Packed | None:
    if job.shared_packs is None:
        return None
    return fetch(key, shared=Storage.at(job.shared_packs), cache_dir=Path(job.cache_dir))


def _latency_ms(training: Training, folder: Storage) -> float:
    """Milliseconds of one prediction: those that an earlier attempt has measured, if there was one."""
    content = folder.read(LATENCY)
    if content is not None:
        try:
            return benchmark.Latency.from_json(json.loads(content)).median_ms
        except ValueError as error:
            _log.warning("%s/%s is damaged, so latency is measured anew: %s", folder.path, LATENCY, error)
    measured = benchmark.measure_latency(training.run, device=training.device, precision=training.precision)
    folder.write(LATENCY, json.dumps(measured.to_json()).encode())
    return measured.median_ms


def _keep(
    training: Training, end: EpochEnd, history: list[Epoch], data: Packed, folder: Storage, *, identity: str
) -> None:
    """Put the epoch on storage. Weights that are no longer numbers never replace good ones."""
    if not end.epoch.diverged and _are_numbers(training.model):
        if best_of(history) is end.epoch:
            checkpoint.save_best(training, end.epoch, folder, identity=identity)
            folder.write(records.BEST_PREDICTIONS, records.predictions_to_bytes(_best(end, data)))
        checkpoint.save(training, history, folder, identity=identity)
    folder.write(EPOCHS, json.dumps([epoch.to_json() for epoch in history]).encode())


def _are_numbers(model: torch.nn.Module) -> bool:
    """Whether all weights and running statistics are finite: an epoch's last step may break them unseen by its loss."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def _die_if_hung(history: list[Epoch]) -> None:
    """(Re)arm a timer that ends this process, with a traceback, if an epoch takes absurdly long: Ray never notices.

    Waiting for storage that is away is not absurd.
    """
    seconds = FIRST_EPOCH_DEADLINE_SECONDS
    if history:
        seconds = max(MIN_DEADLINE_SECONDS, DEADLINE_FACTOR * max(epoch.seconds for epoch in history))
    faulthandler.dump_traceback_later(seconds + patience_seconds(), exit=True)


class _Board:
    """The trial's TensorBoard files in its folder; in object storage, copied there after every epoch.

    A copy that fails costs nothing: the next one has all of it.
    """

    def __init__(self, folder: Storage, *, run: Run, job: TrialContext, completed_epochs: int) -> None:
        self._run = run
        self._folder = folder.hurried()
        self._stack = ExitStack()
        self._mirrored = folder.local_path is None
        logdir = folder.local_path or Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._logdir = logdir
        self._tracker = self._stack.enter_context(
            TrialWriter(logdir, run=run, trial=job.trial_name(run), completed_epochs=completed_epochs)
        )

    def __enter__(self) -> "_Board":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is SystemExit:  # how Tune stops a trial
            self._tracker.end("stopped")
            self._mirror()
        self._stack.close()

    def add(self, end: EpochEnd, history: list[Epoch], data: Packed) -> None:
        self._tracker.add_epoch(end.epoch, best_miou=best_of(history).miou)
        interval = math.ceil(self._run.num_epochs / NUM_PICTURED_EPOCHS)
        if end.epoch.epoch % interval == 0 or end.epoch.epoch == self._run.num_epochs:
            self._tracker.add_triptychs(end.epoch.epoch, _triptychs(end, data))
        if end.epoch.diverged:
            self._tracker.end("diverged")
        self._mirror()

    def finish(self) -> None:
        self._tracker.end("finished")
        self._mirror()

    def _mirror(self) -> None:
        if not self._mirrored:
            return
        try:
            for path in self._logdir.iterdir():
                self._folder.write(path.name, path.read_bytes())
        except OSError as error:
            _log.warning("TensorBoard's files are not copied before the next epoch: %s", error)


def _best(end: EpochEnd, data: Packed) -> records.BestPredictions:
    split, indices = data.val, list(end.samples)
    return records.BestPredictions(
        confusions=end.confusion.numpy().astype(np.int32),
        names=tuple(split.names[index] for index in indices),
        images=np.stack([split.images[index] for index in indices]),
        labels=np.stack([split.labels[index] for index in indices]),
        predictions=np.stack([prediction.numpy() for prediction in end.samples.values()]),
    )


def _triptychs(end: EpochEnd, data: Packed) -> list[tuple[str, Any]]:
    split = data.val
    return [
        (split.names[index], triptych(split.images[index], split.labels[index], prediction.numpy()))
        for index, prediction in end.samples.items()
    ]
