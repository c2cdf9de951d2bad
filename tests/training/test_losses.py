"""The losses against slow, literal float64 versions of their definitions.

Shapes: B images, C classes, H x W pixels, P labelled pixels of all images together.
"""

import math

import pytest
import torch
from torch import Tensor

from tune_bisenet.config import OHEM, CrossEntropy, WeightedCrossEntropy
from tune_bisenet.data.classes import CLASS_NAMES, NUM_CLASSES, VOID
from tune_bisenet.training.losses import class_weights_from, cross_entropy, head_losses, lovasz_softmax, uses_lovasz
from tune_bisenet.training.model import Logits, upsample


def random_scores(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_targets(*shape: int, classes: int = NUM_CLASSES, void_share: float = 0.0, seed: int = 1) -> Tensor:
    """int64 B x H x W with ids below `classes`, a share of them replaced by void."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < void_share, VOID)


def labelled_pixels(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """P x C scores and P targets, void left out."""
    labelled = targets.flatten() != VOID
    return scores.movedim(1, -1).flatten(0, -2)[labelled], targets.flatten()[labelled]


def with_gradient(loss, scores: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The loss and its gradient with respect to the scores."""
    scores = scores.clone().requires_grad_()
    value = loss(scores)
    value.backward()
    assert scores.grad is not None
    return value.detach(), scores.grad


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


def test_cross_entropy_is_the_mean_over_the_labelled_pixels() -> None:
    scores, targets = random_scores(2, NUM_CLASSES, 6, 5), random_targets(2, 6, 5, void_share=0.3)
    expected = literal_cross_entropy(scores, targets, [1.0] * NUM_CLASSES)
    assert cross_entropy(scores, targets).item() == pytest.approx(expected, rel=1e-6)


def test_weighted_cross_entropy_divides_by_the_weights_of_the_labelled_pixels() -> None:
    scores, targets = random_scores(2, NUM_CLASSES, 6, 5), random_targets(2, 6, 5, void_share=0.3)
    class_weights = torch.linspace(0.1, 50.0, NUM_CLASSES)
    expected = literal_cross_entropy(scores, targets, class_weights.tolist())
    assert cross_entropy(scores, targets, class_weights).item() == pytest.approx(expected, rel=1e-5)


def test_weighted_cross_entropy_of_two_pixels_by_hand() -> None:
    scores = torch.zeros(1, 3, 1, 3)
    scores[0, 0, 0, 0] = math.log(2.0)  # probabilities 1/2, 1/4, 1/4 at the first pixel; 1/3 each at the others
    targets = torch.tensor([[[0, 1, VOID]]])
    by_hand = (3.0 * math.log(2.0) + 1.0 * math.log(3.0)) / (3.0 + 1.0)
    assert cross_entropy(scores, targets, torch.tensor([3.0, 1.0, 9.0])).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("class_weights", [None, torch.linspace(0.1, 50.0, NUM_CLASSES)], ids=["plain", "weighted"])
def test_what_is_scored_at_void_pixels_changes_neither_cross_entropy_nor_its_gradient(
    class_weights: Tensor | None,
) -> None:
    scores, targets = random_scores(2, NUM_CLASSES, 8, 8), random_targets(2, 8, 8, void_share=0.4)
    void = (targets == VOID).unsqueeze(1)
    others = scores.where(~void, 100.0 * random_scores(2, NUM_CLASSES, 8, 8, seed=7))
    loss, gradient = with_gradient(lambda given: cross_entropy(given, targets, class_weights), scores)
    other_loss, other_gradient = with_gradient(lambda given: cross_entropy(given, targets, class_weights), others)
    assert loss == other_loss
    assert torch.equal(gradient, other_gradient)
    assert not gradient.where(void, 0.0).any()


@pytest.mark.parametrize("class_weights", [None, torch.ones(NUM_CLASSES)], ids=["plain", "weighted"])
def test_cross_entropy_of_nothing_but_void_is_zero_with_a_zero_gradient(class_weights: Tensor | None) -> None:
    targets = torch.full((2, 4, 4), VOID)
    scores = random_scores(2, NUM_CLASSES, 4, 4)
    loss, gradient = with_gradient(lambda given: cross_entropy(given, targets, class_weights), scores)
    assert loss == 0.0
    assert not gradient.any()


def test_cross_entropy_where_every_labelled_class_weighs_nothing_is_zero_with_a_zero_gradient() -> None:
    class_weights = torch.ones(NUM_CLASSES)
    class_weights[3] = 0.0
    targets = torch.full((1, 4, 4), 3)
    scores = random_scores(1, NUM_CLASSES, 4, 4)
    loss, gradient = with_gradient(lambda given: cross_entropy(given, targets, class_weights), scores)
    assert loss == 0.0
    assert not gradient.any()


def test_cross_entropy_is_computed_in_float32_whatever_it_is_given() -> None:
    scores, targets = random_scores(1, NUM_CLASSES, 4, 4).bfloat16(), random_targets(1, 4, 4)
    assert cross_entropy(scores, targets) == cross_entropy(scores.float(), targets)


# --- class weights ----------------------------------------------------------------------------------------------


def test_class_weights_of_a_count_by_hand() -> None:
    counts = torch.tensor([60, 30, 10])
    by_hand = [100 / (3 * 60), 100 / (3 * 30), 100 / (3 * 10)]
    assert class_weights_from(counts, 1.0).tolist() == pytest.approx(by_hand, rel=1e-6)


def test_a_class_that_never_occurs_weighs_nothing() -> None:
    weights = class_weights_from(torch.tensor([75, 0, 25]), 1.0)
    assert weights.tolist() == pytest.approx([100 / 225, 0.0, 100 / 75], rel=1e-6)
    assert class_weights_from(torch.zeros(3, dtype=torch.int64), 1.0).tolist() == [0.0, 0.0, 0.0]


def test_the_shares_of_cityscapes_give_the_known_weights() -> None:
    shares = [36.88, 6.09, 22.82, 0.656, 0.878, 1.227, 0.208, 0.551, 15.92, 1.159, 4.009, 1.219, 0.135, 7.00]
    shares += [0.268, 0.235, 0.233, 0.099, 0.414]
    counts = torch.tensor([round(share * 55_000_000) for share in shares])  # some 5.5e9 pixels: more than int32 holds
    weights = dict(zip(CLASS_NAMES, class_weights_from(counts, 1.0).tolist(), strict=True))
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


def test_the_first_power_changes_no_bit_of_a_class_weight() -> None:
    counts = torch.randint(1, 2**33, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(class_weights_from(counts, 1.0), (counts.sum().double() / (500 * counts.double())).float())


# --- Lovász-Softmax ---------------------------------------------------------------------------------------------


def jaccard_loss(mispredicted: set[int], foreground: set[int]) -> float:
    """Equation 6 of the paper: `|M| / |{y = c} u M|` for the set M of pixels that are wrong about class c."""
    return len(mispredicted) / len(foreground | mispredicted)


def literal_lovasz_softmax(scores: Tensor, targets: Tensor) -> Tensor:
    """Equations 8, 9 and 11, class by class and pixel by pixel; differentiable with respect to float64 `scores`."""
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


def relative_distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("classes", "void_share", "spread"),
    [(NUM_CLASSES, 0.0, 2.0), (NUM_CLASSES, 0.3, 2.0), (3, 0.3, 2.0), (1, 0.0, 2.0), (5, 0.99, 2.0), (7, 0.2, 0.1)],
    ids=["all classes", "void", "few classes", "one class", "nearly all void", "undecided"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_lovasz_softmax_is_that_of_the_paper(classes: int, void_share: float, spread: float, seed: int) -> None:
    scores = random_scores(2, NUM_CLASSES, 15, 16, seed=seed, spread=spread)
    targets = random_targets(2, 15, 16, classes=classes, void_share=void_share, seed=seed + 10)
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    exact_loss, exact_gradient = with_gradient(lambda given: literal_lovasz_softmax(given, targets), scores.double())
    assert loss.item() == pytest.approx(exact_loss.item(), abs=1e-5)
    assert relative_distance(gradient, exact_gradient) < 1e-3


def test_lovasz_softmax_of_a_confident_network_is_that_of_the_paper() -> None:
    """After 35 epochs of cross-entropy most errors are tiny and share few ranks: the hardest case for counting them."""
    targets = random_targets(2, 15, 16, classes=6, void_share=0.1)
    scores = random_scores(2, NUM_CLASSES, 15, 16, spread=1.5)
    scores += 9.0 * torch.nn.functional.one_hot(targets.where(targets != VOID, 0), NUM_CLASSES).movedim(3, 1)
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    exact_loss, exact_gradient = with_gradient(lambda given: literal_lovasz_softmax(given, targets), scores.double())
    assert loss.item() == pytest.approx(exact_loss.item(), abs=1e-5)
    assert relative_distance(gradient, exact_gradient) < 2e-3


def test_lovasz_softmax_of_one_labelled_pixel_is_its_error() -> None:
    scores, targets = random_scores(2, NUM_CLASSES, 3, 3), torch.full((2, 3, 3), VOID)
    targets[1, 2, 0] = 4
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    assert loss.item() == pytest.approx(1.0 - scores.softmax(dim=1)[1, 4, 2, 0].item(), abs=1e-6)
    assert gradient[1, :, 2, 0].any()
    assert gradient.count_nonzero() == gradient[1, :, 2, 0].count_nonzero()


def test_lovasz_softmax_of_nothing_but_void_is_zero_with_a_zero_gradient() -> None:
    targets = torch.full((2, 4, 4), VOID)
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), random_scores(2, NUM_CLASSES, 4, 4))
    assert loss == 0.0
    assert not gradient.any()


def test_what_is_scored_at_void_pixels_changes_neither_lovasz_softmax_nor_its_gradient() -> None:
    scores, targets = random_scores(2, NUM_CLASSES, 8, 8), random_targets(2, 8, 8, classes=5, void_share=0.4)
    void = (targets == VOID).unsqueeze(1)
    others = scores.where(~void, 100.0 * random_scores(2, NUM_CLASSES, 8, 8, seed=7))
    loss, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    other_loss, other_gradient = with_gradient(lambda given: lovasz_softmax(given, targets), others)
    assert loss == other_loss
    assert torch.equal(gradient, other_gradient)
    assert not gradient.where(void, 0.0).any()


def hard_scores(predictions: Tensor) -> Tensor:
    """Scores whose softmax is 1 at the predicted class and 0 elsewhere, to the last bit of float32."""
    return 1000.0 * torch.nn.functional.one_hot(predictions, NUM_CLASSES).movedim(3, 1).float()


def test_lovasz_softmax_of_a_perfect_prediction_is_zero() -> None:
    targets = random_targets(2, 8, 8, classes=6)
    assert lovasz_softmax(hard_scores(targets), targets).item() == 0.0


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
    assert lovasz_softmax(hard_scores(predictions), targets).item() == pytest.approx(expected, abs=1e-6)


def test_lovasz_softmax_counts_the_classes_of_the_whole_batch() -> None:
    """Per image it would be another loss."""
    scores, targets = random_scores(2, NUM_CLASSES, 8, 8), random_targets(2, 8, 8, classes=4)
    targets[0] = targets[0].clamp_max(1)
    per_image = torch.stack([lovasz_softmax(scores[[image]], targets[[image]]) for image in range(2)]).mean()
    exact = literal_lovasz_softmax(scores.double(), targets)
    assert lovasz_softmax(scores, targets).item() == pytest.approx(exact.item(), abs=1e-5)
    assert abs(per_image.item() - exact.item()) > 1e-3


def test_the_gradient_of_lovasz_softmax_says_how_the_loss_changes() -> None:
    scores = random_scores(1, NUM_CLASSES, 12, 12)
    targets = random_targets(1, 12, 12, classes=5, void_share=0.1)
    _, gradient = with_gradient(lambda given: lovasz_softmax(given, targets), scores)
    steepest = gradient / gradient.norm()
    ahead, behind = (lovasz_softmax(scores + step * steepest, targets).item() for step in (0.05, -0.05))
    assert (ahead - behind) / 0.1 == pytest.approx(gradient.norm().item(), rel=0.01)


def test_following_the_gradient_of_lovasz_softmax_lets_the_iou_rise() -> None:
    targets = random_targets(1, 8, 8, classes=4, void_share=0.1)
    scores = random_scores(1, NUM_CLASSES, 8, 8).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.3)
    first = lovasz_softmax(scores, targets).item()
    for _ in range(60):
        optimizer.zero_grad()
        lovasz_softmax(scores, targets).backward()
        optimizer.step()
    assert first > 0.8
    assert lovasz_softmax(scores, targets).item() < 0.1


