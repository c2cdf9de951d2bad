"""One trial in a worker: Tune's config becomes a `TrialSpec`, epochs become reports, and storage holds the state.

A trial's folder is the whole truth about it. Whatever killed a trial, a worker or a driver, the next attempt resumes
from the newest state there; Tune's own checkpoints are not used (docs/decisions/0001-storage-is-the-state.md).
"""

import faulthandler
import logging
import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from ray import tune

from tune_bisenet.config import Run, TrialContext, format_size
from tune_bisenet.data.packed import DamagedPackError, Packed
from tune_bisenet.data.packing import fetch_packed, open_source, prepare_packed
from tune_bisenet.data.source import frame_group
from tune_bisenet.options import problems_of
from tune_bisenet.records import (
    BEGINNINGS,
    BEST_PREDICTIONS,
    Beginning,
    BestPredictions,
    Environment,
    Epoch,
    TrialRecord,
    TrialSpec,
    add_environment,
    best_of,
    from_plain,
    predictions_to_bytes,
    read_sound_trial,
    write_trial,
)
from tune_bisenet.search.failures import FAILURE, LACKS, STACK_SIGNAL, WARNING
from tune_bisenet.storage import Storage, is_refused
from tune_bisenet.training import benchmark, checkpoint, engine
from tune_bisenet.training.checkpoint import State
from tune_bisenet.training.engine import EpochEnd, Training
from tune_bisenet.training.tensorboard import NUM_PICTURED_EPOCHS, TrialWriter, triptych

KEPT_ASIDE: Final = ("cuda",)
"""The kinds of devices whose epochs are kept while the next one is trained: on a CPU the two would share its cores."""

_log = logging.getLogger(__name__)


def train_trial(config: dict[str, Any], *, context: dict[str, Any]) -> None:
    """Tune's function trainable. `config` is a `TrialSpec` and `context` a `TrialContext`, both as plain dicts.

    What would fail again at each try is reported, not raised.
    """
    faulthandler.register(STACK_SIGNAL)
    try:
        search = Storage.at(context["storage"])
        if search.local_path is not None and not search.exists():  # this node would write to a disk of its own
            raise ValueError(
                f"this node does not see {search.path}: on several machines --storage must be a URI, such as "
                "s3://bucket/searches, or a path that all of them share."
            )
        run_trial(from_plain(TrialSpec, config), TrialContext.model_validate(context), report=tune.report)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        tune.report(_describe_failure(error))


def _describe_failure(error: OSError | ValueError | MemoryError | RuntimeError) -> dict[str, Any]:
    """Return the report of a failure that a retry cannot mend, or only with more memory; raise any other again."""
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    if isinstance(cause, OSError) and is_refused(cause):
        report = {FAILURE: str(cause), LACKS: "access"}
    elif isinstance(error, ValueError) and not isinstance(cause, OSError):  # a network or disk may mend
        report = {FAILURE: "\n".join(problems_of(error))}
    elif isinstance(error, torch.OutOfMemoryError):
        report = {FAILURE: str(error), LACKS: "GPU memory"}
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        report = {FAILURE: str(error), LACKS: "memory"}
    else:
        raise error
    _log.exception("The trial has failed.")
    return report


def run_trial(spec: TrialSpec, context: TrialContext, *, report: Callable[[dict[str, Any]], None]) -> None:
    """Train a trial from where its folder left off to its end, reporting each epoch after it is safe in storage.

    If packed frames are found damaged, the epoch that read them is lost, and it resumes on frames packed again.
    """
    folder = Storage.at(context.storage) / spec.trial
    folder.make()
    folder.remove_partial_files()
    torch.set_num_threads(context.threads_per_trial)
    choose_kernels(deterministic=context.deterministic)
    warnings: list[str] = []

    def report_with_warnings(result: dict[str, Any]) -> None:
        report(result | {WARNING: " ".join(warnings)} if warnings else result)
        warnings.clear()

    epochs_before = -1
    while True:
        data = _open_data(spec, context)
        if data.replaced and not warnings:
            warnings.append(f"{data.replaced}. They were packed again.")
        try:
            return _train_on(data, spec, context, report=report_with_warnings, warn=warnings.append)
        except DamagedPackError as damage:
            record = read_sound_trial(folder)
            num_epochs = len(record.epochs) if record else 0
            if num_epochs == epochs_before:  # damaged twice within an epoch: the cache does not keep what is written
                raise
            warnings[:] = [f"{damage}. They were packed again, and its epoch {num_epochs + 1} was started over."]
            epochs_before = num_epochs


