"""The losses against slow, literal float64 versions of their definitions, and against torch's own upsampling.

Shapes: B images, C classes, H x W pixels, P labelled pixels of all images together.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tune_bisenet.classes import CITYSCAPES, MAX_CLASSES, VOID
from tune_bisenet.config import OHEM, CrossEntropy, WeightedCrossEntropy
from tune_bisenet.training import losses as losses_module
from tune_bisenet.training.losses import (
    argmax,
    class_weights_from,
    cross_entropy,
    hard_cross_entropy,
    head_losses,
    lovasz_softmax,
)
from tune_bisenet.training.model import Logits, upsample

CLASS_WEIGHTS = torch.linspace(0.1, 50.0, len(CITYSCAPES))
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": cross_entropy,
    "weighted": partial(cross_entropy, class_weights=CLASS_WEIGHTS),
    "hard": partial(hard_cross_entropy, threshold=0.01, min_kept=0.5),
    "lovasz": lovasz_softmax,
}


def random_scores(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_targets(*shape: int, classes: int = len(CITYSCAPES), void_share: float = 0.0, seed: int = 1) -> Tensor:
    """Return int64 B x H x W with ids below `classes`, a share of them replaced by void."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < void_share, VOID)


def labelled_pixels(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return P x C scores and P targets, void left out."""
    labelled = targets.flatten() != VOID
    return scores.movedim(1, -1).flatten(0, -2)[labelled], targets.flatten()[labelled]


def with_gradient(loss: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the scores."""
    scores = scores.clone().requires_grad_()
    value = loss(scores)
    return value.detach(), torch.autograd.grad(value, scores)[0]


def relative_distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


# --- all losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_bands", [True, False])
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_void_pixels_change_neither_loss_nor_gradient_and_alone_they_make_both_zero(
    loss_of: Callable[[Tensor, Tensor], Tensor], in_bands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "in_bands", lambda _device: in_bands)
    scores, targets = random_scores(2, len(CITYSCAPES), 8, 8), random_targets(2, 8, 8, void_share=0.4)
    void = (targets == VOID).unsqueeze(1)
    others = scores.where(~void, 100.0 * random_scores(2, len(CITYSCAPES), 8, 8, seed=7))
    loss, gradient = with_gradient(lambda given: loss_of(given, targets), scores)
    other_loss, other_gradient = with_gradient(lambda given: loss_of(given, targets), others)
    assert loss == other_loss
    assert torch.equal(gradient, other_gradient)
    assert not gradient.where(void, 0.0).any()
    targets = torch.full((2, 4, 4), VOID)
    loss, gradient = with_gradient(lambda given: loss_of(given, targets), random_scores(2, len(CITYSCAPES), 4, 4))
    assert loss == 0.0
    assert not gradient.any()


# --- cross-entropy ----------------------------------------------------------------------------------------------


def literal_cross_entropy(scores: Tensor, targets: Tensor, class_weights: list[float]) -> float:
    """`sum(w[y] * -log p[y]) / sum(w[y])`, pixel by pixel."""
    losses, weights = 0.0, 0.0
    pixels, labels = labelled_pixels(scores.double(), targets)
    for pixel, label in zip(pixels.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(score) for score in pixel))
        losses += class_weights[label] * (log_sum - pixel[label])
        weights += class_weights[label]
    return losses / weights


def test_cross_entropy_is_the_mean_over_the_labelled_pixels_divided_by_their_weights() -> None:
    scores, targets = random_scores(2, len(CITYSCAPES), 6, 5), random_targets(2, 6, 5, void_share=0.3)
    plain = literal_cross_entropy(scores, targets, [1.0] * len(CITYSCAPES))
    weighted = literal_cross_entropy(scores, targets, CLASS_WEIGHTS.tolist())
    assert cross_entropy(scores, targets).item() == pytest.approx(plain, rel=1e-6)
    assert cross_entropy(scores, targets, CLASS_WEIGHTS).item() == pytest.approx(weighted, rel=1e-5)


def test_weighted_cross_entropy_of_two_pixels_by_hand() -> None:
    scores = torch.zeros(1, 3, 1, 3)
    scores[0, 0, 0, 0] = math.log(2.0)  # probabilities 1/2, 1/4, 1/4 at the first pixel; 1/3 each at the others
    targets = torch.tensor([[[0, 1, VOID]]])
    by_hand = (3.0 * math.log(2.0) + 1.0 * math.log(3.0)) / (3.0 + 1.0)
    assert cross_entropy(scores, targets, torch.tensor([3.0, 1.0, 9.0])).item() == pytest.approx(by_hand, rel=1e-6)


