"""What TensorBoard shows: the event file of each trial, and one table of hyper-parameters for the whole search."""

import io
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Final, Literal, Self, Union, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from tune_bisenet.classes import CITYSCAPES, VOID, ClassSet
from tune_bisenet.config import Run
from tune_bisenet.records import Epoch
from tune_bisenet.storage import Storage, StorageError

_log = logging.getLogger(__name__)

HParam = float | bool | str
SessionStatus = Literal["finished", "stopped", "diverged"]
"""The final ones. A failure is not: the trial may be retried, and TensorBoard keeps the first end that it reads."""

METRICS: Final = (
    ("best_miou", "best mIoU in %", api_pb2.DATASET_VALIDATION),
    ("miou", "last mIoU in %", api_pb2.DATASET_VALIDATION),
    ("loss/total", "last loss", api_pb2.DATASET_TRAINING),
)
"""Tag, title and data set. The table shows each tag's last value, so the best mIoU is a scalar of its own."""

TABLE_FILE: Final = "events.out.tfevents.0000000000.experiment"
TABLE_SECONDS: Final = 30.0  # the table is written again for each trial that a study adds, but not more often
NUM_PICTURED_EPOCHS: Final = 8
"""How often, in all, a trial's validation pictures are written."""
TRIPTYCH_HEIGHT: Final = 256
"""Pixels at most: at full size, ten runs with four pictures an epoch would leave some 2 GB of event files."""
GAP: Final = 4  # white pixels between the pictures of a triptych


class TrialWriter:
    """The event file of one trial, whose steps are epochs; a context manager for the time in which it is trained.

    `classes` are those that are scored. `completed_epochs` is where the trial resumes, 0 for a new one: TensorBoard
    ignores what an earlier writer left of later epochs. Without `end`, as after an error or a kill, the trial's session
    stays open. Records are kept until `flush` writes them, which waits for storage as everything does that is written
    to it.

    torch's SummaryWriter names its file by the second: resumed within one, or on a node whose clock is behind, it
    would be read before the file of the attempt that was killed, whose epochs would then replace its own. A disk that
    is full when it writes leaves it with half a record.
    """

    def __init__(
        self, folder: Storage, *, run: Run, trial: str, completed_epochs: int, classes: ClassSet = CITYSCAPES
    ) -> None:
        names = (re.search(r"\.tfevents\.(\d+)", info.base_name) for info in folder.infos())
        stamp = max([int(time.time()), *(int(name[1]) + 1 for name in names if name)])
        self._folder = folder
        self._classes = classes
        self._name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._content = io.BytesIO()
        self._records = RecordWriter(self._content)
        self._num_flushed = 0  # bytes
        self._epoch = completed_epochs
        self._write(0, file_version="brain.Event:2")
        # A reader takes the first START of a folder for its beginning and purges only at later ones: always write it.
        self._write(completed_epochs + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._write(0, summary=summary_v2.hparams_pb(hparams(run), trial_id=trial))
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is SystemExit:  # how Tune stops a trial
            self.end("stopped")

    def add_epoch(self, epoch: Epoch, *, best: Epoch | None) -> None:
        """Add all scalars of an epoch as one record. All scores are in percent.

        `best` is the trial's best epoch so far. A diverged epoch has no scores.
        """
        self._epoch = epoch.epoch
        scores = {"best_miou": best.miou} if best else {}
        if not epoch.diverged:
            scores |= {"miou": epoch.miou, "pixel_accuracy": epoch.pixel_accuracy}
        ious = zip(self._classes.names, epoch.iou, strict=True)
        iou = {f"iou/{name}": value for name, value in ious if value is not None}
        scalars = {
            "loss/total": epoch.loss,
            "loss/main": epoch.loss_main,
            "loss/aux1": epoch.loss_aux1,
            "loss/aux2": epoch.loss_aux2,
            "lr": epoch.lr,
            "grad_norm": epoch.grad_norm,
            "speed/images_per_second": epoch.images_per_second,
            "speed/epoch_seconds": epoch.seconds,
        }
        scalars |= scores | iou
        self._write_values(epoch.epoch, [{"tag": tag, "simple_value": value} for tag, value in scalars.items()])

    def add_triptychs(self, step: int, pictures: list[tuple[str, NDArray[np.uint8]]]) -> None:
        """Add named RGB pictures, uint8 (H, W, 3), under `pictures/NAME`."""
        values = []
        for name, picture in pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="PNG")
            height, width = picture.shape[:2]
            image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": buffer.getvalue()}
            values.append({"tag": f"pictures/{name}", "image": image})
        self._write_values(step, values)

    def end(self, status: SessionStatus) -> None:
        """Close the trial's session in the HParams table. Call it once, when no retry can follow."""
        code = api_pb2.STATUS_FAILURE if status == "diverged" else api_pb2.STATUS_SUCCESS
        info = plugin_data_pb2.SessionEndInfo(status=code, end_time_secs=time.time())
        self._write(self._epoch, summary=_hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=info))
        self.flush()

    def flush(self) -> None:
        """Write to storage what was added since the last time."""
        content = self._content.getvalue()
        self._folder.extend(self._name, content, length=self._num_flushed)
        self._num_flushed = len(content)

    def _write_values(self, step: int, values: Sequence[Mapping[str, Any]]) -> None:
        self._write(step, summary=summary_pb2.Summary(value=values))

    def _write(self, step: int, **content: Any) -> None:
        event = event_pb2.Event(step=step, wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())