def choose_kernels(*, deterministic: bool) -> None:
    """Let a GPU use the fastest kernels, found by trial as crops and batches keep their size, or repeatable ones alone.

    To be called before anything is computed on a GPU. A kernel that is not repeatable then raises RuntimeError.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it once
    torch.use_deterministic_algorithms(deterministic, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # ours is written first
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def _train_on(
    data: Packed,
    spec: TrialSpec,
    context: TrialContext,
    *,
    report: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
) -> None:
    """Train a trial from where its folder left off; what `warn` is told goes with the next report.

    Raises DamagedPackError if `data` no longer are what they were.
    """
    search = Storage.at(context.storage)
    folder = search / spec.trial
    device = torch.device("cuda" if context.gpu_share else "cpu")
    environment = _current_environment(device)
    if context.precision == "bf16" and not engine.supports_bf16(device):
        raise ValueError(
            f"{environment.device} has no bf16 instructions, and this search trains in bf16. Leave such nodes out, or "
            "start another search with --precision fp32."
        )
    if context.step == "graph" and device.type == "cpu":
        raise ValueError(
            "this search trains by CUDA graphs (--step graph), and trials train on a CPU here. Leave such nodes out, "
            "or start another search without that flag."
        )
    if device.type == "cuda":  # so that no trial takes the memory of those beside it
        torch.cuda.set_per_process_memory_fraction(context.gpu_share)
    backbone = checkpoint.load_backbone(context.backbone)
    training = engine.begin(
        spec.run,
        data,
        device=device,
        precision=context.precision,
        backbone=backbone,
        frames_room=_frames_room(spec.run, context, device, num_classes=len(data.classes)),
        step=context.step,
    )
    identity = context.identity(spec.run)
    history = checkpoint.resume(training, folder, identity=identity)
    earlier = read_sound_trial(folder)
    is_resumed = bool(history)
    known = earlier if is_resumed else _take_over(training, spec, context)
    history = history or list(known.epochs if known else ())
    environments = known.environments if known else ()
    if len(history) < spec.run.num_epochs or not environments:
        environments = add_environment(environments, environment, epochs_done=len(history))
    beginning = known.beginning if known else None
    latency = earlier.latency if earlier else None
    if latency is None and context.measures_latency:
        latency = benchmark.measure_latency(
            training.run,
            device=device,
            precision=training.precision,
            num_classes=len(training.classes),
            step=context.step,
        )
    record = partial(TrialRecord.of_spec, spec, latency=latency, environments=environments, beginning=beginning)
    write_trial(search, record(history))
    num_written = len(history) if is_resumed else 0
    writer = TrialWriter(folder, run=spec.run, trial=spec.trial, completed_epochs=num_written, classes=data.classes)

    def keep(state: State, end: EpochEnd, epochs: Sequence[Epoch]) -> dict[str, Any]:
        # First: what TensorBoard has of an epoch that is not saved is passed over once the trial resumes.
        _log_epoch(writer, end, epochs, data, num_epochs=spec.run.num_epochs)
        _save_epoch(state, end, epochs, data, spec, context)
        write_trial(search, record(epochs))
        return make_report(record(epochs))

    keeps_aside = device.type in KEPT_ASIDE
    with writer, _Aside(report) as aside:
        for epoch in history[num_written:]:
            writer.add_epoch(epoch, best=best_of(history[: epoch.epoch]))
        writer.flush()
        if history:  # the driver may have died before it heard of this epoch
            report(make_report(record(history)))
        for end in engine.fit(training, between=aside.poll):
            aside.finish()
            history = [*history, end.epoch]
            if (reason := training.stepper.eager_because) and not environments[-1].eager:
                warn(f"Its kernels are launched one by one instead of as a CUDA graph: {reason}.")
                environments = (*environments[:-1], replace(environments[-1], eager=reason))
                record = partial(record, environments=environments)
            state = checkpoint.state_of(training)
            if keeps_aside:
                aside.start(partial(keep, state.copied(), end, history))
            else:
                report(keep(state, end, history))
            if end.epoch.diverged:
                break
        aside.finish()
        if not history[-1].diverged:
            writer.end("finished")


class _Aside:
    """Keeps an epoch in a thread while the next one is trained, and reports it once it is kept; one at a time.

    `poll` and `finish` report, in the trial's own thread, and raise what keeping raised.
    """

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report = report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._keeping: Future[dict[str, Any]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Wait for what is being written: after an error the next attempt reads it."""
        self._pool.shutdown()

    def start(self, keep: Callable[[], dict[str, Any]]) -> None:
        """Begin to keep an epoch. The one before must be finished."""
        assert self._keeping is None
        self._keeping = self._pool.submit(keep)

    def poll(self) -> None:
        """Report the epoch that has been kept, if one has."""
        if self._keeping and self._keeping.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the epoch is kept, and report it."""
        if self._keeping:
            result, self._keeping = self._keeping.result(), None
            self._report(result)


def _frames_room(run: Run, context: TrialContext, device: torch.device, *, num_classes: int) -> int:
    """Return the bytes of a GPU that frames may take: the trial's share of it less what training takes."""
    if device.type == "cpu":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    return int(context.gpu_share * total) - benchmark.gpu_bytes(run, context.precision, num_classes)


