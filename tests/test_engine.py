"""One run, trained for real on 32 x 64 pixels: it learns, it counts right, and stopping it changes nothing."""

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tune_bisenet import checkpoint, engine, spaces
from tune_bisenet.config import (
    OHEM,
    SGD,
    AdamW,
    Augment,
    CrossEntropy,
    Loss,
    Precision,
    Run,
    WarmupPoly,
    WeightedCrossEntropy,
)
from tune_bisenet.data.classes import NUM_CLASSES, VOID
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.source import Frame, Split
from tune_bisenet.data.streets import Streets
from tune_bisenet.engine import EpochEnd, Training
from tune_bisenet.model import BiSeNet
from tune_bisenet.plan import DataFacts, Settings, plan_runs
from tune_bisenet.results import Epoch
from tune_bisenet.storage import Storage

SIZE = (32, 64)
CPU = torch.device("cpu")
STILL = Augment(min_scale=1.0, max_scale=1.0, flip=0.0, jitter=0.0)


@pytest.fixture(scope="session")
def run(tiny_run: Run) -> Run:
    return tiny_run.model_copy(update={"image_size": SIZE})


def begin(run: Run, data: Packed, precision: Precision = "fp32") -> Training:
    return engine.begin(run, data, device=CPU, precision=precision, backbone=None)


def trained(run: Run, data: Packed) -> list[EpochEnd]:
    return list(engine.fit(begin(run, data)))


def weights_of(training: Training) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}


def recorded_rates(training: Training) -> list[float]:
    """Filled, as `training` goes on, with the rate of every optimizer step."""
    rates: list[float] = []
    training.optimizer.register_step_post_hook(
        lambda optimizer, _args, _kwargs: rates.append(optimizer.param_groups[0]["lr"])
    )
    return rates


def recorded_inputs(training: Training) -> list[Tensor]:
    """Filled, as `training` goes on, with what the network is given to learn from."""
    inputs: list[Tensor] = []

    def record(network: nn.Module, given: tuple[Tensor]) -> None:
        if network.training:
            inputs.append(given[0].detach().clone())

    training.model.register_forward_pre_hook(record)
    return inputs


# --- stopping and going on --------------------------------------------------------------------------------------

STATEFUL_RUNS = {
    "SGD, accumulation, clipping, Lovász": {
        "loss": CrossEntropy(aux_weight=0.4, lovasz_after=1),
        "accumulation": 2,
        "max_grad_norm": 1.0,
    },
    "AdamW, class weights, spared norms": {
        "optimizer": AdamW(lr=0.001, weight_decay=0.1),
        "loss": WeightedCrossEntropy(aux_weight=1.0),
        "decay_norms_and_biases": False,
        "seed": 5,
    },
    "hard pixels, a narrow head": {"loss": OHEM(aux_weight=1.0), "head_width": 32},
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Storage]:
    """Where states are saved; emptied at once, for each takes 100 MB."""
    path = tmp_path / "trial"
    path.mkdir()
    yield Storage.at(str(path))
    shutil.rmtree(path)


def measurements(epochs: Sequence[Epoch]) -> list[dict[str, Any]]:
    """All but how long it took."""
    timings = {"train_seconds", "val_seconds", "images_per_second"}
    return [{key: value for key, value in asdict(epoch).items() if key not in timings} for epoch in epochs]


def flat(state: Any, place: str = "") -> dict[str, Any]:
    """Every tensor and value of a nested state under its path; tensors as their bytes."""
    if isinstance(state, Tensor):
        return {place: (state.dtype, tuple(state.shape), state.numpy().tobytes())}
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for name, part in items for key, value in flat(part, f"{place}/{name}").items()}
    return {place: state}


def assert_same_state(left: Training, right: Training) -> None:
    assert left.epochs_done == right.epochs_done
    for first, second in ((left.model, right.model), (left.optimizer, right.optimizer)):
        found, expected = flat(first.state_dict()), flat(second.state_dict())
        assert found.keys() == expected.keys()
        assert [key for key, value in found.items() if value != expected[key]] == []


@pytest.mark.parametrize("changes", STATEFUL_RUNS.values(), ids=STATEFUL_RUNS)
def test_a_resumed_run_equals_one_never_stopped(
    run: Run, small_data: Packed, folder: Storage, changes: dict[str, Any]
) -> None:
    run = run.model_copy(update={"num_epochs": 3, **changes})
    unbroken = begin(run, small_data)
    history = [end.epoch for end in engine.fit(unbroken)]

    for _attempt in range(3):  # one epoch each, in a training of its own
        resumed = begin(run, small_data)
        epochs = checkpoint.resume(resumed, folder, identity="one")
        epochs.append(next(engine.fit(resumed)).epoch)
        checkpoint.save(resumed, epochs, folder, identity="one")

    assert measurements(epochs) == measurements(history)
    assert_same_state(resumed, unbroken)


