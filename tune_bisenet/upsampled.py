"""Cross-entropy, and the likeliest class, of logits upsampled to the labels' size without ever holding them whole.

Interpolation is linear: `U = R Z K^T`, with one matrix of bilinear weights for the rows and one for the columns. So the
loss is taken over bands of a few rows, and its gradient, `softmax - one_hot`, is formed there at once and carried back
through the transposed matrices. Against `interpolate` and `cross_entropy` one after the other this takes a third of the
time (benchmarks/results.md), holds no B x C x H x W tensor, and sums its gradient by matrix products alone.

Shapes: B images, C classes, h x w logits, H x W labels, b rows of a band.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.data.classes import VOID

BAND_ELEMENTS: Final = {"cpu": 2**20, "cuda": 2**25}
"""Numbers in a band, B C b W: what stays in a CPU's cache; on a GPU enough to keep it busy."""


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over the labelled pixels, each weighted by its class (C weights, or all alike); 0 where there are none.

    `logits` are B x C x h x w of any float type, `targets` B x H x W int64 trainIds with void 255; a float32 scalar.
    """
    labelled = targets != VOID
    classes = targets.where(labelled, 0)
    weights = labelled.float() if class_weights is None else class_weights[classes] * labelled
    total: Tensor = _BandedSum.apply(logits, classes, weights)
    return total / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def hard_cross_entropy(logits: Tensor, targets: Tensor, *, threshold: float, min_kept: float) -> Tensor:
    """Mean over the hard pixels alone (Shrivastava et al., 2016), all of them weighing the same; shapes as above.

    A labelled pixel is hard if its own class has a probability below `threshold`. Where fewer than `min_kept` of the
    labelled pixels, rounded up, are, the hardest make up that number, with any that tie with the last of them.
    """
    labelled = targets != VOID
    classes = targets.where(labelled, 0)
    pixel_losses = _pixel_losses(logits, classes).where(labelled, -1.0)
    min_number = (min_kept * labelled.sum().double()).ceil()
    hard = (pixel_losses > -math.log(threshold)) | (pixel_losses >= _kth_largest(pixel_losses, min_number))
    total: Tensor = _BandedSum.apply(logits, classes, hard.float())
    return total / hard.sum().clamp_min(1)


def argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of each pixel: B x C x h x w to uint8 B x H x W, `size` being (H, W)."""
    height, width = size
    wide = logits.float() @ bilinear(width, logits.shape[3], logits.device).T  # B x C x h x W
    predictions = torch.zeros((len(logits), height, width), dtype=torch.uint8, device=logits.device)
    for band in _bands(wide, height):
        best, *others = band.scores.unbind(dim=1)
        for train_id, scores in enumerate(others, start=1):  # `argmax` over a strided dimension is five times slower
            predictions[:, band.rows].masked_fill_(scores > best, train_id)
            best = torch.maximum(best, scores)
    return predictions


class _BandedSum(torch.autograd.Function):
    """`sum(weights * cross_entropy(upsampled logits, classes))`; weights B x H x W are 0 where nothing is labelled."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        height, width = classes.shape[1:]
        columns = bilinear(width, logits.shape[3], logits.device)
        wide = logits.float() @ columns.T  # B x C x h x W
        gradient = torch.zeros_like(wide)
        total = wide.new_zeros(())
        for band in _bands(wide, height):
            share, target = weights[:, None, band.rows], classes[:, None, band.rows]
            log_likelihood = band.scores.log_softmax(dim=1)
            total = total - (log_likelihood.gather(1, target) * share).sum()
            slope = log_likelihood.exp_().scatter_add_(1, target, torch.full_like(share, -1.0)).mul_(share)
            gradient[:, :, band.sources] += torch.matmul(band.weights.T, slope)
        ctx.save_for_backward((gradient @ columns).to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None


@torch.no_grad()
def _pixel_losses(logits: Tensor, classes: Tensor) -> Tensor:
    """The cross-entropy of each pixel, B x H x W; never negative."""
    height, width = classes.shape[1:]
    wide = logits.float() @ bilinear(width, logits.shape[3], logits.device).T  # B x C x h x W
    losses = torch.empty(classes.shape, device=logits.device)
    for band in _bands(wide, height):
        losses[:, band.rows] = F.cross_entropy(band.scores, classes[:, band.rows], reduction="none")
    return losses.abs_()  # of a rounded zero the sign, too


def _kth_largest(values: Tensor, rank: Tensor) -> Tensor:
    """The `rank`-th largest of float32 `values`, a scalar; NaN if `rank` is 0. At least `rank` must not be negative.

    It is found bit by bit, as numbers from 0 on have the order of their bits. On a CPU its 31 counts take a fifth of
    the time of a sort, and unlike `kthvalue` it leaves a `rank` that is a tensor on its device.
    """
    bits = values.view(torch.int32)
    found = torch.zeros((), dtype=torch.int32, device=values.device)
    for place in reversed(range(31)):
        candidate = found + (1 << place)
        found = candidate.where(torch.count_nonzero(bits >= candidate) >= rank, found)
    return found.view(torch.float32)


class _Band(NamedTuple):
    """A few rows of the upsampled logits, and what they are interpolated from."""

    rows: slice
    scores: Tensor  # B x C x b x W
    sources: slice  # rows of logits
    weights: Tensor  # b x sources


def _bands(wide: Tensor, height: int) -> Iterator[_Band]:
    """Upsample B x C x h x W to `height` rows, a band at a time."""
    num_sources = wide.shape[2]
    scale = num_sources / height
    num_rows = max(1, BAND_ELEMENTS[wide.device.type] // (wide.shape[0] * wide.shape[1] * wide.shape[3]))
    for top in range(0, height, num_rows):
        rows = slice(top, min(top + num_rows, height))
        first = max(int((rows.start + 0.5) * scale - 0.5), 0)
        last = min(int((rows.stop - 0.5) * scale - 0.5) + 2, num_sources)
        sources = slice(first, last)
        weights = bilinear(height, num_sources, wide.device)[rows, sources]
        yield _Band(rows, torch.matmul(weights, wide[:, :, sources]), sources, weights)


@cache
def bilinear(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """Weights of linear interpolation between pixel centres (`align_corners=False`), outputs x inputs, float32."""
    impulses = torch.eye(inputs, device=device).unsqueeze(0)
    return F.interpolate(impulses, size=outputs, mode="linear", align_corners=False)[0].T.contiguous()
