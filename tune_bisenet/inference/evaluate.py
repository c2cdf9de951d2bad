"""`tune-bisenet evaluate`: mIoU and IoU by class of any form of a model, and its predictions as Cityscapes wants them.

By default frames are resized, batched, predicted and counted as validation does, so that a search's `best.pt` scores on
the search's data what the search says. Frames are read one after the other; nothing is packed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tune_bisenet.classes import ClassSet
from tune_bisenet.config import STRIDE
from tune_bisenet.data.cityscapes import open_test_split
from tune_bisenet.data.packing import open_source, resize_image
from tune_bisenet.data.source import Frame, Split
from tune_bisenet.errors import OK, run_command
from tune_bisenet.inference.model import Model, load, scored_classes
from tune_bisenet.options import STREETS, InputError
from tune_bisenet.storage import Storage
from tune_bisenet.text import counted, markdown_table
from tune_bisenet.training import metrics
from tune_bisenet.training.model import upsample

PREDICTED: Final = "_predicted_labelIds.png"
Tick = Callable[[int, int], None]
"""Called with the number of frames that are done, and of all."""


@dataclass(frozen=True)
class Evaluation:
    """Holds what a model scored on a split; IoU, mIoU and accuracy in percent, NaN where no pixel is labelled."""

    confusion: Tensor  # C x C int64: labels by rows, predictions by columns
    num_frames: int

    @property
    def iou(self) -> list[float | None]:
        return metrics.iou_per_class(self.confusion)

    @property
    def miou(self) -> float:
        return metrics.mean_iou(self.iou)

    @property
    def pixel_accuracy(self) -> float:
        return metrics.pixel_accuracy(self.confusion)


@dataclass(frozen=True)
class LabelledSplit:
    """Frames to be scored, by index. The labels of a test split may be void."""

    names: Sequence[str]
    read: Callable[[int], Frame]
    classes: ClassSet


def open_split(data: str, split: str) -> LabelledSplit:
    """Open a split of the streets, or of a folder or URI in Cityscapes layout. Raises InputError with what to do."""
    if split != "test":
        known: Split = "train" if split == "train" else "val"
        source = open_source(data)
        return LabelledSplit(source.names(known), lambda index: source.load(known, index), source.classes)
    if data == STREETS:
        raise InputError("--split test: the built-in streets have none. Give val.")
    return LabelledSplit(*open_test_split(Storage.at(data)))


def evaluate(
    model: Model,
    split: LabelledSplit,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    predictions: Path | None = None,
    tick: Tick = lambda _done, _total: None,
) -> Evaluation:
    """Score a model on whole frames at the resolution of their labels.

    With several `scales`, or with `flip`, the classes' probabilities are averaged over the images at these scales and
    mirrored. `predictions` is a folder for one PNG of labelIds a frame. Raises InputError for a damaged frame, and for
    other classes than the model's.
    """
    if split.classes.names != model.classes.names:
        known, given = (", ".join(classes.names) for classes in (model.classes, split.classes))
        raise InputError(f"the model knows the classes {known}, but the data have {given}: give other --data.")
    is_plain = tuple(scales) == (1.0,) and not flip
    num_classes = len(model.classes)
    total = torch.zeros((num_classes, num_classes), dtype=torch.int64)
    done = 0
    for names, frames in _batches(split, model.card.run.batch_size):
        size = (frames[0].label.shape[0], frames[0].label.shape[1])
        if is_plain:
            found = model.segment(_images(frames, model.card.run.image_size), size)
        else:
            found = _averaged_classes(model, frames, size, scales, flip=flip)
        labels = torch.from_numpy(np.stack([frame.label for frame in frames]))
        total += metrics.confusion(found, labels, num_classes).sum(dim=0)
        if predictions:
            for name, ids in zip(names, found.numpy(), strict=True):
                _write_prediction(model, predictions / f"{name}{PREDICTED}", ids)
        done += len(frames)
        tick(done, len(split.names))
    return Evaluation(total, done)


def _batches(split: LabelledSplit, batch_size: int) -> Iterator[tuple[list[str], list[Frame]]]:
    """Yield names and frames in batches as validation has them; frames that differ in size are in different batches."""
    frames = ((name, split.read(index)) for index, name in enumerate(split.names))
    for _size, alike in groupby(frames, key=lambda pair: pair[1].label.shape):
        while batch := list(islice(alike, batch_size)):
            yield [name for name, _frame in batch], [frame for _name, frame in batch]


def _images(frames: Sequence[Frame], size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack([resize_image(frame.image, size) for frame in frames]))


def _averaged_classes(
    model: Model, frames: Sequence[Frame], size: tuple[int, int], scales: Sequence[float], *, flip: bool
) -> Tensor:
    """Return the classes, uint8 B x h x w, of the highest mean probability; one frame at a time, as they are large."""
    height, width = model.card.run.image_size
    found = []
    for frame in frames:
        mean = torch.zeros((1, len(model.classes), *size), device=model.device)
        for scale in scales:
            scaled = (_multiple(height * scale), _multiple(width * scale))
            images = _images([frame], scaled).to(model.device)
            for mirrored in (False, True) if flip else (False,):
                scores = model.network(images.flip(3) if mirrored else images)
                if scores.ndim != 4:
                    raise InputError(
                        "--scales and --flip average what classes score, and this model was exported with --argmax: "
                        "export it without."
                    )
                mean += upsample((scores.flip(3) if mirrored else scores).float(), size).softmax(dim=1)
        found.append(mean.argmax(dim=1).to(torch.uint8).cpu())
    return torch.cat(found)


def _multiple(side: float) -> int:
    return max(1, round(side / STRIDE)) * STRIDE


def _write_prediction(model: Model, path: Path, ids: "np.typing.NDArray[np.uint8]") -> None:
    """Write a frame's classes as labelIds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.zeros(256, dtype=np.uint8)
    table[: len(model.classes)] = [entry.id for entry in model.classes.classes]
    Image.fromarray(table[ids]).save(path)