GO_ON = """
import json, sys
import torch
torch.set_num_threads(1)
from tune_bisenet import checkpoint, engine
from tune_bisenet.config import Run
from tune_bisenet.data.packed import open_packed
from tune_bisenet.storage import Storage
from pathlib import Path

run, pack, folder = Run.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Storage.at(sys.argv[3])
torch.manual_seed(999)
training = engine.begin(run, open_packed(pack), device=torch.device("cpu"), precision="fp32", backbone=None)
history = checkpoint.resume(training, folder, identity="one")
for end in engine.fit(training):
    history.append(end.epoch)
checkpoint.save(training, history, folder, identity="one")
"""


def test_a_run_resumed_in_another_process_equals_one_never_stopped(
    run: Run, small_data: Packed, folder: Storage
) -> None:
    unbroken = begin(run, small_data)
    ends = engine.fit(unbroken)
    history = [next(ends).epoch]
    checkpoint.save(unbroken, history, folder, identity="one")
    history += [end.epoch for end in ends]

    command = [sys.executable, "-c", GO_ON, run.model_dump_json(), str(small_data.path), folder.path]
    subprocess.run(command, check=True, timeout=120)

    resumed = begin(run, small_data)
    assert measurements(checkpoint.resume(resumed, folder, identity="one")) == measurements(history)
    assert_same_state(resumed, unbroken)


def test_a_run_that_is_done_trains_no_further(run: Run, small_data: Packed) -> None:
    training = begin(run, small_data)
    assert len(list(engine.fit(training))) == 2
    before = weights_of(training)
    assert list(engine.fit(training)) == []
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(training).items())


def test_the_same_run_twice_gives_the_same_numbers_and_another_seed_others(run: Run, small_data: Packed) -> None:
    first, again = ([end.epoch for end in trained(run, small_data)] for _ in range(2))
    other = [end.epoch for end in trained(run.model_copy(update={"seed": 1}), small_data)]
    assert measurements(first) == measurements(again)
    assert measurements(first) != measurements(other)


# --- learning ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FourStreets:
    """Four frames, 32 times for training and once for validation; the labels trained on may be spoilt."""

    spoil: str  # "nothing", "shuffle" or "erase"
    frame_size: tuple[int, int] = SIZE

    @property
    def name(self) -> str:
        return "four"

    @property
    def fingerprint(self) -> str:
        return f"{self}"

    def names(self, split: Split) -> Sequence[str]:
        return [str(index) for index in range({"train": 32, "val": 4}[split])]

    def load(self, split: Split, index: int) -> Frame:
        frame = Streets(num_train=4, num_val=1, frame_size=self.frame_size).load("train", index % 4)
        label = frame.label.copy()
        if self.spoil == "shuffle" and split == "train":
            label = np.random.default_rng(index).permutation(label.ravel()).reshape(label.shape)
        if self.spoil == "erase":
            label[:] = VOID
        return Frame(frame.image, label)


def learning_curve(run: Run, cache_dir: Path, spoil: str) -> list[Epoch]:
    run = run.model_copy(update={"optimizer": AdamW(lr=0.002, weight_decay=0.0), "augment": STILL, "num_epochs": 6})
    data = prepare(FourStreets(spoil), image_size=SIZE, cache_dir=cache_dir)
    return [end.epoch for end in trained(run, data)]


def test_a_network_that_sees_four_images_again_and_again_learns_them(run: Run, tmp_path: Path) -> None:
    curve = learning_curve(run, tmp_path, "nothing")
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert curve[-1].miou > curve[0].miou + 15
    assert curve[-1].pixel_accuracy > 75


def test_a_network_learns_no_streets_from_shuffled_labels(run: Run, tmp_path: Path) -> None:
    curve = learning_curve(run, tmp_path, "shuffle")
    assert curve[-1].loss > 0.5 * curve[0].loss
    assert max(epoch.miou for epoch in curve) < 8


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(aux_weight=1.0),
        WeightedCrossEntropy(aux_weight=1.0),
        OHEM(aux_weight=1.0),
        CrossEntropy(aux_weight=1.0, lovasz_after=0),
    ],
    ids=["ce", "weighted", "ohem", "lovasz"],
)
def test_labels_of_nothing_but_void_move_no_weight(run: Run, tmp_path: Path, loss: Loss) -> None:
    run = run.model_copy(
        update={
            "loss": loss,
            "optimizer": SGD(lr=0.1, momentum=0.9, weight_decay=0.0),
            "num_epochs": 1,
            "max_grad_norm": 1.0,
        }
    )
    training = begin(run, prepare(FourStreets("erase"), image_size=SIZE, cache_dir=tmp_path))
    before = weights_of(training)
    (end,) = engine.fit(training)
    assert (end.epoch.loss, end.epoch.grad_norm, end.epoch.miou) == (0.0, 0.0, 0.0)
    assert not end.epoch.diverged
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(training).items())


