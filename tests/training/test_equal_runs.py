"""Runs side by side: stopping one changes nothing, and rows differ in what they say and in nothing else."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from trainings import (
    CPU,
    SIZE,
    assert_same_state,
    begin,
    measurements,
    rate_by_hand,
    recorded_inputs,
    small,
    trained,
    trial_folder,
    weights_of,
)

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.config import OHEM, AdamW, CrossEntropy, Loss, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.streets import Streets
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine
from tune_bisenet.training.engine import Training
from tune_bisenet.training.model import BiSeNet

run = pytest.fixture(scope="session")(small)
folder = pytest.fixture(trial_folder)


def recorded_rates(training: Training) -> list[float]:
    """Return a list that every optimizer step of `training` adds its rate to, the same for all parameters."""
    rates: list[float] = []

    def record(optimizer: torch.optim.Optimizer, *_arguments: object) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)

    training.optimizer.register_step_post_hook(record)
    return rates


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


@pytest.mark.slow
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
        checkpoint.save(checkpoint.state_of(resumed), epochs, folder, identity="one")

    assert measurements(epochs) == measurements(history)
    assert_same_state(resumed, unbroken)


GO_ON = """
import json, sys
import torch
torch.set_num_threads(1)
from tune_bisenet.training import checkpoint, engine
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
checkpoint.save(checkpoint.state_of(training), history, folder, identity="one")
"""


@pytest.mark.slow
def test_a_run_resumed_in_another_process_equals_one_never_stopped(
    run: Run, small_data: Packed, folder: Storage
) -> None:
    unbroken = begin(run, small_data)
    ends = engine.fit(unbroken)
    history = [next(ends).epoch]
    checkpoint.save(checkpoint.state_of(unbroken), history, folder, identity="one")
    history += [end.epoch for end in ends]

    command = [sys.executable, "-c", GO_ON, run.model_dump_json(), str(small_data.path), folder.path]
    subprocess.run(command, check=True, timeout=400)

    resumed = begin(run, small_data)
    assert measurements(checkpoint.resume(resumed, folder, identity="one")) == measurements(history)
    assert_same_state(resumed, unbroken)


def test_the_same_run_twice_gives_the_same_numbers_and_another_seed_others(run: Run, small_data: Packed) -> None:
    training = begin(run, small_data)
    first = [end.epoch for end in engine.fit(training)]
    before = weights_of(training)
    assert list(engine.fit(training)) == [], "it is done"
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(training).items())
    again = [end.epoch for end in trained(run, small_data)]
    other = [end.epoch for end in trained(run.model_copy(update={"seed": 1}), small_data)]
    assert len(first) == 2
    assert measurements(first) == measurements(again)
    assert measurements(first) != measurements(other)


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
    schedule = WarmupPoly(warmup_iterations=4, power=0.9)
    run = run.model_copy(update={"schedule": schedule, "decay_norms_and_biases": False})  # two groups of parameters
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
    assert all(parameter.grad is None for parameter in training.model.parameters()), "a step leaves no gradient"


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
    labels = torch.randint(len(CITYSCAPES), (8, *SIZE), generator=generator, dtype=torch.uint8)
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


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_class_weights_come_from_the_counts_kept_with_the_data(run: Run, small_data: Packed, exponent: float) -> None:
    loss = WeightedCrossEntropy(aux_weight=1.0, exponent=exponent)
    weighted = begin(run.model_copy(update={"loss": loss}), small_data)
    counts = np.zeros(len(CITYSCAPES), np.int64)
    streets = Streets(num_train=12, num_val=4, frame_size=(64, 128))
    for index in range(12):
        counts += np.bincount(streets.load("train", index).label.ravel(), minlength=256)[: len(CITYSCAPES)]
    assert weighted.class_weights is not None
    assert weighted.class_weights.tolist() == pytest.approx(
        [(counts.sum() / (len(CITYSCAPES) * count)) ** exponent if count else 0.0 for count in counts.tolist()],
        rel=1e-6,
    )


@pytest.mark.parametrize("loss", [CrossEntropy(aux_weight=1.0), OHEM(aux_weight=1.0)])
def test_other_losses_weigh_no_class_and_the_main_head_has_the_runs_width(
    run: Run, small_data: Packed, loss: Loss
) -> None:
    training = begin(run.model_copy(update={"loss": loss, "head_width": 48}), small_data)
    assert training.class_weights is None
    assert training.model.head[1].weight.shape == (len(CITYSCAPES), 48, 1, 1)


def test_a_backbone_is_where_training_starts(run: Run, small_data: Packed) -> None:
    torch.manual_seed(77)
    weights = dict(BiSeNet().context.resnet.state_dict())
    training = engine.begin(run, small_data, device=CPU, precision="fp32", backbone=weights)
    for name, value in training.model.context.resnet.state_dict().items():
        assert torch.equal(value, weights[name])