# --- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _evaluate(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune-bisenet evaluate",
        description="Score a model on a split of labelled frames: mIoU and IoU by class, at the resolution of the "
        "labels. Without --scales and --flip it does what validation does in training.",
        epilog="exit codes: 0 scored; 2 wrong input",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a search's folder, a best.pt, or an exported model")
    parser.add_argument("--run", metavar="NAME", help="of a search: this row's best trial, or this trial")
    parser.add_argument("--data", metavar="DIR_OR_URI", help="in Cityscapes layout, or `streets` (default: its own)")
    parser.add_argument("--split", choices=["val", "train", "test"], default="val", help="default: val")
    parser.add_argument("--predictions", metavar="DIR", help="write a PNG of Cityscapes' labelIds for each frame")
    parser.add_argument(
        "--scales", metavar="A,B,...", type=_scales, default=(1.0,), help="average over scales, such as 0.75,1,1.25"
    )
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image, too")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of a best.pt (default: that of its training)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    return parser


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0.1 <= scale <= 4 for scale in scales):
        raise argparse.ArgumentTypeError(f"{text}: give factors from 0.1 to 4 with commas, such as 0.75,1,1.25.")
    return scales


def _evaluate(arguments: argparse.Namespace) -> int:
    model = load(arguments.model, arguments.run, device=arguments.device, precision=arguments.precision)
    data = arguments.data or model.card.data
    if not data:
        raise InputError("it is not known what this model was trained on: give --data.")
    split = open_split(data, arguments.split)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{counted(len(split.names), 'frame')} of {arguments.split}", total=len(split.names))
        result = evaluate(
            model,
            split,
            scales=arguments.scales,
            flip=arguments.flip,
            predictions=Path(arguments.predictions) if arguments.predictions else None,
            tick=lambda done, _total: progress.update(task, completed=done),
        )
    if math.isnan(result.miou) and not arguments.predictions:
        raise InputError(
            f"no pixel of the {arguments.split} split of {data} is labelled, so there is nothing to score: give "
            "--predictions DIR for what the model predicts, or another --split."
        )
    sys.stdout.write(_format(model, result, arguments, data))
    return OK


def _format(model: Model, result: Evaluation, arguments: argparse.Namespace, data: str) -> str:
    where = f"{counted(result.num_frames, 'frame')} of {arguments.split} of {data}"
    lines = []
    if not math.isnan(result.miou):
        iou = [
            [name, "–" if value is None else f"{value:.2f}"] for name, value in scored_classes(model.card, result.iou)
        ]
        many = [f"scales {', '.join(f'{scale:g}' for scale in arguments.scales)}"] if len(arguments.scales) > 1 else []
        how = ", ".join([*many, *(["mirrored, too"] if arguments.flip else [])])
        lines += [
            markdown_table(["class", "IoU in %"], iou, numbers=["IoU in %"]).rstrip("\n"),
            f"mIoU {result.miou:.2f} %, pixel accuracy {result.pixel_accuracy:.2f} % on {where}{how and f' ({how})'}",
            f"its search scored {model.card.miou:.2f} % at epoch {model.card.epoch} on its validation split",
        ]
    else:
        lines.append(f"{where}: no pixel is labelled, so nothing was scored")
    if arguments.predictions:
        lines.append(f"predictions: {arguments.predictions}")
    return "\n".join(lines) + "\n"