def test_a_rate_far_too_high_is_told_as_diverged(run: Run, small_data: Packed) -> None:
    run = run.model_copy(
        update={
            "optimizer": SGD(lr=1e6, momentum=0.9, weight_decay=1e-4),
            "schedule": WarmupPoly(warmup_iterations=0, power=0.9),
        }
    )
    last = trained(run, small_data)[-1].epoch
    assert last.diverged
    assert not (math.isfinite(last.loss) and math.isfinite(last.grad_norm))
    assert math.isfinite(last.miou)  # Tune's schedulers must never be told NaN


@pytest.mark.parametrize("name", [run.name for run in spaces.load("runs10").runs])
def test_every_one_of_the_ten_runs_trains(name: str, small_data: Packed) -> None:
    settings = Settings(num_epochs=1, proxy=True)
    rows = spaces.select(spaces.load("runs10"), [name])
    (run,) = plan_runs(rows, settings, DataFacts(num_train=12, num_val=4, suggested_image_size=SIZE))
    training = begin(run, small_data)
    before = weights_of(training)
    (end,) = engine.fit(training)
    assert not end.epoch.diverged
    assert 0 < end.epoch.loss < 30
    assert all(not torch.equal(before[key], weight) for key, weight in weights_of(training).items())


def test_bfloat16_trains_much_as_float32_does(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"num_epochs": 1})
    exact, rounded = (next(engine.fit(begin(run, small_data, precision))).epoch for precision in ("fp32", "bf16"))
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)
    assert rounded.loss != exact.loss


# --- what an epoch says -----------------------------------------------------------------------------------------


def rate_by_hand(base_lr: float, warmup: int, iteration: int, total: int) -> float:
    if iteration < warmup:
        return 1e-6 + (base_lr - 1e-6) * iteration / warmup
    return base_lr * (1 - (iteration - warmup) / (total - warmup)) ** 0.9


def test_an_epoch_counts_iterations_and_gives_the_rate_of_its_last_one(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"num_epochs": 3, "schedule": WarmupPoly(warmup_iterations=4, power=0.9)})
    epochs = [end.epoch for end in trained(run, small_data)]
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert [epoch.iterations for epoch in epochs] == [3, 6, 9]
    assert [epoch.lr for epoch in epochs] == pytest.approx([rate_by_hand(0.01, 4, last, 9) for last in (2, 5, 8)])


def test_an_epoch_is_told_completely(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"num_epochs": 1, "loss": CrossEntropy(aux_weight=0.4)})
    (end,) = trained(run, small_data)
    epoch = end.epoch
    assert epoch.loss == pytest.approx(epoch.loss_main + 0.4 * (epoch.loss_aux1 + epoch.loss_aux2), rel=1e-5)
    assert min(epoch.loss_main, epoch.loss_aux1, epoch.loss_aux2, epoch.grad_norm) > 0
    assert len(epoch.iou) == NUM_CLASSES
    occurring = [value for value in epoch.iou if value is not None]
    assert epoch.miou == pytest.approx(sum(occurring) / len(occurring))
    assert epoch.images_per_second == pytest.approx(12 / epoch.train_seconds)
    assert epoch.seconds == epoch.train_seconds + epoch.val_seconds > 0


def test_images_that_fill_no_batch_are_left_for_another_epoch(run: Run, small_data: Packed) -> None:
    training = begin(run.model_copy(update={"batch_size": 5}), small_data)
    inputs = recorded_inputs(training)
    end = next(engine.fit(training))
    assert [len(images) for images in inputs] == [5, 5]
    assert end.epoch.iterations == 2


def test_the_norm_that_is_told_is_the_one_before_clipping(run: Run, small_data: Packed) -> None:
    one_step = run.model_copy(update={"batch_size": 12, "num_epochs": 1})
    free, clipped = (
        trained(one_step.model_copy(update={"max_grad_norm": norm}), small_data)[0].epoch for norm in (None, 0.01)
    )
    assert free.grad_norm > 0.01
    assert clipped.grad_norm == free.grad_norm