def test_cross_entropy_where_every_labelled_class_weighs_nothing_is_zero_with_a_zero_gradient() -> None:
    class_weights = torch.ones(len(CITYSCAPES))
    class_weights[3] = 0.0
    targets = torch.full((1, 4, 4), 3)
    scores = random_scores(1, len(CITYSCAPES), 4, 4)
    loss, gradient = with_gradient(lambda given: cross_entropy(given, targets, class_weights), scores)
    assert loss == 0.0
    assert not gradient.any()


# --- class weights ----------------------------------------------------------------------------------------------


def test_the_shares_of_cityscapes_give_the_known_weights() -> None:
    shares = [36.88, 6.09, 22.82, 0.656, 0.878, 1.227, 0.208, 0.551, 15.92, 1.159, 4.009, 1.219, 0.135, 7.00]
    shares += [0.268, 0.235, 0.233, 0.099, 0.414]
    counts = torch.tensor([round(share * 55_000_000) for share in shares])  # some 5.5e9 pixels: more than int32 holds
    weights = dict(zip(CITYSCAPES.names, class_weights_from(counts, 1.0).tolist(), strict=True))
    assert weights["road"] == pytest.approx(0.143, abs=5e-4)
    assert weights["motorcycle"] == pytest.approx(53.3, rel=5e-3)  # the shares have three digits
    assert min(weights, key=weights.__getitem__) == "road"
    assert max(weights, key=weights.__getitem__) == "motorcycle"