def make_report(record: TrialRecord) -> dict[str, Any]:
    """Return what Tune is told after an epoch: its measurements, and the trial's so far."""
    last = record.epochs[-1]
    return asdict(last) | {"diverged": last.diverged} | record.measured


def _take_over(training: Training, spec: TrialSpec, context: TrialContext) -> TrialRecord | None:
    """Let a trial begin where another left what they have in common; None if no state of that was kept."""
    search = Storage.at(context.storage)
    for epoch in reversed(context.shared_epochs(spec.run)):
        kept_identity = context.beginning_identity(spec.run)
        other, history = checkpoint.load_beginning(
            training,
            search / spec.trial,
            _kept_beginning(search, kept_identity, epoch),
            identity=context.identity(spec.run),
            kept_identity=kept_identity,
        )
        if history:
            trained = read_sound_trial(search / other)
            environments = trained.environments if trained else ()
            beginning = None if other == spec.trial else Beginning(trial=other, epochs=epoch)
            return TrialRecord.of_spec(spec, history, environments=environments, beginning=beginning)
    return None


def _kept_beginning(search: Storage, identity: str, epoch: int) -> Storage:
    return search / BEGINNINGS / f"{identity}-{epoch}"


def _open_data(spec: TrialSpec, context: TrialContext) -> Packed:
    """Return this node's pack of the data, fetched or packed if it has none. ValueError if the driver's data differ."""
    size = format_size(spec.run.image_size)
    cache_dir = Path(context.cache_dir)
    shared = Storage.at(context.shared_packs) if context.shared_packs else None
    data = fetch_packed(Path(context.packs[size]).name, shared=shared, cache_dir=cache_dir)
    if data is None:
        data = prepare_packed(open_source(context.data), image_size=spec.run.image_size, cache_dir=cache_dir)
    if data.digest != context.data_digests[size]:
        raise ValueError(
            f"{context.data} holds other frames on this node (digest {data.digest}) than where the search was started "
            f"({context.data_digests[size]}). Give every node the same data."
        )
    return data


def _current_environment(device: torch.device) -> Environment:
    """Return what this process trains in, after torch's threads are set."""
    on_gpu = device.type == "cuda"
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return Environment(
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU {model[1]}" if model else "CPU",
        torch=torch.__version__,
        cuda=torch.version.cuda if on_gpu else None,
        numpy=np.__version__,
        python=platform.python_version(),
    )


def _save_epoch(
    state: State, end: EpochEnd, history: Sequence[Epoch], data: Packed, spec: TrialSpec, context: TrialContext
) -> None:
    """Write the epoch's state. Weights that are no longer numbers never replace good ones."""
    if end.epoch.diverged:
        return
    search = Storage.at(context.storage)
    folder, identity = search / spec.trial, context.identity(spec.run)
    if best_of(history) is end.epoch:
        checkpoint.save_best(state, end.epoch, folder, identity=identity)
        split, indices = data.val, list(end.samples)
        best = BestPredictions(
            confusions=end.confusion.numpy().astype(np.int32),
            groups=tuple(map(frame_group, split.names)),
            names=tuple(split.names[index] for index in indices),
            images=np.stack([split.images[index] for index in indices]),
            labels=_stacked([split.labels[index] for index in indices], data.image_size),
            predictions=_stacked([prediction.numpy() for prediction in end.samples.values()], data.image_size),
        )
        folder.write(BEST_PREDICTIONS, predictions_to_bytes(best))
    if end.epoch.epoch in context.shared_epochs(spec.run):
        kept_identity = context.beginning_identity(spec.run)
        kept = _kept_beginning(search, kept_identity, end.epoch.epoch)
        checkpoint.save_beginning(state, history, folder, kept, trial=spec.trial, identity=kept_identity)
    checkpoint.save(state, history, folder, identity=identity)


def _stacked(labels: Sequence[NDArray[np.uint8]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return labels S x h x w; those of different sizes are resized to `size`, as people only look at them."""
    if len({label.shape for label in labels}) > 1:
        height, width = size
        nearest = Image.Resampling.NEAREST
        labels = [np.asarray(Image.fromarray(label).resize((width, height), nearest)) for label in labels]
    return np.stack(labels)


def _log_epoch(writer: TrialWriter, end: EpochEnd, history: Sequence[Epoch], data: Packed, *, num_epochs: int) -> None:
    """Write an epoch's scalars for TensorBoard, now and then with pictures."""
    epoch = end.epoch.epoch
    writer.add_epoch(end.epoch, best=best_of(history))
    if epoch % math.ceil(num_epochs / NUM_PICTURED_EPOCHS) == 0 or epoch == num_epochs:
        names, images, labels = data.val.names, data.val.images, data.val.labels
        pictures = [
            (names[index], triptych(images[index], labels[index], prediction.numpy(), data.classes))
            for index, prediction in end.samples.items()
        ]
        writer.add_triptychs(epoch, pictures)
    if end.epoch.diverged:
        writer.end("diverged")
    writer.flush()
