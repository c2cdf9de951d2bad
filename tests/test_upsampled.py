"""Banded upsampling against torch's own, one step after the other and in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet import upsampled
from tune_bisenet.data.classes import NUM_CLASSES, VOID

SIZES = [((12, 24), (96, 192)), ((6, 12), (96, 192)), ((2, 4), (32, 64)), ((13, 15), (90, 100)), ((8, 8), (8, 8))]


def random_case(small: tuple[int, int], large: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, NUM_CLASSES, *small, generator=generator)
    targets = torch.randint(0, NUM_CLASSES, (3, *large), generator=generator)
    targets[:, :3] = VOID
    targets[1] = VOID
    return logits, targets


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_loss_and_gradient_equal_those_of_upsampling_first(
    small: tuple[int, int], large: tuple[int, int], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(upsampled.BAND_ELEMENTS, "cpu", 3 * NUM_CLASSES * large[1] * 5)  # several bands, the last short
    logits, targets = random_case(small, large)
    weights = torch.linspace(0, 2, NUM_CLASSES) if weighted else None
    banded, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = upsampled.cross_entropy(banded, targets, weights)
    full_size = F.interpolate(exact, size=large, mode="bilinear", align_corners=False)
    truth = F.cross_entropy(full_size, targets, None if weights is None else weights.double(), ignore_index=VOID)
    (3 * loss).backward()
    (3 * truth).backward()
    assert banded.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (banded.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_the_likeliest_class_is_that_of_upsampling_first(small: tuple[int, int], large: tuple[int, int]) -> None:
    logits, _ = random_case(small, large)
    full_size = F.interpolate(logits, size=large, mode="bilinear", align_corners=False)
    predictions = upsampled.argmax(logits, large)
    assert predictions.dtype == torch.uint8
    assert (predictions == full_size.argmax(dim=1)).float().mean() > 0.9999  # but for ties within rounding


def test_the_number_of_bands_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = random_case((12, 24), (96, 192))
    whole = upsampled.cross_entropy(logits, targets)
    monkeypatch.setitem(upsampled.BAND_ELEMENTS, "cpu", 1)
    assert upsampled.cross_entropy(logits, targets).item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(upsampled.argmax(logits, (96, 192)), upsampled.argmax(logits, (96, 192)))


def test_the_gradient_has_the_type_of_the_logits() -> None:
    logits, targets = random_case((12, 24), (96, 192))
    half = logits.bfloat16().requires_grad_()
    upsampled.cross_entropy(half, targets).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