def test_no_class_outweighs_another_once_counts_are_taken_into_account() -> None:
    counts = torch.tensor([1, 10, 1000, 100_000])
    shares = class_weights_from(counts, 1.0).double() * counts
    assert shares.tolist() == pytest.approx([counts.sum().item() / 4] * 4, rel=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_class_weights_to_a_power_by_hand(exponent: float) -> None:
    by_hand = {0.0: [1.0, 0.0, 1.0], 0.5: [2 / 3, 0.0, 2 / math.sqrt(3)], 1.0: [4 / 9, 0.0, 4 / 3]}[exponent]
    assert class_weights_from(torch.tensor([75, 0, 25]), exponent).tolist() == pytest.approx(by_hand, rel=1e-6)
    assert class_weights_from(torch.zeros(3, dtype=torch.int64), 1.0).tolist() == [0.0, 0.0, 0.0]


def test_class_weights_of_the_first_power_by_hand_and_to_the_last_bit() -> None:
    by_hand = [100 / (3 * 60), 100 / (3 * 30), 100 / (3 * 10)]
    assert class_weights_from(torch.tensor([60, 30, 10]), 1.0).tolist() == pytest.approx(by_hand, rel=1e-6)
    counts = torch.randint(1, 2**33, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(class_weights_from(counts, 1.0), (counts.sum().double() / (500 * counts.double())).float())


# --- Lovász-Softmax ---------------------------------------------------------------------------------------------


def jaccard_loss(mispredicted: set[int], foreground: set[int]) -> float:
    """Return equation 6, `|M| / |{y = c} u M|`, for the set M of pixels that are wrong about class c."""
    return len(mispredicted) / len(foreground | mispredicted)


def literal_lovasz_softmax(scores: Tensor, targets: Tensor) -> Tensor:
    """Compute equations 8, 9 and 11, class by class and pixel by pixel; differentiable by float64 `scores`."""
    pixels, labels = labelled_pixels(scores, targets)
    probabilities = pixels.softmax(dim=1)
    losses = []
    for present in labels.unique().tolist():
        foreground = set((labels == present).nonzero().flatten().tolist())
        errors = ((labels == present).double() - probabilities[:, present]).abs()
        loss, mispredicted = scores.new_zeros(()), set[int]()
        for pixel in errors.argsort(descending=True).tolist():
            before = jaccard_loss(mispredicted, foreground)
            mispredicted.add(pixel)
            loss = loss + errors[pixel] * (jaccard_loss(mispredicted, foreground) - before)
        losses.append(loss)
    return torch.stack(losses).mean()


def assert_lovasz_is_that_of_the_paper(scores: Tensor, targets: Tensor, *, tolerance: float) -> None:
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    exact_loss, exact_gradient = with_gradient(lambda given: literal_lovasz_softmax(given, targets), scores.double())
    assert loss.item() == pytest.approx(exact_loss.item(), abs=1e-5)
    assert relative_distance(gradient, exact_gradient) < tolerance


@pytest.mark.parametrize(
    ("classes", "void_share", "spread"),
    [
        (len(CITYSCAPES), 0.0, 2.0),
        (len(CITYSCAPES), 0.3, 2.0),
        (3, 0.3, 2.0),
        (1, 0.0, 2.0),
        (5, 0.99, 2.0),
        (7, 0.2, 0.1),
    ],
    ids=["all classes", "void", "few classes", "one class", "nearly all void", "undecided"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_lovasz_softmax_is_that_of_the_paper(classes: int, void_share: float, spread: float, seed: int) -> None:
    scores = random_scores(2, len(CITYSCAPES), 15, 16, seed=seed, spread=spread)
    targets = random_targets(2, 15, 16, classes=classes, void_share=void_share, seed=seed + 10)
    assert_lovasz_is_that_of_the_paper(scores, targets, tolerance=1e-3)


def test_lovasz_softmax_of_a_confident_network_is_that_of_the_paper() -> None:
    """After 35 epochs of cross-entropy most errors are tiny and share few ranks: the hardest case for counting them."""
    targets = random_targets(2, 15, 16, classes=6, void_share=0.1)
    scores = random_scores(2, len(CITYSCAPES), 15, 16, spread=1.5)
    scores += 9.0 * F.one_hot(targets.where(targets != VOID, 0), len(CITYSCAPES)).movedim(3, 1)
    assert_lovasz_is_that_of_the_paper(scores, targets, tolerance=2e-3)


def test_lovasz_softmax_of_one_labelled_pixel_is_its_error() -> None:
    scores, targets = random_scores(2, len(CITYSCAPES), 3, 3), torch.full((2, 3, 3), VOID)
    targets[1, 2, 0] = 4
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    assert loss.item() == pytest.approx(1.0 - scores.softmax(dim=1)[1, 4, 2, 0].item(), abs=1e-6)
    assert gradient[1, :, 2, 0].any()
    assert gradient.count_nonzero() == gradient[1, :, 2, 0].count_nonzero()


def hard_scores(predictions: Tensor) -> Tensor:
    """Return scores whose softmax is 1 at the predicted class and 0 elsewhere, to the last bit of float32."""
    return 1000.0 * F.one_hot(predictions, len(CITYSCAPES)).movedim(3, 1).float()


@pytest.mark.parametrize("seed", range(4))
def test_lovasz_softmax_of_hard_predictions_is_the_mean_jaccard_loss_of_the_classes_present(seed: int) -> None:
    targets = random_targets(2, 12, 12, classes=6, void_share=0.2, seed=seed)
    predictions = random_targets(2, 12, 12, classes=8, seed=seed + 50)
    predictions = targets.where((random_scores(2, 12, 12, seed=seed) > 0) & (targets != VOID), predictions)
    labelled, ious = targets != VOID, []
    for present in targets[labelled].unique().tolist():
        in_label, in_prediction = (targets == present), (predictions == present) & labelled
        ious.append(((in_label & in_prediction).sum() / (in_label | in_prediction).sum()).item())
    expected = 1.0 - sum(ious) / len(ious)
    assert lovasz_softmax(hard_scores(targets.where(labelled, 0)), targets).item() == 0.0, "a perfect prediction"
    assert lovasz_softmax(hard_scores(predictions), targets).item() == pytest.approx(expected, abs=1e-6)


def test_lovasz_softmax_counts_the_classes_of_the_whole_batch() -> None:
    """Per image it would be another loss."""
    scores, targets = random_scores(2, len(CITYSCAPES), 8, 8), random_targets(2, 8, 8, classes=4)
    targets[0] = targets[0].clamp_max(1)
    per_image = torch.stack([lovasz_softmax(scores[[image]], targets[[image]]) for image in range(2)]).mean()
    exact = literal_lovasz_softmax(scores.double(), targets)
    assert lovasz_softmax(scores, targets).item() == pytest.approx(exact.item(), abs=1e-5)
    assert abs(per_image.item() - exact.item()) > 1e-3


def test_the_gradient_of_lovasz_softmax_says_how_the_loss_changes() -> None:
    scores = random_scores(1, len(CITYSCAPES), 12, 12)
    targets = random_targets(1, 12, 12, classes=5, void_share=0.1)
    _, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    steepest = gradient / gradient.norm()
    ahead, behind = (lovasz_softmax(scores + step * steepest, targets).item() for step in (0.05, -0.05))
    assert (ahead - behind) / 0.1 == pytest.approx(gradient.norm().item(), rel=0.01)


def test_following_the_gradient_of_lovasz_softmax_lets_the_iou_rise() -> None:
    targets = random_targets(1, 8, 8, classes=4, void_share=0.1)
    scores = random_scores(1, len(CITYSCAPES), 8, 8).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.3)
    first = lovasz_softmax(scores, targets).item()
    for _ in range(60):
        optimizer.zero_grad()
        lovasz_softmax(scores, targets).backward()
        optimizer.step()
    assert first > 0.8
    assert lovasz_softmax(scores, targets).item() < 0.1


# --- other numbers of classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_bands", [True, False])
@pytest.mark.parametrize("num_classes", [2, 5, 20, MAX_CLASSES])
def test_losses_and_predictions_are_right_for_other_numbers_of_classes(
    num_classes: int, in_bands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "in_bands", lambda _device: in_bands)
    scores = random_scores(2, num_classes, 6, 5)
    targets = random_targets(2, 6, 5, classes=num_classes, void_share=0.3)
    weights = torch.linspace(0.1, 5.0, num_classes)
    plain, weighted = (
        literal_cross_entropy(scores, targets, each.tolist()) for each in (torch.ones_like(weights), weights)
    )
    assert cross_entropy(scores, targets).item() == pytest.approx(plain, rel=1e-6)
    assert cross_entropy(scores, targets, weights).item() == pytest.approx(weighted, rel=1e-5)
    pixels, labels = labelled_pixels(scores.double(), targets)
    hardest = F.cross_entropy(pixels, labels, reduction="none").topk(math.ceil(0.25 * len(labels))).values
    hard = hard_cross_entropy(scores, targets, threshold=1e-9, min_kept=0.25)
    assert hard.item() == pytest.approx(hardest.mean().item(), rel=1e-5)
    assert_lovasz_is_that_of_the_paper(scores, targets, tolerance=2e-3)
    large = upsample(scores, (12, 10)).argmax(dim=1)
    assert (argmax(scores, (12, 10)) == large).float().mean() > 0.99


# --- three heads ------------------------------------------------------------------------------------------------


def random_logits() -> Logits:
    """Return the heads of a 16 x 32 image: the main one and the first auxiliary one at 1/8, the second at 1/16."""
    aux = (random_scores(2, len(CITYSCAPES), 2, 4, seed=1), random_scores(2, len(CITYSCAPES), 1, 2, seed=2))
    return Logits(random_scores(2, len(CITYSCAPES), 2, 4, seed=0), aux)


LABELS = random_targets(2, 16, 32, classes=6, void_share=0.1).to(torch.uint8)


def alone(logits: Tensor, class_weights: Tensor | None = None) -> float:
    """Return the cross-entropy of one head, computed by torch."""
    full_size = F.interpolate(logits, size=(16, 32), mode="bilinear", align_corners=False)
    targets = LABELS.long()
    return F.cross_entropy(full_size, targets, class_weights, ignore_index=VOID).item()


@pytest.mark.parametrize("aux_weight", [0.0, 0.4, 1.0])
def test_the_total_is_the_main_loss_and_alpha_times_the_auxiliary_ones(aux_weight: float) -> None:
    logits = random_logits()
    # Without a switch, epoch 10,000 is as epoch 1.
    parts = head_losses(logits, LABELS, CrossEntropy(aux_weight=aux_weight), class_weights=None, epoch=10_000)
    main, aux1, aux2 = alone(logits.main), alone(logits.aux[0]), alone(logits.aux[1])
    assert [part.item() for part in parts[1:]] == pytest.approx([main, aux1, aux2], rel=1e-5)
    assert parts.total.item() == pytest.approx(main + aux_weight * (aux1 + aux2), rel=1e-5)


def test_class_weights_act_on_all_three_heads_and_to_the_power_of_0_on_none() -> None:
    logits, loss = random_logits(), WeightedCrossEntropy(aux_weight=1.0)
    parts = head_losses(logits, LABELS, loss, class_weights=CLASS_WEIGHTS, epoch=1)
    expected = [alone(head, CLASS_WEIGHTS) for head in (logits.main, *logits.aux)]
    assert [part.item() for part in parts[1:]] == pytest.approx(expected, rel=1e-5)
    counts = torch.bincount(LABELS.flatten().long(), minlength=VOID + 1)[: len(CITYSCAPES)]
    assert not counts.all(), "some class never occurs"
    plain, weighted = (
        head_losses(random_logits(), LABELS, loss, class_weights=class_weights, epoch=1)
        for loss, class_weights in (
            (CrossEntropy(aux_weight=1.0), None),
            (WeightedCrossEntropy(aux_weight=1.0, exponent=0.0), class_weights_from(counts, 0.0)),
        )
    )
    assert weighted == plain


def alone_of_hard_pixels(logits: Tensor, num_kept: int) -> float:
    """Average, by torch, the cross-entropy of one head's `num_kept` hardest pixels, and those as hard as the last."""
    full_size = F.interpolate(logits, size=(16, 32), mode="bilinear", align_corners=False)
    losses = F.cross_entropy(full_size, LABELS.long(), ignore_index=VOID, reduction="none")
    last = losses.flatten().topk(num_kept).values[-1]
    return losses[losses > last - 1e-5].mean().item()


def test_hard_pixels_are_chosen_for_each_head_and_the_main_one_turns_to_lovasz() -> None:
    logits = random_logits()
    loss = OHEM(aux_weight=0.4, threshold=1e-9, min_kept=0.25, lovasz_after=3)  # no pixel is that hard
    before, after = (head_losses(logits, LABELS, loss, class_weights=None, epoch=epoch) for epoch in (3, 4))
    num_kept = math.ceil(0.25 * int((LABELS != VOID).sum()))
    main, aux1, aux2 = (alone_of_hard_pixels(head, num_kept) for head in (logits.main, *logits.aux))
    assert [part.item() for part in before[1:]] == pytest.approx([main, aux1, aux2], rel=1e-4)
    assert before.total.item() == pytest.approx(main + 0.4 * (aux1 + aux2), rel=1e-4)
    assert after[2:] == before[2:]
    assert after.main == lovasz_softmax(upsample(logits.main, (16, 32)), LABELS.long())


def test_the_main_head_turns_to_lovasz_after_epoch_35_and_the_auxiliary_heads_never_do() -> None:
    logits, loss = random_logits(), CrossEntropy(aux_weight=1.0, lovasz_after=35)
    first, epoch_35, epoch_36, last = (
        head_losses(logits, LABELS, loss, class_weights=None, epoch=epoch) for epoch in (1, 35, 36, 50)
    )
    main, aux1, aux2 = alone(logits.main), alone(logits.aux[0]), alone(logits.aux[1])
    lovasz = literal_lovasz_softmax(upsample(logits.main, (16, 32)).double(), LABELS.long()).item()
    for cross_entropies in (first, epoch_35):
        assert [part.item() for part in cross_entropies[1:]] == pytest.approx([main, aux1, aux2], rel=1e-5)
    from_the_start = CrossEntropy(aux_weight=1.0, lovasz_after=0)
    for switched in (epoch_36, last, head_losses(logits, LABELS, from_the_start, class_weights=None, epoch=1)):
        assert [part.item() for part in switched[1:]] == pytest.approx([lovasz, aux1, aux2], rel=1e-4)
        assert switched.total.item() == pytest.approx(lovasz + aux1 + aux2, rel=1e-4)


@pytest.mark.parametrize("kind", [CrossEntropy, WeightedCrossEntropy, OHEM])
def test_labels_of_nothing_but_void_teach_no_head_anything(
    kind: type[CrossEntropy | WeightedCrossEntropy | OHEM],
) -> None:
    heads = [head.requires_grad_() for head in (random_logits().main, *random_logits().aux)]
    labels = torch.full((2, 16, 32), VOID, dtype=torch.uint8)
    for epoch in (1, 2):
        loss = kind(aux_weight=1.0, lovasz_after=1)
        parts = head_losses(Logits(heads[0], tuple(heads[1:])), labels, loss, class_weights=None, epoch=epoch)
        parts.total.backward()
        assert [part.item() for part in parts] == [0.0] * 4
    assert not any(head.grad.any() for head in heads if head.grad is not None)


# --- upsampling in bands, against upsampling first ----------------------------------------------------------------

SIZES = [((12, 24), (96, 192)), ((6, 12), (96, 192)), ((2, 4), (32, 64)), ((13, 15), (90, 100)), ((8, 8), (8, 8))]


def random_case(small: tuple[int, int], large: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, len(CITYSCAPES), *small, generator=generator)
    targets = torch.randint(0, len(CITYSCAPES), (3, *large), generator=generator)
    targets[:, :3] = VOID
    targets[1] = VOID
    return logits, targets


def use_several_bands(large: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a band have five rows; the last one is short."""
    monkeypatch.setattr(losses_module, "BAND_ELEMENTS", 3 * len(CITYSCAPES) * large[1] * 5)


def assert_close(
    loss_of: Callable[[Tensor], Tensor], exact_loss_of: Callable[[Tensor], Tensor], logits: Tensor
) -> None:
    loss, gradient = with_gradient(lambda given: 3 * loss_of(given), logits)
    exact_loss, exact_gradient = with_gradient(lambda given: 3 * exact_loss_of(given), logits.double())
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    assert relative_distance(gradient, exact_gradient) < 1e-5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_loss_and_gradient_equal_those_of_upsampling_first(
    small: tuple[int, int], large: tuple[int, int], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_several_bands(large, monkeypatch)
    logits, targets = random_case(small, large)
    weights = torch.linspace(0, 2, len(CITYSCAPES), dtype=torch.float64) if weighted else None

    def exact_loss(exact: Tensor) -> Tensor:
        full_size = F.interpolate(exact, size=large, mode="bilinear", align_corners=False)
        return F.cross_entropy(full_size, targets, weights, ignore_index=VOID)

    class_weights = None if weights is None else weights.float()
    assert_close(lambda given: cross_entropy(given, targets, class_weights), exact_loss, logits)


# --- hard pixels ------------------------------------------------------------------------------------------------


def pixel_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each labelled pixel, computed by torch in float64, the hardest first."""
    full_size = F.interpolate(logits.double(), size=targets.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(full_size, targets, ignore_index=VOID, reduction="none")
    return losses[targets != VOID].sort(descending=True).values


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 1 / 16), (0.001, 1 / 16), (1e-5, 0.3)])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_loss_and_gradient_of_hard_pixels_equal_those_of_upsampling_and_sorting(
    small: tuple[int, int], large: tuple[int, int], threshold: float, min_kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_several_bands(large, monkeypatch)
    logits, targets = random_case(small, large)

    def exact_loss(exact: Tensor) -> Tensor:
        losses = pixel_losses(exact, targets)
        num_hard, min_number = int((losses > -math.log(threshold)).sum()), math.ceil(min_kept * len(losses))
        assert (num_hard < min_number) == (threshold == 1e-5), "both cases are tried"
        return losses[: max(num_hard, min_number)].mean()

    hard = partial(hard_cross_entropy, targets=targets, threshold=threshold, min_kept=min_kept)
    assert_close(hard, exact_loss, logits)


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
        loss = hard_cross_entropy(logits, targets, threshold=threshold, min_kept=min_kept)
        assert loss.item() == pytest.approx(-sum(map(math.log, kept)) / len(kept), rel=1e-5)


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.5, 1.0), (math.nextafter(1.0, 0.0), 0.01)])
def test_where_all_pixels_are_kept_it_is_plain_cross_entropy(threshold: float, min_kept: float) -> None:
    logits, targets = random_case((12, 24), (96, 192))
    plain, plain_gradient = with_gradient(lambda given: cross_entropy(given, targets), logits)
    hard = partial(hard_cross_entropy, targets=targets, threshold=threshold, min_kept=min_kept)
    loss, gradient = with_gradient(hard, logits)
    assert loss == plain
    assert torch.equal(gradient, plain_gradient)


