"""Compare loss and prediction of upsampled logits in bands with torch's upsampling, then its loss or argmax.

python benchmarks/upsampled.py [--size 512x1024] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.training import losses

Timed = Callable[[Tensor, Tensor], Tensor]


def loss_in_bands(logits: Tensor, targets: Tensor) -> Tensor:
    losses.cross_entropy(logits, targets).backward()
    return take_gradient(logits)


def loss_of_all(logits: Tensor, targets: Tensor) -> Tensor:
    full_size = F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)
    F.cross_entropy(full_size, targets, ignore_index=VOID).backward()
    return take_gradient(logits)


def take_gradient(logits: Tensor) -> Tensor:
    gradient, logits.grad = logits.grad, None
    assert gradient is not None
    return gradient


def argmax_in_bands(logits: Tensor, targets: Tensor) -> Tensor:
    return losses.argmax(logits.detach(), (targets.shape[1], targets.shape[2]))


def argmax_of_all(logits: Tensor, targets: Tensor) -> Tensor:
    full_size = F.interpolate(logits.detach(), size=targets.shape[1:], mode="bilinear", align_corners=False)
    return full_size.argmax(dim=1)


def timed(function: Timed, logits: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    started = time.process_time()
    result = function(logits, targets)
    return time.process_time() - started, result.double()


def compare(name: str, banded: Timed, whole: Timed, logits: Tensor, targets: Tensor, repeats: int) -> None:
    """Print CPU milliseconds side by side, their ratio, and how far the results are apart."""
    pairs = [[timed(function, logits, targets) for function in (banded, whole)] for _ in range(repeats)]
    ratios = [slow / fast for (fast, _), (slow, _) in pairs]
    (fast, ours), (slow, theirs) = pairs[-1]
    apart = float((ours - theirs).norm() / theirs.norm())
    print(f"{name}: {1000 * fast:.0f} ms in bands, {1000 * slow:.0f} ms at once, apart by {apart:.1e} of the norm")
    print(f"  at once / in bands: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def run(height: int, width: int, repeats: int) -> None:
    """Print both methods side by side, on a batch of four."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, len(CITYSCAPES), height // 8, width // 8, generator=generator)).requires_grad_()
    targets = torch.randint(0, len(CITYSCAPES), (4, height, width), generator=generator)
    targets[:, : height // 20] = VOID
    print(f"4 x {len(CITYSCAPES)} x {height} x {width}, one thread, n = {repeats}")
    compare("loss and gradient", loss_in_bands, loss_of_all, logits, targets, repeats)
    compare("prediction", argmax_in_bands, argmax_of_all, logits, targets, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    run(*map(int, arguments.size.split("x")), arguments.repeats)
