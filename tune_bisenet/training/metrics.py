"""Segmentation scores from confusion matrices, counted exactly (int64). Rows are labels, columns predictions.

As in cityscapesScripts: summed over the whole split, then IoU = TP / (TP + FP + FN); void labels are not counted, and
a class that occurs neither in labels nor in predictions has no IoU and no part in the mean. Of labels that are all void
nothing can be said: their mIoU and accuracy are NaN, not 0.
"""

import math

import torch
from torch import Tensor

from tune_bisenet.classes import MAX_CLASSES, VOID


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count (label, prediction) pairs of each image: B x H x W uint8, twice, to B x C x C int64, C `num_classes`."""
    num_images = len(labels)
    # Void becomes one more row that is cut off afterwards: cheaper than masking every pixel.
    rows = labels.clamp_max(num_classes).int()
    image = torch.arange(num_images, device=labels.device, dtype=torch.int32).view(-1, 1, 1)
    codes = (image * (num_classes + 1) + rows) * num_classes + predictions.int()
    counts = histogram(codes.flatten(), num_images * (num_classes + 1) * num_classes)
    return counts.view(num_images, num_classes + 1, num_classes)[:, :num_classes]


def histogram(codes: Tensor, length: int) -> Tensor:
    """Count each code from 0 to `length - 1`: one dimension of any integers to int64 counts. Never waits for a GPU.

    `bincount` asks a GPU for the smallest and largest code; on a CPU it is faster.
    """
    if codes.device.type == "cpu":
        return torch.bincount(codes, minlength=length)
    return _histogram_by_scattering(codes, length)


def _histogram_by_scattering(codes: Tensor, length: int) -> Tensor:
    counts = torch.zeros(length, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(0, codes.long(), counts.new_ones(()).expand(len(codes)))


def iou_per_class(matrix: Tensor) -> list[float | None]:
    """Return IoU in percent by trainId from a C x C confusion matrix; None where a class never occurs."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    values: list[float] = (100.0 * hits / union).tolist()
    return [value if count else None for value, count in zip(values, union.tolist(), strict=True)]


def mean_iou(iou: list[float | None]) -> float:
    """Return the mean over the classes that occur, in percent; NaN if none does."""
    occurring = [value for value in iou if value is not None]
    return sum(occurring) / len(occurring) if occurring else math.nan


def pixel_accuracy(matrix: Tensor) -> float:
    """Return the share of labelled pixels that are right, in percent; NaN if none is labelled."""
    num_labelled = int(matrix.sum())
    return 100.0 * int(matrix.trace()) / num_labelled if num_labelled else math.nan


assert VOID > MAX_CLASSES, "confusion() relies on void lying beyond the classes"
