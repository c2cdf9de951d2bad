"""Write how far the kernels are from float64, as JSON: a program for Triton's interpreter, which has to know at once.

TRITON_INTERPRET=1 python tests/training/kernel_errors.py
"""

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.training import kernels, losses

CASES = [  # factor, h, w, images, type of the logits, classes; odd sizes, one logit a side, more cells than a program
    (2, 5, 9, 2, torch.float32, len(CITYSCAPES)),
    (2, 3, 7, 1, torch.bfloat16, len(CITYSCAPES)),
    (4, 1, 8, 1, torch.float32, len(CITYSCAPES)),
    (8, 1, 2, 1, torch.float32, len(CITYSCAPES)),
    (16, 1, 1, 1, torch.float32, len(CITYSCAPES)),
    *((2, 2, 3, 1, torch.float32, num_classes) for num_classes in (2, 5, 20)),
]


def errors(
    factor: int, height: int, width: int, num_images: int, dtype: torch.dtype, num_classes: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(factor)
    size = (factor * height, factor * width)
    class_weights = torch.linspace(0.1, 50.0, num_classes)
    logits = 3 * torch.randn(num_images, num_classes, height, width, generator=generator)
    logits = logits.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    classes = torch.randint(num_classes, (num_images, *size), generator=generator)
    weights = class_weights[classes]
    weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0.0  # void
    exact_logits = logits.detach().double().requires_grad_()
    full_size = F.interpolate(exact_logits, size=size, mode="bilinear", align_corners=False)
    exact_losses = F.cross_entropy(full_size, classes, reduction="none")
    exact = 3 * (exact_losses * weights).sum()
    (exact_gradient,) = torch.autograd.grad(exact, exact_logits)

    total = 3 * kernels.cross_entropy_sum(logits, classes, weights)
    (gradient,) = torch.autograd.grad(total, logits)
    if factor == 2:  # of the larger factors one pass takes seconds
        again = torch.autograd.grad(3 * kernels.cross_entropy_sum(logits, classes, weights), logits)[0]
        mean = losses.cross_entropy(logits, classes.where(weights > 0, VOID), class_weights)
        void = losses.cross_entropy(logits, torch.full_like(classes, VOID))
    else:
        again, mean, void = gradient, total / 3 / weights.sum(), torch.zeros(())
    by_pixel = kernels.losses_by_pixel(logits, classes)
    best_two = full_size.topk(2, dim=1).values
    decided = best_two[:, 0] - best_two[:, 1] > 1e-5
    wrong = kernels.likeliest_classes(logits, size) != full_size.argmax(dim=1)
    return {
        "factor": factor,
        "dtype": str(dtype),
        "loss": abs((total - exact) / exact).item(),
        "mean": abs((3 * mean * weights.sum() - exact) / exact).item(),
        "gradient": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
        "pixels": (by_pixel - exact_losses).abs().max().item(),
        "negative": int((by_pixel < 0).sum()),
        "wrong": int((wrong & decided).sum()),
        "void": void.item(),
        "repeats": torch.equal(gradient, again),
        "layout": gradient.stride() == logits.stride(),
        "supported": kernels.supports(logits, size),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses.in_bands = lambda _device: False  # as on a GPU
    json.dump([errors(*case) for case in CASES], sys.stdout)
