"""The losses of one micro-batch: cross-entropy, of all pixels or of the hard ones, and Lovász-Softmax.

Void never counts. A batch without a labelled pixel has loss 0 and gradient 0. Nothing waits for the device.

On a CPU, logits are upsampled a band of rows at a time, which stays in its cache; on a GPU in `kernels` of our own, or
where they cannot be used all at once, in few operations. `in_bands` and `_kernels_for` choose.

Shapes: B images, C classes, H x W pixels of the labels, h x w of the logits.
"""

import math
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, Final, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.classes import VOID
from tune_bisenet.config import OHEM, CrossEntropy, Loss, WeightedCrossEntropy
from tune_bisenet.training import metrics
from tune_bisenet.training.model import Logits, upsample

CPU: Final = torch.device("cpu")
BAND_ELEMENTS: Final = 2**20
"""Numbers in a band, B C b W: what stays in a CPU's cache."""


def in_bands(device: torch.device) -> bool:
    """Return whether logits are upsampled in bands there: several times faster on a CPU (benchmarks/results.md)."""
    return device.type == "cpu"


def _kernels_for(logits: Tensor, size: tuple[int, int]) -> ModuleType | None:
    """Return `kernels` if they can upsample `logits` to `size`; None without Triton, which wheels for macOS lack."""
    try:
        from tune_bisenet.training import kernels
    except ImportError:
        return None
    return kernels if kernels.supports(logits, size) else None


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the mean over the labelled pixels, weighted by class (C weights, or all alike); 0 where there are none.

    `logits` are B x C x h x w of any float type, `targets` B x H x W int64 trainIds with void 255; a float32 scalar.
    """
    labelled = targets != VOID
    classes = targets.where(labelled, 0)
    weights = labelled.float() if class_weights is None else class_weights[classes] * labelled
    total = _weighted_sum(logits, classes, weights)
    return total / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def hard_cross_entropy(logits: Tensor, targets: Tensor, *, threshold: float, min_kept: float) -> Tensor:
    """Return the mean over the hard pixels alone (Shrivastava et al., 2016), equally weighted; shapes as above.

    A labelled pixel is hard if its own class has a probability below `threshold`. Where fewer than `min_kept` of the
    labelled pixels, rounded up, are, the hardest make up that number, with any that tie with the last of them.
    """
    labelled = targets != VOID
    classes = targets.where(labelled, 0)
    pixel_losses = _pixel_losses(logits, classes).where(labelled, -1.0)
    min_number = (min_kept * labelled.sum().double()).ceil()
    hard = (pixel_losses > -math.log(threshold)) | (pixel_losses >= _kth_largest(pixel_losses, min_number))
    total = _weighted_sum(logits, classes, hard.float())
    return total / hard.sum().clamp_min(1)


def argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the likeliest class of each pixel: B x C x h x w to uint8 B x H x W, `size` being (H, W)."""
    if not in_bands(logits.device):
        if kernels := _kernels_for(logits, size):
            likeliest: Tensor = kernels.likeliest_classes(logits, size)
            return likeliest
        return upsample(logits.float(), size).argmax(dim=1).to(torch.uint8)
    height, width = size
    wide = logits.float() @ bilinear(width, logits.shape[3]).T  # B x C x h x W
    predictions = torch.zeros((len(logits), height, width), dtype=torch.uint8, device=logits.device)
    for band in _bands(wide, height):
        best, *others = band.scores.unbind(dim=1)
        for train_id, scores in enumerate(others, start=1):  # `argmax` over a strided dimension is five times slower
            predictions[:, band.rows].masked_fill_(scores > best, train_id)
            best = torch.maximum(best, scores)
    return predictions


