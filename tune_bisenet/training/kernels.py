"""Upsampling and cross-entropy, or the likeliest class, in one Triton kernel a head: nothing of full size is stored.

Import this module late, and only where `import triton` works: torch's wheels for macOS and for CPUs alone lack it. With
TRITON_INTERPRET=1 in the environment before the import, the kernels run on a CPU, slowly: that is how they are tested.
Arithmetic is float32. There are no atomics, so equal inputs give equal bits.

Shapes: B images, C classes, H x W pixels of the labels, h x w of the logits. With S = H / h = W / w, whole and even,
S x S pixels lie between four neighbouring logits, or between two or one at the border: a *cell*. There are
(h + 1) x (w + 1) cells an image, and `cell[r, k]` has the logits [r - 1, k - 1] to [r, k] at its corners.
"""

import logging
from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS: Final = 8
"""Cells of a row that a program walks through at the same time, one warp each: no class waits at a barrier."""
PIXELS: Final = 64
"""Pixels of a row in a program of `_pixels`."""
OPTIONS: Final = {"num_warps": 1, "enable_fp_fusion": True}
ABSENT: Final = tl.constexpr(-1e30)
"""The score of classes beyond C, by which their number becomes a power of two. Minus infinity times 0 is no number."""
MAX_ELEMENTS: Final = 2**31
"""The kernels count with 32 bits."""

_log = logging.getLogger(__name__)


def supports(logits: Tensor, size: tuple[int, int]) -> bool:
    """Return whether these functions can be used for B x C x h x w `logits` and labels of `size` (H, W)."""
    (num_images, num_classes, height, width), scale = logits.shape, size[0] // logits.shape[2]
    is_even = scale > 0 and scale % 2 == 0 and size == (scale * height, scale * width)
    largest = num_images * max(size[0] * size[1], 4 * num_classes * (height + 1) * (width + 1))
    return is_even and largest < MAX_ELEMENTS and _works(logits.device)


@cache
def _works(device: torch.device) -> bool:
    """Try a kernel: it needs a card that Triton knows and a C compiler, or the interpreter. Waits for the device."""
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return False
    try:
        likeliest_classes(torch.zeros((1, 1, 1, 1), device=device), (2, 2)).cpu()
    except Exception as error:  # of Triton, its compiler, ptxas, the driver: they share no class
        _log.warning("Triton does not work on %s, so losses take their slower form: %s", device, error)
        return False
    return True