# --- three heads ------------------------------------------------------------------------------------------------


def random_logits() -> Logits:
    """The heads of a 16 x 32 image: the main one and the first auxiliary one at 1/8, the second at 1/16."""
    aux = (random_scores(2, NUM_CLASSES, 2, 4, seed=1), random_scores(2, NUM_CLASSES, 1, 2, seed=2))
    return Logits(random_scores(2, NUM_CLASSES, 2, 4, seed=0), aux)


LABELS = random_targets(2, 16, 32, classes=6, void_share=0.1).to(torch.uint8)


def alone(logits: Tensor, class_weights: Tensor | None = None) -> float:
    """Cross-entropy of one head, computed by torch."""
    full_size = torch.nn.functional.interpolate(logits, size=(16, 32), mode="bilinear", align_corners=False)
    targets = LABELS.long()
    return torch.nn.functional.cross_entropy(full_size, targets, class_weights, ignore_index=VOID).item()


@pytest.mark.parametrize("aux_weight", [0.0, 0.4, 1.0])
def test_the_total_is_the_main_loss_and_alpha_times_the_auxiliary_ones(aux_weight: float) -> None:
    logits = random_logits()
    parts = head_losses(logits, LABELS, CrossEntropy(aux_weight=aux_weight), class_weights=None, epoch=1)
    main, aux1, aux2 = alone(logits.main), alone(logits.aux[0]), alone(logits.aux[1])
    assert [part.item() for part in parts[1:]] == pytest.approx([main, aux1, aux2], rel=1e-5)
    assert parts.total.item() == pytest.approx(main + aux_weight * (aux1 + aux2), rel=1e-5)