class HParamsTable:
    """The HParams schema of a search in its folder, rewritten as it grows: a column a field, and the metrics."""

    def __init__(self, folder: Storage, runs: Mapping[str, Run]) -> None:
        self._folder = folder.fail_fast()
        self._runs = dict(runs)
        self._written_at = -TABLE_SECONDS
        self._is_due = bool(runs)

    def add(self, trial: str, run: Run) -> None:
        """Add a trial, and write the table unless it was written a moment ago."""
        if trial not in self._runs:
            self._runs[trial] = run
            self._is_due = True
        if time.monotonic() - self._written_at >= TABLE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the table if trials were added. If storage does not answer, it is written later."""
        if not self._is_due:
            return
        self._written_at = time.monotonic()
        partial = ".experiment.partial"  # TensorBoard would read a file with `tfevents` in its name
        try:
            self._folder.write(partial, _table_bytes(self._runs.values()))
            self._folder.move(partial, TABLE_FILE)
            self._is_due = False
        except StorageError as error:
            _log.warning("TensorBoard's table is written later: %s", error)


def _table_bytes(runs: Iterable[Run]) -> bytes:
    """Return an event file with the schema as its only summary."""
    rows = [hparams(run) for run in runs]
    experiment = api_pb2.Experiment(
        hparam_infos=[_column(name, rows) for name in dict.fromkeys(name for row in rows for name in row)],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title, dataset_type=dataset)
            for tag, title, dataset in METRICS
        ],
        time_created_secs=time.time(),
    )
    summary = _hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment)
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    for content in ({"file_version": "brain.Event:2"}, {"summary": summary}):
        records.write(event_pb2.Event(wall_time=time.time(), **content).SerializeToString())
    return buffer.getvalue()


def hparams(run: Run) -> dict[str, HParam]:
    """Return a row's line of the table by dotted name: everything that decides what is trained, and the row's name.

    A field that a variant lacks, as AdamW's momentum, is absent, and TensorBoard leaves its cell empty. A field that
    may be None holds text in all rows ("none", "5"): a worker sees only its own row, so the type of a column must
    follow from the field's type, or numbers and text would meet in one column. The row's expectation is left out.
    """
    kinds = column_kinds(Run)
    row = _flatten(run.model_dump(mode="json", exclude={"expect"}))
    return {name: _text(value) if kinds[name] is str else value for name, value in row.items()}


def column_kinds(model: type[BaseModel], prefix: str = "") -> dict[str, type[HParam]]:
    """Return float, bool or str for every leaf field of a model and of its unions' variants, by dotted name."""
    kinds: dict[str, type[HParam]] = {}
    for name, field in model.model_fields.items():
        annotation = field.annotation
        members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel):
                member_kinds = column_kinds(member, f"{prefix}{name}.")
            elif len(members) > 1 or member not in (bool, int, float):
                member_kinds = {prefix + name: str}
            else:
                member_kinds = {prefix + name: bool if member is bool else float}
            for column, kind in member_kinds.items():
                kinds[column] = kind if kinds.get(column, kind) is kind else str
    return kinds


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
    """Return the `HParamInfo` of one column: its type, its values, and whether rows differ in it (those come first)."""
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


def _hparams_summary(tag: str, **content: Any) -> Any:
    """Return a summary for the HParams plugin: all its content is metadata, its tensor is empty."""
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    value = summary_pb2.Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
    return summary_pb2.Summary(value=[value])


def triptych(
    image: NDArray[np.uint8],
    label: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    classes: ClassSet = CITYSCAPES,
) -> NDArray[np.uint8]:
    """Draw picture, label and prediction side by side in the colours of `classes`: RGB uint8 (h, 3 w + 2 GAP, 3).

    `image` is RGB (3, H, W); `label` and `prediction` hold trainIds, each at its own resolution. All are resized to
    the image's size, or to TRIPTYCH_HEIGHT where that is smaller. Void is black. The prediction is black
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
    colours = classes.palette()
    return np.concatenate([picture, gap, colours[truth], gap, colours[scored]], axis=1)