def _weighted_sum(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Return `sum(weights * cross_entropy(upsampled logits, classes))`, a scalar; all but the logits are B x H x W."""
    if in_bands(logits.device):
        total: Tensor = _BandedSum.apply(logits, classes, weights)
    elif kernels := _kernels_for(logits, (classes.shape[1], classes.shape[2])):
        total = kernels.cross_entropy_sum(logits, classes, weights)
    else:
        total = (_pixel_losses_at_once(logits, classes) * weights).sum()
    return total


def _pixel_losses_at_once(logits: Tensor, classes: Tensor) -> Tensor:
    full_size = _full_size(logits, (classes.shape[1], classes.shape[2]))
    if _must_repeat(logits.device):  # `F.cross_entropy` has no kernel on GPUs that is known to repeat its results
        return -full_size.log_softmax(dim=1).gather(1, classes[:, None]).squeeze(1)
    return F.cross_entropy(full_size, classes, reduction="none")


class _BandedSum(torch.autograd.Function):
    """Sums the same in bands, and computes its gradient with it. Weights are 0 where nothing is labelled."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        height, width = classes.shape[1:]
        columns = bilinear(width, logits.shape[3])
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
    """Return the cross-entropy of each pixel, B x H x W; never negative."""
    if not in_bands(logits.device):
        if kernels := _kernels_for(logits, (classes.shape[1], classes.shape[2])):
            by_pixel: Tensor = kernels.losses_by_pixel(logits, classes)
            return by_pixel
        return _pixel_losses_at_once(logits, classes).abs_()
    height, width = classes.shape[1:]
    wide = logits.float() @ bilinear(width, logits.shape[3]).T  # B x C x h x W
    losses = torch.empty(classes.shape, device=logits.device)
    for band in _bands(wide, height):
        losses[:, band.rows] = F.cross_entropy(band.scores, classes[:, band.rows], reduction="none")
    return losses.abs_()  # of a rounded zero the sign, too


def _kth_largest(values: Tensor, rank: Tensor) -> Tensor:
    """Return the `rank`-th largest of float32 `values`; NaN if `rank` is 0. At least `rank` must not be negative.

    On a CPU it is found bit by bit, as numbers from 0 on have the order of their bits: 31 counts take a fifth of the
    time of a sort. Unlike `kthvalue`, both leave a `rank` that is a tensor on its device.
    """
    if not in_bands(values.device):
        ordered = values.flatten().sort(descending=True).values
        index = rank.long() - 1
        return ordered.take(index.clamp_min(0)).where(index >= 0, math.nan)
    bits = values.view(torch.int32)
    largest = torch.zeros((), dtype=torch.int32, device=values.device)
    for bit in reversed(range(31)):
        candidate = largest + (1 << bit)
        largest = candidate.where(torch.count_nonzero(bits >= candidate) >= rank, largest)
    return largest.view(torch.float32)


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
    num_rows = max(1, BAND_ELEMENTS // (wide.shape[0] * wide.shape[1] * wide.shape[3]))
    for top in range(0, height, num_rows):
        rows = slice(top, min(top + num_rows, height))
        first = max(int((rows.start + 0.5) * scale - 0.5), 0)
        last = min(int((rows.stop - 0.5) * scale - 0.5) + 2, num_sources)
        sources = slice(first, last)
        weights = bilinear(height, num_sources)[rows, sources]
        yield _Band(rows, torch.matmul(weights, wide[:, :, sources]), sources, weights)


@cache
def bilinear(outputs: int, inputs: int, device: torch.device = CPU) -> Tensor:
    """Return the weights of linear interpolation between pixel centres, outputs x inputs, float32."""
    impulses = torch.eye(inputs, device=device).unsqueeze(0)
    return F.interpolate(impulses, size=outputs, mode="linear", align_corners=False)[0].T.contiguous()


class HeadLosses(NamedTuple):
    """`total = main + aux_weight * (aux1 + aux2)`, each a scalar tensor."""

    total: Tensor
    main: Tensor
    aux1: Tensor
    aux2: Tensor


def head_losses(logits: Logits, labels: Tensor, loss: Loss, *, class_weights: Tensor | None, epoch: int) -> HeadLosses:
    """Return the loss of each head in `epoch` (from 1); after `lovasz_after`, the main head's is Lovász-Softmax.

    `labels` are uint8 trainIds, B x H x W.
    """
    targets = labels.long()
    if uses_lovasz(loss, epoch):
        main = lovasz_softmax(_full_size(logits.main, (labels.shape[1], labels.shape[2])), targets)
    else:
        main = _by_pixel(logits.main, targets, loss, class_weights)
    aux1, aux2 = (_by_pixel(aux, targets, loss, class_weights) for aux in logits.aux)
    return HeadLosses(main + loss.aux_weight * (aux1 + aux2), main, aux1, aux2)


def uses_lovasz(loss: Loss, epoch: int) -> bool:
    """Return whether the main head's loss is Lovász-Softmax in `epoch`, from 1."""
    return loss.lovasz_after is not None and epoch > loss.lovasz_after


def _must_repeat(device: torch.device) -> bool:
    """Return whether kernels that may differ from call to call are forbidden; those of a CPU never do."""
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def _full_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the upsampled logits, float32; where results must repeat, by matrices, which differ by rounding alone.

    The gradient of `interpolate` is added up in any order on a GPU.
    """
    if not _must_repeat(logits.device):
        return upsample(logits.float(), size)
    rows, columns = (
        bilinear(outputs, inputs, logits.device) for outputs, inputs in zip(size, logits.shape[2:], strict=True)
    )
    return torch.matmul(rows, logits.float() @ columns.T)


def class_weights_from(counts: Tensor, exponent: float) -> Tensor:
    """Return `weight[c] = (total / (num_classes * counts[c])) ** exponent`; 0 for a class that never occurs.

    C float32 from C int64 counts of pixels.
    """
    weights = (counts.sum().double() / (len(counts) * counts.double())) ** exponent
    return weights.where(counts > 0, 0.0).float()


def _by_pixel(logits: Tensor, targets: Tensor, loss: Loss, class_weights: Tensor | None) -> Tensor:
    """Return the loss of a head that has not switched to Lovász-Softmax."""
    match loss:
        case CrossEntropy() | WeightedCrossEntropy():
            return cross_entropy(logits, targets, class_weights)
        case OHEM():
            return hard_cross_entropy(logits, targets, threshold=loss.threshold, min_kept=loss.min_kept)
        case _:
            assert_never(loss)


def lovasz_softmax(scores: Tensor, targets: Tensor) -> Tensor:
    """Return Lovász-Softmax over the classes in the batch (Berman et al., 2018, https://arxiv.org/abs/1705.08790).

    The loss is linear in the errors as long as their order stays: `sum(errors * growth)`, where `growth` is what the
    Jaccard loss gains when a pixel joins those of larger error (equation 9). It depends only on how many foreground
    and background pixels come before, so counting errors in bins replaces the sort: several times faster, and
    within 1e-5 of it.
    """
    num_classes = scores.shape[1]
    probabilities = scores.float().softmax(dim=1).movedim(1, 0).flatten(1)  # C x P
    labels = targets.flatten()
    labelled = labels != VOID
    own = labels.where(labelled, 0).unsqueeze(0)  # each pixel's class, where there is one
    errors = probabilities.scatter(0, own, 1.0 - probabilities.gather(0, own))
    codes = _bins(errors.detach(), labelled)
    length = num_classes * _ERROR_BINS
    counts = metrics.histogram(codes.flatten(), length + 1)[:length].view(num_classes, -1)
    foreground = metrics.histogram(codes.gather(0, own).flatten(), length + 1)[:length].view(num_classes, -1)
    for_foreground, for_background = _jaccard_growth(foreground, counts - foreground)
    growth = F.pad(for_background.flatten(), (0, 1))[codes]  # C x P; 0 for void pixels
    growth.scatter_(0, own, F.pad(for_foreground.flatten(), (0, 1))[codes.gather(0, own)])
    num_present = (foreground.sum(dim=1) > 0).sum()
    return (errors * growth).sum() / num_present.clamp_min(1)


_ERROR_BINS = 8192
"""Errors closer than 1 / 8192 share a rank. More bins cost more time, fewer cost accuracy."""


def _bins(errors: Tensor, labelled: Tensor) -> Tensor:
    """Return the bin of each error, C x P: for class c `c * bins .. (c + 1) * bins - 1`, large errors first.

    Void pixels share one bin behind all others.
    """
    first = torch.arange(0, len(errors) * _ERROR_BINS, _ERROR_BINS, device=errors.device, dtype=torch.int32)
    ranks = ((1.0 - errors) * _ERROR_BINS).int().clamp_(0, _ERROR_BINS - 1)
    return (ranks + first.unsqueeze(1)).where(labelled, len(errors) * _ERROR_BINS).long()


def _jaccard_growth(foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a foreground and a background pixel of each bin add to the Jaccard loss; counts are C x bins.

    With `g` foreground pixels in all and `f`, `b` before, a foreground pixel adds `1 / (g + b)` and a background
    one `(g - f) / ((g + b) (g + b + 1))`. Pixels of one bin share the sum of their bin, averaged over "foreground
    first" and "background first": both sums are exact, so ties, and hard predictions, are too.
    """
    f_after, b_after = foreground.cumsum(dim=1), background.cumsum(dim=1)
    total = f_after[:, -1:]
    f_middle = f_after - 0.5 * foreground.double()
    union_before = (total + b_after - background).clamp_min(1).double()
    union_after = (total + b_after).clamp_min(1).double()
    for_foreground = 0.5 * (1.0 / union_before + 1.0 / union_after)
    for_background = (total - f_middle) / (union_before * union_after)
    present = total > 0
    return for_foreground.where(present, 0.0).float(), for_background.where(present, 0.0).float()