def test_class_weights_act_on_all_three_heads() -> None:
    logits, class_weights = random_logits(), torch.linspace(0.1, 50.0, NUM_CLASSES)
    loss = WeightedCrossEntropy(aux_weight=1.0)
    parts = head_losses(logits, LABELS, loss, class_weights=class_weights, epoch=1)
    expected = [alone(head, class_weights) for head in (logits.main, *logits.aux)]
    assert [part.item() for part in parts[1:]] == pytest.approx(expected, rel=1e-5)


def test_class_weights_to_the_power_of_0_are_plain_cross_entropy() -> None:
    counts = torch.bincount(LABELS.flatten().long(), minlength=VOID + 1)[:NUM_CLASSES]
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
    """Mean cross-entropy of one head's `num_kept` hardest pixels, and those as hard as the last, computed by torch."""
    full_size = torch.nn.functional.interpolate(logits, size=(16, 32), mode="bilinear", align_corners=False)
    losses = torch.nn.functional.cross_entropy(full_size, LABELS.long(), ignore_index=VOID, reduction="none")
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
    for switched in (epoch_36, last):
        assert [part.item() for part in switched[1:]] == pytest.approx([lovasz, aux1, aux2], rel=1e-4)
        assert switched.total.item() == pytest.approx(lovasz + aux1 + aux2, rel=1e-4)


def test_a_loss_without_a_switch_never_switches() -> None:
    assert not uses_lovasz(CrossEntropy(aux_weight=1.0), epoch=10_000)
    assert uses_lovasz(CrossEntropy(aux_weight=1.0, lovasz_after=0), epoch=1)


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
