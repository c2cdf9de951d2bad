"""Compare Lovász-Softmax by counting errors in bins with the textbook sort: time, and distance from float64.

python benchmarks/lovasz.py [--size 256x512] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.training.losses import lovasz_softmax


def by_sorting(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the loss by its definition, in the precision of `scores`: sorted errors, each with its Jaccard weight."""
    labels = targets.flatten()
    labelled = labels != VOID
    probabilities = scores.softmax(dim=1).movedim(1, 0).flatten(1)[:, labelled]
    losses = []
    for train_id in labels[labelled].unique():
        foreground = (labels[labelled] == train_id).to(scores.dtype)
        errors, order = (foreground - probabilities[train_id]).abs().sort(descending=True)
        hits = foreground[order]
        jaccard = 1 - (hits.sum() - hits.cumsum(0)) / (hits.sum() + (1 - hits).cumsum(0))
        losses.append(torch.dot(errors, torch.cat((jaccard[:1], jaccard.diff()))))
    return torch.stack(losses).mean()


def measure(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the CPU seconds of forward and backward, the loss, and its gradient."""
    leaf = scores.clone().requires_grad_()
    started = time.process_time()
    value = loss(leaf, targets)
    value.backward()
    assert leaf.grad is not None
    return time.process_time() - started, value.detach(), leaf.grad


def run(height: int, width: int, repeats: int) -> None:
    """Print both methods side by side, on a batch of four."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, len(CITYSCAPES), height, width, generator=generator)
    targets = torch.randint(0, 12, (4, height, width), generator=generator)
    targets[:, : height // 20] = VOID
    _, truth, true_gradient = measure(by_sorting, scores.double(), targets)
    seconds: dict[str, list[float]] = {"bins": [], "sort": []}
    for _ in range(repeats):  # side by side, so that both meet the same noise
        for name, loss in (("bins", lovasz_softmax), ("sort", by_sorting)):
            spent, value, gradient = measure(loss, scores, targets)
            seconds[name].append(spent)
            error = (gradient - true_gradient).norm() / true_gradient.norm()
            print(f"{name}: {1000 * spent:6.0f} ms  loss off by {abs(value - truth):.1e}  gradient by {error:.1e}")
    ratios = [sort / bins for sort, bins in zip(seconds["sort"], seconds["bins"], strict=True)]
    print(f"sort / bins: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, n = {repeats}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256x512")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    run(*map(int, arguments.size.split("x")), arguments.repeats)