def cross_entropy_sum(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Return `sum(weights * cross_entropy(upsampled logits, classes))`, a float32 scalar; differentiable by `logits`.

    `logits` are B x C x h x w of any float type and layout, `classes` B x H x W integers of 0 .. C - 1, `weights`
    B x H x W float32, 0 where nothing is labelled.
    """
    total: Tensor = _CellSum.apply(logits, classes, weights)
    return total


class _CellSum(torch.autograd.Function):
    """Computes the gradient in the same pass as the sum."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        num_images, num_classes, height, width = logits.shape
        grid = (triton.cdiv(width + 1, CELLS), num_images * (height + 1))
        corners = logits.new_empty((4, num_images, num_classes, height + 1, width + 1), dtype=torch.float32)
        sums = logits.new_empty(grid, dtype=torch.float32)
        constants = {"C": num_classes, "S": classes.shape[1] // height, "PADDED": triton.next_power_of_2(num_classes)}
        inputs = (logits, classes.contiguous(), weights.contiguous())
        sizes = (height, width, *logits.stride())
        _cells[grid](*inputs, corners, sums, *sizes, **constants, BLOCK=CELLS, **OPTIONS)
        above = corners[0, :, :, 1:, 1:] + corners[1, :, :, 1:, :-1]
        below = corners[2, :, :, :-1, 1:] + corners[3, :, :, :-1, :-1]
        ctx.save_for_backward(torch.add(above, below, out=torch.empty_like(logits)))
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None


def losses_by_pixel(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of each pixel, B x H x W float32, not differentiable; arguments as above."""
    losses = torch.empty(classes.shape, device=logits.device)
    return _run_pixels(logits, classes.contiguous(), losses)


def likeliest_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the likeliest class of each pixel: B x C x h x w to uint8 B x H x W, `size` being (H, W)."""
    predictions = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    return _run_pixels(logits, None, predictions)


def _run_pixels(logits: Tensor, classes: Tensor | None, out: Tensor) -> Tensor:
    logits = logits.detach()
    num_images, num_classes, height, width = logits.shape
    grid = (triton.cdiv(out.shape[2], PIXELS), num_images * out.shape[1])
    padded = triton.next_power_of_2(num_classes)
    sizes = (height, width, *out.shape[1:], *logits.stride())
    _pixels[grid](logits, classes, out, *sizes, C=num_classes, PADDED=padded, BLOCK=PIXELS, **OPTIONS)
    return out


# fmt: off
@triton.jit
def _cells(
    logits, classes, weights,
    corners,  # 4 x B x C x (h + 1) x (w + 1), float32: the gradient by each corner of each cell
    sums,  # one number a program
    h, w, image_stride, class_stride, row_stride, column_stride,
    C: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Walk over the S x S places of a row of cells, whose corners and gradients stay in registers."""
    image, row = tl.program_id(1) // (h + 1), tl.program_id(1) % (h + 1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)[:, None]
    left = (tl.maximum(tl.minimum(column, w) - 1, 0) * column_stride)[None, :]
    right = (tl.minimum(column, w - 1) * column_stride)[None, :]
    top = logits + image * image_stride + channel * class_stride + tl.maximum(row - 1, 0) * row_stride
    bottom = logits + image * image_stride + channel * class_stride + tl.minimum(row, h - 1) * row_stride
    a = tl.load(top + left, mask=channel < C, other=ABSENT).to(tl.float32)
    b = tl.load(top + right, mask=channel < C, other=ABSENT).to(tl.float32)
    c = tl.load(bottom + left, mask=channel < C, other=ABSENT).to(tl.float32)
    d = tl.load(bottom + right, mask=channel < C, other=ABSENT).to(tl.float32)
    zero = tl.zeros([PADDED, BLOCK], tl.float32)
    by_a, by_b, by_c, by_d = zero, zero, zero, zero
    loss = tl.zeros([BLOCK], tl.float32)
    for i in range(S):
        y = row * S - S // 2 + i + 0 * column
        in_image = (y >= 0) & (y < h * S)
        first = (image * h * S + y) * (w * S)
        down = tl.where(row == 0, 1.0, tl.where(row == h, 0.0, (i + 0.5) / S))  # at the border one side counts alone
        start, step = (1 - down) * a + down * c, (1 - down) * (b - a) + down * (d - c)
        by_start, by_step = zero, zero
        for j in range(S):
            x = column * S - S // 2 + j
            along = tl.where(column == 0, 1.0, tl.where(column == w, 0.0, (j + 0.5) / S))[None, :]
            inside = in_image & (x >= 0) & (x < w * S)
            weight = tl.load(weights + first + x, mask=inside, other=0.0)
            own = channel == tl.load(classes + first + x, mask=inside, other=0).to(tl.int32)[None, :]
            score = start + along * step
            score -= tl.max(score, axis=0)[None, :]
            exponential = tl.exp(score)
            total = tl.sum(exponential, axis=0)
            loss += weight * (tl.log(total) - tl.sum(tl.where(own, score, 0.0), axis=0))
            slope = exponential * (weight / total)[None, :] - tl.where(own, weight[None, :], 0.0)
            by_start += slope
            by_step += along * slope
        by_a += (1 - down) * (by_start - by_step)
        by_b += (1 - down) * by_step
        by_c += down * (by_start - by_step)
        by_d += down * by_step
    size = tl.num_programs(1) * C * (w + 1)
    at = corners + ((image * C + channel) * (h + 1) + row) * (w + 1) + column[None, :]
    exists = (channel < C) & (column <= w)[None, :]
    tl.store(at, by_a, mask=exists)
    tl.store(at + size, by_b, mask=exists)
    tl.store(at + 2 * size, by_c, mask=exists)
    tl.store(at + 3 * size, by_d, mask=exists)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0))


@triton.jit
def _pixels(
    logits,
    classes,  # None for the likeliest class
    out, h, w, H, W, image_stride, class_stride, row_stride, column_stride,
    C: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the cross-entropy, or the likeliest class, of a row of pixels."""
    image, y = tl.program_id(1) // H, tl.program_id(1) % H
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)[:, None]
    row = tl.maximum((y + 0.5) * (h / H) - 0.5, 0.0)
    column = tl.minimum(tl.maximum((x + 0.5) * (w / W) - 0.5, 0.0), w - 1.0)
    top, left = row.to(tl.int32), column.to(tl.int32)
    down, along = row - top, (column - left)[None, :]
    above = logits + image * image_stride + channel * class_stride + top * row_stride
    below = above + tl.where(top + 1 < h, row_stride, 0)
    one, other = (left * column_stride)[None, :], (tl.minimum(left + 1, w - 1) * column_stride)[None, :]
    a = tl.load(above + one, mask=channel < C, other=ABSENT).to(tl.float32)
    b = tl.load(above + other, mask=channel < C, other=ABSENT).to(tl.float32)
    c = tl.load(below + one, mask=channel < C, other=ABSENT).to(tl.float32)
    d = tl.load(below + other, mask=channel < C, other=ABSENT).to(tl.float32)
    score = (1 - down) * ((1 - along) * a + along * b) + down * ((1 - along) * c + along * d)
    pixel = (image * H + y) * W + x
    if classes is None:
        result = tl.argmax(score, axis=0).to(tl.uint8)
    else:
        own = channel == tl.load(classes + pixel, mask=x < W, other=0).to(tl.int32)[None, :]
        score -= tl.max(score, axis=0)[None, :]
        result = tl.abs(tl.log(tl.sum(tl.exp(score), axis=0)) - tl.sum(tl.where(own, score, 0.0), axis=0))
    tl.store(out + pixel, result, mask=x < W)