def test_clipping_bounds_what_a_step_can_change(run: Run, small_data: Packed) -> None:
    one_step = run.model_copy(
        update={
            "batch_size": 12,
            "num_epochs": 1,
            "max_grad_norm": 0.01,
            "optimizer": SGD(lr=1.0, momentum=0.0, weight_decay=0.0),
            "schedule": WarmupPoly(warmup_iterations=0, power=0.9),
        }
    )
    training = begin(one_step, small_data)
    before = weights_of(training)
    next(engine.fit(training))
    moved = torch.cat([(weight - before[name]).flatten() for name, weight in weights_of(training).items()])
    assert moved.double().norm().item() == pytest.approx(0.01, rel=1e-3)


# --- rows that differ in one thing only -------------------------------------------------------------------------


def test_rows_with_one_seed_see_the_same_images_in_the_same_order(run: Run, small_data: Packed) -> None:
    others = {"optimizer": AdamW(lr=0.001, weight_decay=0.1), "accumulation": 2, "loss": CrossEntropy(aux_weight=0.4)}
    seen = []
    for row in (run, run.model_copy(update=others), run.model_copy(update={"seed": 1})):
        training = begin(row, small_data)
        inputs = recorded_inputs(training)
        list(engine.fit(training))
        seen.append(torch.stack(inputs))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_accumulation_sees_the_rates_of_the_run_without_it(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"schedule": WarmupPoly(warmup_iterations=4, power=0.9)})
    alone, accumulating = begin(run, small_data), begin(run.model_copy(update={"accumulation": 2}), small_data)
    every_rate, rates = recorded_rates(alone), recorded_rates(accumulating)
    ends = list(engine.fit(alone)), list(engine.fit(accumulating))
    assert every_rate == pytest.approx([rate_by_hand(0.01, 4, iteration, 6) for iteration in range(6)])
    assert rates == [every_rate[iteration] for iteration in (1, 2, 4, 5)]  # the third micro-batch is an odd one
    assert [end.epoch.lr for end in ends[0]] == [end.epoch.lr for end in ends[1]]


def test_the_odd_micro_batch_at_an_epochs_end_makes_a_step_of_its_own(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"accumulation": 2, "optimizer": AdamW(lr=0.001, weight_decay=0.0)})
    training = begin(run, small_data)
    list(engine.fit(training))
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {2 * 2}
    assert [engine._group_size(iteration, 3, 2) for iteration in range(3)] == [2, 2, 1]
    assert [engine._group_size(iteration, 7, 3) for iteration in range(7)] == [3, 3, 3, 3, 3, 3, 1]


def test_a_micro_batch_that_accumulates_with_none_counts_in_full(run: Run, small_data: Packed) -> None:
    alone = run.model_copy(update={"batch_size": 12, "num_epochs": 1})  # one micro-batch an epoch
    trainings = [begin(alone.model_copy(update={"accumulation": number}), small_data) for number in (1, 2)]
    first, second = (next(engine.fit(training)).epoch for training in trainings)
    assert measurements([first]) == measurements([second])
    assert_same_state(*trainings)


