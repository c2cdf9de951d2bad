"""Cross-entropy, and the likeliest class, of logits upsampled to the labels' size without ever holding them whole.

Interpolation is linear: `U = R Z K^T`, with one matrix of bilinear weights for the rows and one for the columns. So the
loss is taken over bands of a few rows, and its gradient, `softmax - one_hot`, is formed there at once and carried back
through the transposed matrices. Against `interpolate` and `cross_entropy` one after the other this takes a third of the
time (benchmarks/results.md), holds no B x C x H x W tensor, and sums its gradient by matrix products alone.

Shapes: B images, C classes, h x w logits, H x W labels, b rows of a band.
"""

from functools import cache
from typing import Any, Final

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


def argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of each pixel: B x C x h x w to uint8 B x H x W, `size` being (H, W)."""
    height, width = size
    wide = logits.float() @ bilinear(width, logits.shape[3], logits.device).T  # B x C x h x W
    predictions = torch.zeros((len(logits), height, width), dtype=torch.uint8, device=logits.device)
    for band in _bands(wide, height):
        (first, last), rows = _rows_of(band, height, logits.shape[2], logits.device)
        best, *others = torch.matmul(rows, wide[:, :, first:last]).unbind(dim=1)
        for train_id, scores in enumerate(others, start=1):  # `argmax` over a strided dimension is five times slower
            predictions[:, band].masked_fill_(scores > best, train_id)
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
            (first, last), rows = _rows_of(band, height, logits.shape[2], logits.device)
            scores = torch.matmul(rows, wide[:, :, first:last])  # B x C x b x W
            share, target = weights[:, None, band], classes[:, None, band]
            log_likelihood = scores.log_softmax(dim=1)
            total = total - (log_likelihood.gather(1, target) * share).sum()
            slope = log_likelihood.exp_().scatter_add_(1, target, torch.full_like(share, -1.0)).mul_(share)
            gradient[:, :, first:last] += torch.matmul(rows.T, slope)
        ctx.save_for_backward((gradient @ columns).to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None


def _bands(wide: Tensor, height: int) -> list[slice]:
    num_rows = max(1, BAND_ELEMENTS[wide.device.type] // (wide.shape[0] * wide.shape[1] * wide.shape[3]))
    return [slice(top, min(top + num_rows, height)) for top in range(0, height, num_rows)]


def _rows_of(band: slice, height: int, num_rows: int, device: torch.device) -> tuple[tuple[int, int], Tensor]:
    """The rows of logits that a band is interpolated from, and their weights, b x (last - first)."""
    scale = num_rows / height
    first = max(int((band.start + 0.5) * scale - 0.5), 0)
    last = min(int((band.stop - 0.5) * scale - 0.5) + 2, num_rows)
    return (first, last), bilinear(height, num_rows, device)[band, first:last]


@cache
def bilinear(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """Weights of linear interpolation between pixel centres (`align_corners=False`), outputs x inputs, float32."""
    impulses = torch.eye(inputs, device=device).unsqueeze(0)
    return F.interpolate(impulses, size=outputs, mode="linear", align_corners=False)[0].T.contiguous()
