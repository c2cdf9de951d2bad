"""Train one row without Ray, as in a notebook: find the data and the device, and let the engine do the work."""

from collections.abc import Iterator
from os import PathLike, fspath
from typing import Literal

import torch

from tune_bisenet.config import Precision, Run
from tune_bisenet.data.packing import check_labels, default_cache_dir, open_source, prepare_packed
from tune_bisenet.options import NO_BACKBONE, STREETS, InputError
from tune_bisenet.records import Epoch, best_of
from tune_bisenet.storage import Storage
from tune_bisenet.training import benchmark, checkpoint, engine

Device = Literal["auto", "cpu", "cuda"]


def choose_device(device: Device) -> torch.device:
    """Return a GPU if there is one and the CPU was not asked for. Raises InputError if there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here. Leave it out, or give cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def fit_run(
    run: Run,
    data: "str | PathLike[str]" = STREETS,
    *,
    device: Device = "auto",
    precision: Precision = "fp32",
    backbone: str = NO_BACKBONE,
    out: "str | PathLike[str] | None" = None,
) -> Iterator[Epoch]:
    """Train a row from its seed and yield each epoch's measurements; `tune_bisenet.fit` is this.

    `data` is `streets`, or a folder or URI in Cityscapes layout, and is packed into the cache. `backbone` is
    `imagenet`, `none`, or a file. The best epoch's weights are kept as `out`/best.pt, which `tune_bisenet.load` reads.
    An epoch that diverged is the last. Raises InputError for what cannot be used, before the first epoch.
    """
    place = choose_device(device)
    if precision == "bf16" and not engine.supports_bf16(place):
        raise InputError("precision bf16: this device has no instructions for it. Use fp32.")
    source = open_source(fspath(data))
    packed = prepare_packed(source, image_size=run.image_size, cache_dir=default_cache_dir())
    check_labels(source, packed)
    per_epoch = len(packed.train) // run.batch_size
    if run.schedule.warmup_iterations >= run.num_epochs * per_epoch:
        raise InputError(
            f"a warm-up of {run.schedule.warmup_iterations} iterations does not fit into {run.num_epochs} epochs of "
            f"{per_epoch} full batches: train longer, or give schedule=WarmupPoly(warmup_iterations=...)."
        )
    room = 0
    if place.type == "cuda":
        room = torch.cuda.get_device_properties(place).total_memory - benchmark.gpu_bytes(run, precision)
    training = engine.begin(
        run,
        packed,
        device=place,
        precision=precision,
        backbone=checkpoint.load_backbone(backbone),
        frames_room=max(room, 0),
    )
    folder = Storage.at(fspath(out)) if out is not None else None
    return _epochs(training, folder)


def _epochs(training: engine.Training, folder: Storage | None) -> Iterator[Epoch]:
    history: list[Epoch] = []
    for end in engine.fit(training):
        history.append(end.epoch)
        if folder and best_of(history) is end.epoch:
            folder.make()
            identity = training.run.fingerprint()
            checkpoint.save_best(checkpoint.state_of(training), end.epoch, folder, identity=identity)
        yield end.epoch
        if end.epoch.diverged:
            return