def test_two_micro_batches_give_the_gradient_of_one_batch_of_both(run: Run, small_data: Packed) -> None:
    """With BatchNorm frozen and equally many labelled pixels: both are what accumulation cannot make equal."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, *SIZE, generator=generator)
    labels = torch.randint(NUM_CLASSES, (8, *SIZE), generator=generator, dtype=torch.uint8)
    labels[:, :10] = VOID
    gradients = []
    for size in (8, 4):
        training = begin(run, small_data)
        training.model.eval()
        for first in range(0, 8, size):
            part = slice(first, first + size)
            engine._backward(training, images[part], labels[part], epoch=1, scale=size / 8)
        gradients.append([parameter.grad for parameter in training.model.parameters()])
    for whole, accumulated in zip(*gradients, strict=True):
        assert whole is not None
        assert accumulated is not None
        assert (accumulated - whole).norm() < 1e-4 * whole.norm() + 1e-7


def test_a_step_leaves_no_gradient_behind(run: Run, small_data: Packed) -> None:
    training = begin(run.model_copy(update={"num_epochs": 1, "accumulation": 2}), small_data)
    next(engine.fit(training))
    assert all(parameter.grad is None for parameter in training.model.parameters())


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_class_weights_come_from_the_counts_kept_with_the_data(run: Run, small_data: Packed, exponent: float) -> None:
    loss = WeightedCrossEntropy(aux_weight=1.0, exponent=exponent)
    weighted = begin(run.model_copy(update={"loss": loss}), small_data)
    counts = np.zeros(NUM_CLASSES, np.int64)
    streets = Streets(num_train=12, num_val=4, frame_size=(64, 128))
    for index in range(12):
        counts += np.bincount(streets.load("train", index).label.ravel(), minlength=256)[:NUM_CLASSES]
    assert weighted.class_weights is not None
    assert weighted.class_weights.tolist() == pytest.approx(
        [(counts.sum() / (NUM_CLASSES * count)) ** exponent if count else 0.0 for count in counts.tolist()], rel=1e-6
    )


@pytest.mark.parametrize("loss", [CrossEntropy(aux_weight=1.0), OHEM(aux_weight=1.0)])
def test_other_losses_weigh_no_class(run: Run, small_data: Packed, loss: Loss) -> None:
    assert begin(run.model_copy(update={"loss": loss}), small_data).class_weights is None


def test_the_width_of_the_main_head_is_the_runs(run: Run, small_data: Packed) -> None:
    network = begin(run.model_copy(update={"head_width": 48}), small_data).model
    assert network.head[1].weight.shape == (NUM_CLASSES, 48, 1, 1)


def test_a_backbone_is_where_training_starts(run: Run, small_data: Packed) -> None:
    torch.manual_seed(77)
    weights = dict(BiSeNet().context.resnet.state_dict())
    training = engine.begin(run, small_data, device=CPU, precision="fp32", backbone=weights)
    for name, value in training.model.context.resnet.state_dict().items():
        assert torch.equal(value, weights[name])


# --- validation -------------------------------------------------------------------------------------------------


def test_validation_scores_whole_images_at_the_resolution_of_their_labels(run: Run, small_data: Packed) -> None:
    training = begin(run.model_copy(update={"num_epochs": 1}), small_data)
    (end,) = engine.fit(training)
    training.model.eval()
    literal = np.zeros((4, NUM_CLASSES, NUM_CLASSES), np.int64)
    for index in range(4):
        pixels = torch.from_numpy(small_data.val.images[index].copy()).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        normalised = ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).unsqueeze(0)
        with torch.no_grad():
            main = training.model(normalised).main
        full_size = nn.functional.interpolate(main, size=(64, 128), mode="bilinear", align_corners=False)
        prediction, label = full_size.argmax(1)[0].numpy(), small_data.val.labels[index]
        np.add.at(literal[index], (label[label != VOID], prediction[label != VOID]), 1)
    assert literal.sum() > 0.8 * 4 * 64 * 128
    assert np.abs(end.confusion.numpy() - literal).sum() <= 4  # scores of one image alone differ in the last bit


def test_the_confusion_of_every_image_is_handed_out(run: Run, small_data: Packed) -> None:
    (end,) = trained(run.model_copy(update={"num_epochs": 1}), small_data)
    assert end.confusion.shape == (4, NUM_CLASSES, NUM_CLASSES)
    assert end.confusion.dtype == torch.int64
    labelled = [int((label != VOID).sum()) for label in small_data.val.labels]
    assert end.confusion.sum((1, 2)).tolist() == labelled
    hits = end.confusion.sum(0).trace().item()
    assert end.epoch.pixel_accuracy == pytest.approx(100 * hits / sum(labelled))


def test_the_same_validation_images_are_handed_out_every_epoch(run: Run, small_data: Packed) -> None:
    for end in trained(run, small_data):
        assert sorted(end.samples) == [0, 2, 3]  # spread over the split of four
        for index, prediction in end.samples.items():
            assert (prediction.dtype, prediction.shape) == (torch.uint8, (64, 128))
            label = torch.from_numpy(small_data.val.labels[index].copy())
            hits = ((prediction == label) & (label != VOID)).sum()
            assert hits == end.confusion[index].trace()


def test_a_split_of_one_image_hands_out_that_one(run: Run, tmp_path: Path) -> None:
    source = Streets(num_train=4, num_val=1, frame_size=SIZE)
    training = begin(run, prepare(source, image_size=SIZE, cache_dir=tmp_path))
    assert training.sample_indices == [0]


def test_validation_changes_nothing_in_the_network(run: Run, small_data: Packed) -> None:
    training = begin(run, small_data)
    before = flat(training.model.state_dict())
    images, labels = training.val.batch(torch.arange(4))
    predictions = engine.predict(training.model, images, (labels.shape[1], labels.shape[2]), precision="fp32")
    assert predictions.shape == labels.shape
    assert flat(training.model.state_dict()) == before
