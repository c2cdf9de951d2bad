"""TensorBoard's table of hyper-parameters, one for a whole search."""

import io
import logging
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Final, Literal, Self, Union, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tune_bisenet.config import Run
from tune_bisenet.data.classes import CLASS_NAMES, VOID, palette
from tune_bisenet.records import Epoch
from tune_bisenet.storage import Storage, StorageError

_log = logging.getLogger(__name__)

HParam = float | bool | str
Ending = Literal["finished", "stopped", "diverged"]
"""The ends that last. A failure is none: the trial may be tried again, and TensorBoard keeps the first end it meets."""

METRICS: Final = (
    ("best_miou", "best mIoU in %", api_pb2.DATASET_VALIDATION),
    ("miou", "last mIoU in %", api_pb2.DATASET_VALIDATION),
    ("loss/total", "last loss", api_pb2.DATASET_TRAINING),
)
"""Tag, title and data set. The table shows each tag's last value, so the best mIoU is a scalar of its own."""

TRIPTYCH_HEIGHT: Final = 256
"""Pixels at most: at full size, ten runs with four pictures an epoch would leave some 2 GB of event files."""

GAP: Final = 4
"""White pixels between the pictures of a triptych."""


# --- one trial --------------------------------------------------------------------------------------------------


class TrialWriter:
    """The event file of one trial, whose steps are epochs; a context manager that closes it.

    `completed_epochs` is where the trial resumes, 0 for a new one: what an earlier writer left of later epochs is
    purged in the reader's eyes. Left without `end`, as by an error or a kill, the trial's session stays open.
    """

    def __init__(self, logdir: Path, *, run: Run, trial: str, completed_epochs: int) -> None:
        logdir.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(_next_event_file(logdir).open("xb"))
        self._epoch = completed_epochs
        # A reader takes the first START of a folder for its beginning and purges only at later ones: always write it.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(0, file_version="brain.Event:2")
        self._write(completed_epochs + 1, session_log=start)
        self._write(0, summary=_session_start(run, trial))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._records.close()

    def add_epoch(self, epoch: Epoch, *, best_miou: float) -> None:
        """Write all scalars of an epoch as one record, on disk when this returns. `best_miou` in percent, so far."""
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars(epoch, best_miou=best_miou).items()
        ]
        self._epoch = epoch.epoch
        self._write(epoch.epoch, summary=summary_pb2.Summary(value=values))

    def add_triptychs(self, step: int, pictures: list[tuple[str, NDArray[np.uint8]]]) -> None:
        """Write named RGB pictures, uint8 (H, W, 3), under `pictures/NAME`."""
        values = [summary_pb2.Summary.Value(tag=f"pictures/{name}", image=_png(picture)) for name, picture in pictures]
        self._write(step, summary=summary_pb2.Summary(value=values))

    def end(self, status: Ending) -> None:
        """Close the trial's session in the HParams table; to be called once, when no retry can follow."""
        self._write(self._epoch, summary=_session_end(status))

    def _write(self, step: int, **content: Any) -> None:
        event = event_pb2.Event(step=step, wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())
        self._records.flush()


def scalars(epoch: Epoch, *, best_miou: float) -> dict[str, float]:
    """What is plotted of an epoch, by tag; a class without pixels is left out. mIoU, IoU and accuracy in percent."""
    iou = {f"iou/{name}": value for name, value in zip(CLASS_NAMES, epoch.iou, strict=True) if value is not None}
    return {
        "loss/total": epoch.loss,
        "loss/main": epoch.loss_main,
        "loss/aux1": epoch.loss_aux1,
        "loss/aux2": epoch.loss_aux2,
        "lr": epoch.lr,
        "grad_norm": epoch.grad_norm,
        "miou": epoch.miou,
        "best_miou": best_miou,
        "pixel_accuracy": epoch.pixel_accuracy,
        "speed/images_per_second": epoch.images_per_second,
        "speed/epoch_seconds": epoch.seconds,
    } | iou


def _next_event_file(logdir: Path) -> Path:
    """A name that sorts after all event files in `logdir`, even if this node's clock is behind the last writer's."""
    stamps = [int(found[1]) for path in logdir.iterdir() if (found := re.search(r"\.tfevents\.(\d+)", path.name))]
    stamp = max([int(time.time()), *(earlier + 1 for earlier in stamps)])
    return logdir / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


# --- the table of hyper-parameters ------------------------------------------------------------------------------


def write_hparams_table(logdir: Path, trials: Mapping[str, Run]) -> None:
    """Write the HParams schema of a search into its folder: a column for every field of every row, and the metrics.

    Written anew on each call and replaced atomically, so a restored search may call it again.
    """
    rows = [hparams(run) for run in trials.values()]
    experiment = api_pb2.Experiment(
        hparam_infos=[_column(name, rows) for name in dict.fromkeys(name for row in rows for name in row)],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title, dataset_type=dataset)
            for tag, title, dataset in METRICS
        ],
        time_created_secs=time.time(),
    )
    summary = _hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment)
    logdir.mkdir(parents=True, exist_ok=True)
    unfinished = logdir / ".experiment.partial"
    with unfinished.open("wb") as file:
        records = RecordWriter(file)
        for event in (
            event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"),
            event_pb2.Event(wall_time=time.time(), summary=summary),
        ):
            records.write(event.SerializeToString())
    unfinished.replace(logdir / "events.out.tfevents.0000000000.experiment")