def test_pixels_as_hard_as_the_last_one_kept_are_kept_too() -> None:
    logits = torch.zeros(1, len(CITYSCAPES), 4, 8)
    targets = torch.arange(32 * 64).reshape(1, 32, 64) % len(CITYSCAPES)
    hard = partial(hard_cross_entropy, targets=targets, threshold=0.01, min_kept=0.1)
    loss, gradient = with_gradient(hard, logits)
    assert loss.item() == pytest.approx(math.log(len(CITYSCAPES)), rel=1e-6)
    assert torch.equal(gradient, with_gradient(lambda given: cross_entropy(given, targets), logits)[1])


def test_logits_that_are_no_numbers_are_not_passed_over() -> None:
    logits, targets = random_case((12, 24), (96, 192))
    logits[0, 3, 6, 7] = math.nan
    assert hard_cross_entropy(logits, targets, threshold=0.7, min_kept=1 / 16).isnan()


@pytest.mark.parametrize("in_bands", [True, False])
def test_the_kth_largest_is_that_of_a_sort(in_bands: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "in_bands", lambda _device: in_bands)
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
    predictions = argmax(logits, large)
    assert predictions.dtype == torch.uint8
    assert (predictions == full_size.argmax(dim=1)).float().mean() > 0.9999  # but for ties within rounding


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_upsampling_at_once_as_on_a_gpu_gives_the_same(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    small: tuple[int, int],
    large: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, targets = random_case(small, large)
    scores = upsample(logits, large) if loss_of is lovasz_softmax else logits
    loss, gradient = with_gradient(lambda given: loss_of(given, targets), scores)
    likeliest = argmax(logits, large)
    monkeypatch.setattr(losses_module, "in_bands", lambda _device: False)
    other_loss, other_gradient = with_gradient(lambda given: loss_of(given, targets), scores)
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_distance(other_gradient, gradient.double()) < 1e-5
    assert (argmax(logits, large) == likeliest).float().mean() > 0.9999  # but for ties within rounding
    assert argmax(logits, large).dtype == torch.uint8


def test_the_number_of_bands_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = random_case((12, 24), (96, 192))
    whole, likeliest = cross_entropy(logits, targets), argmax(logits, (96, 192))
    monkeypatch.setattr(losses_module, "BAND_ELEMENTS", 1)
    assert cross_entropy(logits, targets).item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(argmax(logits, (96, 192)), likeliest)


def test_losses_are_computed_in_float32_and_the_gradient_has_the_type_of_the_logits() -> None:
    logits, targets = random_case((12, 24), (96, 192))
    loss, gradient = with_gradient(lambda given: cross_entropy(given, targets), logits.bfloat16())
    assert gradient.dtype == torch.bfloat16
    assert loss == cross_entropy(logits.bfloat16().float(), targets)


# --- results that a GPU repeats ---------------------------------------------------------------------------------


UNREPEATABLE = {
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "nll_loss_forward",
    "nll_loss_backward",
    "nll_loss2d_forward",
    "nll_loss2d_backward",
    "histc",
    "put_",
    "scatter_reduce",
}
"""Kernels of which torch.use_deterministic_algorithms says that none repeats its results on a GPU."""


class Kernels(TorchDispatchMode):
    """Records the names of the kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [CrossEntropy, WeightedCrossEntropy, OHEM])
@pytest.mark.parametrize("epoch", [1, 2])
def test_on_a_gpu_that_must_repeat_its_results_no_loss_uses_a_kernel_that_cannot(
    kind: Any, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_must_repeat": True, "in_bands": False, "_kernels_for": None}.items():
        monkeypatch.setattr(losses_module, name, lambda *_arguments, value=value: value)
    logits = random_logits()
    main, *aux = (part.clone().requires_grad_() for part in (logits.main, *logits.aux))
    loss = kind(aux_weight=1.0, lovasz_after=1)
    with Kernels() as kernels:
        parts = head_losses(Logits(main, tuple(aux)), LABELS, loss, class_weights=CLASS_WEIGHTS, epoch=epoch)
        parts.total.backward()
    assert "gather" in kernels.names
    assert kernels.names & UNREPEATABLE == set()


def test_upsampling_by_matrices_equals_that_of_interpolate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "_must_repeat", lambda _device: True)
    scores = random_scores(2, len(CITYSCAPES), 8, 16)
    weights = random_scores(2, len(CITYSCAPES), 64, 128, seed=1)
    by_matrices, interpolated = losses_module._full_size, upsample
    assert torch.allclose(by_matrices(scores, (64, 128)), interpolated(scores, (64, 128)), atol=1e-5)
    _, found = with_gradient(lambda scores: (by_matrices(scores, (64, 128)) * weights).sum(), scores)
    _, exact = with_gradient(lambda scores: (interpolated(scores, (64, 128)) * weights).sum(), scores)
    assert relative_distance(found, exact) < 1e-6
