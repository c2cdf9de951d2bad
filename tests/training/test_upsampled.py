"""Banded upsampling against torch's own, one step after the other and in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.data.classes import NUM_CLASSES, VOID
from tune_bisenet.training import losses as losses_module

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
    monkeypatch.setitem(
        losses_module.BAND_ELEMENTS, "cpu", 3 * NUM_CLASSES * large[1] * 5
    )  # several bands, the last short
    logits, targets = random_case(small, large)
    weights = torch.linspace(0, 2, NUM_CLASSES) if weighted else None
    banded, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = losses_module.cross_entropy(banded, targets, weights)
    full_size = F.interpolate(exact, size=large, mode="bilinear", align_corners=False)
    truth = F.cross_entropy(full_size, targets, None if weights is None else weights.double(), ignore_index=VOID)
    (3 * loss).backward()
    (3 * truth).backward()
    assert banded.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (banded.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


# --- hard pixels ------------------------------------------------------------------------------------------------


def pixel_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each labelled pixel, computed by torch in float64, the hardest first."""
    full_size = F.interpolate(logits.double(), size=targets.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(full_size, targets, ignore_index=VOID, reduction="none")
    return losses[targets != VOID].sort(descending=True).values


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 1 / 16), (0.001, 1 / 16), (1e-5, 0.3)])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_loss_and_gradient_of_hard_pixels_equal_those_of_upsampling_and_sorting(
    small: tuple[int, int], large: tuple[int, int], threshold: float, min_kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        losses_module.BAND_ELEMENTS, "cpu", 3 * NUM_CLASSES * large[1] * 5
    )  # several bands, the last short
    logits, targets = random_case(small, large)
    banded, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = losses_module.hard_cross_entropy(banded, targets, threshold=threshold, min_kept=min_kept)
    losses = pixel_losses(exact, targets)
    num_hard, min_number = int((losses > -math.log(threshold)).sum()), math.ceil(min_kept * len(losses))
    assert (num_hard < min_number) == (threshold == 1e-5), "both cases are tried"
    truth = losses[: max(num_hard, min_number)].mean()
    (3 * loss).backward()
    (3 * truth).backward()
    assert banded.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (banded.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


def test_hard_pixels_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8]]).log()
    logits, targets = scores.T.reshape(1, 3, 1, 4), torch.tensor([[[0, 0, 0, VOID]]])
    for threshold, min_kept, kept in [
        (0.6, 0.1, [0.5]),
        (0.85, 0.1, [0.5, 0.8]),
        (0.4, 0.1, [0.5]),  # none is hard: a tenth of three pixels, rounded up
        (0.4, 0.5, [0.5, 0.8]),
        (0.4, 1.0, [0.5, 0.8, 0.9]),
    ]:
        loss = losses_module.hard_cross_entropy(logits, targets, threshold=threshold, min_kept=min_kept)
        assert loss.item() == pytest.approx(-sum(map(math.log, kept)) / len(kept), rel=1e-5)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.5, 1.0), (math.nextafter(1.0, 0.0), 0.01)])
def test_where_all_pixels_are_kept_it_is_plain_cross_entropy(threshold: float, min_kept: float) -> None:
    logits, targets = random_case((12, 24), (96, 192))
    logits.requires_grad_()
    plain = losses_module.cross_entropy(logits, targets)
    hard = losses_module.hard_cross_entropy(logits, targets, threshold=threshold, min_kept=min_kept)
    assert hard == plain
    assert torch.equal(gradient_of(hard, logits), gradient_of(plain, logits))


def test_void_is_never_hard() -> None:
    logits, targets = random_case((8, 8), (8, 8))
    void = (targets == VOID).unsqueeze(1)
    others = (logits.where(~void, 100.0 * logits.flip(1))).requires_grad_()
    logits.requires_grad_()
    losses = [
        losses_module.hard_cross_entropy(given, targets, threshold=0.01, min_kept=0.5) for given in (logits, others)
    ]
    gradients = [gradient_of(*pair) for pair in zip(losses, (logits, others), strict=True)]
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)
    assert not gradients[0].where(void, 0.0).any()


def test_hard_pixels_of_nothing_but_void_have_loss_and_gradient_zero() -> None:
    logits = random_case((2, 4), (32, 64))[0].requires_grad_()
    targets = torch.full((3, 32, 64), VOID)
    loss = losses_module.hard_cross_entropy(logits, targets, threshold=0.7, min_kept=1 / 16)
    assert loss == 0.0
    assert not gradient_of(loss, logits).any()


def test_pixels_as_hard_as_the_last_one_kept_are_kept_too() -> None:
    logits = torch.zeros(1, NUM_CLASSES, 4, 8, requires_grad=True)
    targets = torch.arange(32 * 64).reshape(1, 32, 64) % NUM_CLASSES
    loss = losses_module.hard_cross_entropy(logits, targets, threshold=0.01, min_kept=0.1)
    assert loss.item() == pytest.approx(math.log(NUM_CLASSES), rel=1e-6)
    plain = losses_module.cross_entropy(logits, targets)
    assert torch.equal(gradient_of(loss, logits), gradient_of(plain, logits))


def test_logits_that_are_no_numbers_are_not_passed_over() -> None:
    logits, targets = random_case((12, 24), (96, 192))
    logits[0, 3, 6, 7] = math.nan
    assert losses_module.hard_cross_entropy(logits, targets, threshold=0.7, min_kept=1 / 16).isnan()


def test_the_kth_largest_is_that_of_a_sort() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs() ** 9
    values[:100], values[100:120], values[120:130] = -1.0, 0.0, values[130]
    ordered = values.sort(descending=True).values
    for rank in (1, 2, 10, 500, 881, 890, 900):
        assert losses_module._kth_largest(values.reshape(10, 100), torch.tensor(rank)) == ordered[rank - 1]
    assert losses_module._kth_largest(values, torch.tensor(0)).isnan()


# --- predictions and bands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_the_likeliest_class_is_that_of_upsampling_first(small: tuple[int, int], large: tuple[int, int]) -> None:
    logits, _ = random_case(small, large)
    full_size = F.interpolate(logits, size=large, mode="bilinear", align_corners=False)
    predictions = losses_module.argmax(logits, large)
    assert predictions.dtype == torch.uint8
    assert (predictions == full_size.argmax(dim=1)).float().mean() > 0.9999  # but for ties within rounding


def test_the_number_of_bands_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = random_case((12, 24), (96, 192))
    whole, likeliest = losses_module.cross_entropy(logits, targets), losses_module.argmax(logits, (96, 192))
    monkeypatch.setitem(losses_module.BAND_ELEMENTS, "cpu", 1)
    assert losses_module.cross_entropy(logits, targets).item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(losses_module.argmax(logits, (96, 192)), likeliest)


def test_the_gradient_has_the_type_of_the_logits() -> None:
    logits, targets = random_case((12, 24), (96, 192))
    half = logits.bfloat16().requires_grad_()
    losses_module.cross_entropy(half, targets).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