def hparams(run: Run) -> dict[str, HParam]:
    """A row's line of the table, by dotted name: all that decides what is trained, and the row's name.

    A field of another variant, as AdamW's momentum, is absent, and TensorBoard leaves its cell empty. A field that
    may be None holds text in all rows ("none", "5"): a worker sees only its own row, so a column's kind must follow
    from the field's type, or numbers and words would meet in one column. What is expected of a row is left out.
    """
    kinds = column_kinds(Run)
    row = _flatten(run.model_dump(mode="json", exclude={"expect"}))
    return {name: _text(value) if kinds[name] is str else value for name, value in row.items()}


def column_kinds(model: type[BaseModel], prefix: str = "") -> dict[str, type[HParam]]:
    """float, bool or str for every leaf field of a model, its unions' variants included, by dotted name."""
    kinds: dict[str, type[HParam]] = {}
    for name, field in model.model_fields.items():
        members = _union_members(field.annotation)
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel):
                found = column_kinds(member, f"{prefix}{name}.")
            else:
                found = {prefix + name: _leaf_kind(member) if len(members) == 1 else str}
            for column, kind in found.items():
                kinds[column] = kind if kinds.get(column, kind) is kind else str
    return kinds


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _leaf_kind(annotation: Any) -> type[HParam]:
    if annotation is bool:
        return bool
    return float if annotation in (int, float) else str


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _text(value: str | float | list[int] | None) -> str:
    match value:
        case None:
            return "none"
        case list():
            return "x".join(map(str, value))
        case str():
            return value
        case _:
            return f"{value:g}"


def _column(name: str, rows: list[dict[str, HParam]]) -> Any:
    """The `HParamInfo` of one column: its type, its values, and whether rows differ in it (those come first)."""
    values = {row.get(name) for row in rows}
    known = sorted(value for value in values if value is not None)
    kind = column_kinds(Run)[name]
    column = api_pb2.HParamInfo(name=name, differs=len(values) > 1)
    if kind is float:
        column.type = api_pb2.DATA_TYPE_FLOAT64
        column.domain_interval.min_value, column.domain_interval.max_value = known[0], known[-1]
    else:
        column.type = api_pb2.DATA_TYPE_BOOL if kind is bool else api_pb2.DATA_TYPE_STRING
        column.domain_discrete.extend(known)
    return column


def _session_start(run: Run, trial: str) -> Any:
    info = plugin_data_pb2.SessionStartInfo(group_name=trial, start_time_secs=time.time())
    for name, value in hparams(run).items():
        cell = info.hparams[name]
        match value:
            case bool():
                cell.bool_value = value
            case str():
                cell.string_value = value
            case _:
                cell.number_value = value
    return _hparams_summary(metadata.SESSION_START_INFO_TAG, session_start_info=info)


def _session_end(status: Ending) -> Any:
    good = status in ("finished", "stopped")
    info = plugin_data_pb2.SessionEndInfo(
        status=api_pb2.STATUS_SUCCESS if good else api_pb2.STATUS_FAILURE, end_time_secs=time.time()
    )
    return _hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _hparams_summary(tag: str, **content: Any) -> Any:
    """A summary that the HParams plugin reads: all its content is metadata, its tensor is empty."""
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    value = summary_pb2.Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
    return summary_pb2.Summary(value=[value])


# --- pictures ---------------------------------------------------------------------------------------------------


def triptych(image: NDArray[np.uint8], label: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Picture, label and prediction side by side in the Cityscapes colours: RGB uint8 (h, 3 w + 2 GAP, 3).

    `image` is RGB (3, H, W), `label` and `prediction` hold trainIds, (h, w) each at a resolution of its own; all are
    brought to the image's size, or to TRIPTYCH_HEIGHT where that is smaller. Void is black. The prediction is black
    wherever the label is void: nothing is scored there, so whatever differs between the two panels is an error.
    """
    height, width = image.shape[1:]
    shrink = min(1.0, TRIPTYCH_HEIGHT / height)
    size = (math.ceil(width * shrink), math.ceil(height * shrink))  # Pillow's order: width, height
    picture = np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize(size, Image.Resampling.BOX))
    truth, guess = (
        np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST)) for ids in (label, prediction)
    )
    scored = np.where(truth == VOID, np.uint8(VOID), guess)
    gap = np.full((size[1], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([picture, gap, palette()[truth], gap, palette()[scored]], axis=1)


def _png(picture: NDArray[np.uint8]) -> Any:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    height, width = picture.shape[:2]
    return summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())


SECONDS_BETWEEN_BOARDS: Final = 30.0
"""TensorBoard's table is written anew for each trial that a study adds, but not more often."""


class HParamsTable:
    """TensorBoard's table of hyper-parameters in the search's folder, which grows with the search."""

    def __init__(self, folder: Storage, runs: Mapping[str, Run]) -> None:
        self._folder = folder
        self._runs = dict(runs)
        self._written_at = -SECONDS_BETWEEN_BOARDS
        self._is_due = bool(runs)

    def add(self, trial: str, run: Run) -> None:
        if trial not in self._runs:
            self._runs[trial] = run
            self._is_due = True
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_BOARDS:
            self.write()

    def write(self) -> None:
        """Bring the file up to date, if it is not."""
        if not self._is_due:
            return
        self._written_at = time.monotonic()
        try:
            self._write()
            self._is_due = False
        except StorageError as error:
            _log.warning("TensorBoard's table is written later: %s", error)

    def _write(self) -> None:
        if self._folder.local_path is not None:
            write_hparams_table(self._folder.local_path, self._runs)
            return
        with tempfile.TemporaryDirectory() as place:
            write_hparams_table(Path(place), self._runs)
            for path in Path(place).iterdir():
                self._folder.hurried().write(path.name, path.read_bytes())
