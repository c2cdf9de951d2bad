"""The losses of one micro-batch: cross-entropy, of all pixels or of the hard ones, and Lovász-Softmax.

Void never counts. A batch without a labelled pixel has loss 0 and gradient 0. Nothing here
waits for the device but the counting of Lovász-Softmax (torch.bincount asks a GPU for the largest value).

Shapes: B images, C classes, H x W pixels of the labels, h x w of the logits.
"""

from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.config import OHEM, CrossEntropy, Loss, WeightedCrossEntropy
from tune_bisenet.data.classes import VOID
from tune_bisenet.model import Logits, upsample
from tune_bisenet.upsampled import cross_entropy, hard_cross_entropy


class HeadLosses(NamedTuple):
    """`total = main + aux_weight * (aux1 + aux2)`, each a scalar tensor."""

    total: Tensor
    main: Tensor
    aux1: Tensor
    aux2: Tensor


def head_losses(
    logits: Logits,  # B x C x h x w
    labels: Tensor,  # B x H x W, uint8 trainIds
    loss: Loss,
    *,
    class_weights: Tensor | None,
    epoch: int,
) -> HeadLosses:
    """The loss of each head in `epoch` (from 1); from `lovasz_after` on, the main head's is Lovász-Softmax."""
    size = (labels.shape[1], labels.shape[2])
    targets = labels.long()
    if uses_lovasz(loss, epoch):
        main = lovasz_softmax(upsample(logits.main, size), targets)
    else:
        main = _by_pixel(logits.main, targets, loss, class_weights)
    aux1, aux2 = (_by_pixel(aux, targets, loss, class_weights) for aux in logits.aux)
    return HeadLosses(main + loss.aux_weight * (aux1 + aux2), main, aux1, aux2)


def uses_lovasz(loss: Loss, epoch: int) -> bool:
    """Whether the main head has switched by `epoch` (from 1)."""
    return loss.lovasz_after is not None and epoch > loss.lovasz_after


def class_weights_from(counts: Tensor, exponent: float) -> Tensor:
    """`weight[c] = (total / (num_classes * counts[c])) ** exponent`; 0 for a class that never occurs.

    C float32 from C int64 counts of pixels.
    """
    weights = (counts.sum().double() / (len(counts) * counts.double())) ** exponent
    return weights.where(counts > 0, 0.0).float()


def _by_pixel(logits: Tensor, targets: Tensor, loss: Loss, class_weights: Tensor | None) -> Tensor:
    """The loss of a head that has not switched to Lovász-Softmax."""
    match loss:
        case CrossEntropy() | WeightedCrossEntropy():
            return cross_entropy(logits, targets, class_weights)
        case OHEM():
            return hard_cross_entropy(logits, targets, threshold=loss.threshold, min_kept=loss.min_kept)
        case _:
            assert_never(loss)


def lovasz_softmax(scores: Tensor, targets: Tensor) -> Tensor:
    """Lovász-Softmax over the classes present in the batch (Berman et al., 2018, https://arxiv.org/abs/1705.08790).

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
    counts = torch.bincount(codes.flatten(), minlength=length + 1)[:length].view(num_classes, -1)
    foreground = torch.bincount(codes.gather(0, own).flatten(), minlength=length + 1)[:length].view(num_classes, -1)
    growth = _growth(codes, own, foreground, counts - foreground)
    num_present = (foreground.sum(dim=1) > 0).sum()
    return (errors * growth).sum() / num_present.clamp_min(1)


_ERROR_BINS = 8192
"""Errors closer than 1 / 8192 share a rank. More bins cost more time, fewer cost accuracy."""


def _bins(errors: Tensor, labelled: Tensor) -> Tensor:
    """The bin of each error, C x P: those of class c in `c * bins .. (c + 1) * bins - 1`, large errors first.

    Void pixels share one bin behind all others.
    """
    first = torch.arange(0, len(errors) * _ERROR_BINS, _ERROR_BINS, device=errors.device, dtype=torch.int32)
    ranks = ((1.0 - errors) * _ERROR_BINS).int().clamp_(0, _ERROR_BINS - 1)
    return (ranks + first.unsqueeze(1)).where(labelled, len(errors) * _ERROR_BINS).long()


def _growth(codes: Tensor, own: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """What each pixel adds to each class's Jaccard loss, C x P; 0 for void pixels and absent classes."""
    for_foreground, for_background = _jaccard_growth(foreground, background)
    growth = F.pad(for_background.flatten(), (0, 1))[codes]
    return growth.scatter_(0, own, F.pad(for_foreground.flatten(), (0, 1))[codes.gather(0, own)])


def _jaccard_growth(foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """What one foreground, and one background, pixel of each bin adds to the Jaccard loss; counts are C x bins.

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
