"""Replays equal calls, bit for bit, on a CPU: all of it is run there but the recording itself, which takes a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import CPU, assert_same_state, begin, measurements, small, trial_folder

from tune_bisenet.config import OHEM, SGD, AdamW, CrossEntropy, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.data.packed import Packed
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine
from tune_bisenet.training.engine import Training
from tune_bisenet.training.stepper import MAX_SHAPES, WARMUP_CALLS, CaptureError, Stepper

run = pytest.fixture(scope="session")(small)
folder = pytest.fixture(trial_folder)

RUNS: dict[str, dict[str, Any]] = {
    "SGD, an odd group, clipping, Lovász": {
        "loss": CrossEntropy(aux_weight=0.4, lovasz_after=1),
        "accumulation": 2,
        "max_grad_norm": 1.0,
    },
    "AdamW, class weights, spared norms, odd batches of validation": {
        "optimizer": AdamW(lr=0.001, weight_decay=0.1),
        "loss": WeightedCrossEntropy(aux_weight=1.0),
        "decay_norms_and_biases": False,
        "batch_size": 3,
    },
    "hard pixels, no momentum, a warm-up": {
        "loss": OHEM(aux_weight=1.0),
        "optimizer": SGD(lr=0.01, momentum=0.0, weight_decay=1e-4),
        "schedule": WarmupPoly(warmup_iterations=4, power=0.9),
    },
}


def replaying(run: Run, data: Packed) -> Training:
    return engine.begin(run, data, device=CPU, precision="fp32", backbone=None, step="graph")


def num_recordings(training: Training) -> int:
    return len(training.stepper._recordings)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_whose_steps_are_replayed_equals_one_whose_steps_are_not(
    run: Run, small_data: Packed, changes: dict[str, Any]
) -> None:
    run = run.model_copy(update=changes)
    plain, replayed = begin(run, small_data), replaying(run, small_data)
    ends = [list(engine.fit(training)) for training in (plain, replayed)]
    assert num_recordings(replayed) == 2 + (run.accumulation > 1 or run.batch_size == 3)
    assert measurements([end.epoch for end in ends[0]]) == measurements([end.epoch for end in ends[1]])
    assert_same_state(plain, replayed)
    for end, other in zip(*ends, strict=True):
        assert torch.equal(end.confusion, other.confusion)
        assert all(torch.equal(end.samples[index], other.samples[index]) for index in end.samples)


@pytest.mark.slow
def test_an_epoch_of_replays_is_resumed_by_steps_that_are_not_and_the_other_way_round(
    run: Run, small_data: Packed, folder: Storage
) -> None:
    run = run.model_copy(update={"optimizer": AdamW(lr=0.001, weight_decay=0.1), "num_epochs": 3})
    unbroken = begin(run, small_data)
    history = [end.epoch for end in engine.fit(unbroken)]
    for start in (replaying, begin, replaying):
        resumed = start(run, small_data)
        epochs = checkpoint.resume(resumed, folder, identity="one")
        epochs.append(next(engine.fit(resumed)).epoch)
        checkpoint.save(checkpoint.state_of(resumed), epochs, folder, identity="one")
    assert measurements(epochs) == measurements(history)
    assert_same_state(resumed, unbroken)


# --- what cannot be recorded ------------------------------------------------------------------------------------------


def failing_at(training: Training, call: int, *, after_step: bool) -> None:
    """Let a call of a training step fail once: in its network, or after the optimizer has moved the weights."""
    calls = iter(range(1, 1000))

    def fail(*_: object) -> None:
        if training.model.training and next(calls) == call:
            raise RuntimeError("operation not permitted when stream is capturing")

    if after_step:
        training.optimizer.register_step_post_hook(fail)
    else:
        training.model.aux16.register_forward_pre_hook(fail)  # type: ignore[union-attr]


@pytest.mark.parametrize("after_step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("call", [1, WARMUP_CALLS + 1], ids=["warm-up", "recording"])
def test_a_step_that_cannot_be_recorded_is_taken_from_the_state_before(
    run: Run, small_data: Packed, call: int, after_step: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = run.model_copy(update={"num_epochs": 1})
    plain, tried = begin(run, small_data), begin(run, small_data)
    tried.stepper = Stepper("auto", CPU)
    tried.stepper.is_eager = False  # as on a GPU
    failing_at(tried, call, after_step=after_step)
    epochs = [next(engine.fit(training)).epoch for training in (plain, tried)]
    assert measurements(epochs[:1]) == measurements(epochs[1:])
    assert_same_state(plain, tried)
    assert "not permitted when stream is capturing" in tried.stepper.eager_because
    assert [record.getMessage().endswith(tried.stepper.eager_because) for record in caplog.records] == [True]


def test_where_only_graphs_are_allowed_a_step_that_cannot_be_recorded_is_an_error(run: Run, small_data: Packed) -> None:
    training = replaying(run, small_data)
    failing_at(training, 1, after_step=False)
    with pytest.raises(CaptureError, match=r"a training step cannot.*not permitted.*--step graph"):
        next(engine.fit(training))


def test_memory_that_runs_out_while_recording_is_told_as_that() -> None:
    def run_out(_batches: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Stepper("graph", CPU).call(run_out, [], kind="a step")
    automatic = Stepper("auto", CPU)
    automatic.is_eager = False
    with pytest.raises(torch.OutOfMemoryError):  # it is called as it is, and that, too, takes more than there is
        automatic.call(run_out, [], kind="a step")
    assert "out of memory" in automatic.eager_because


# --- the stepper alone ------------------------------------------------------------------------------------------------


def scaling_by(factor: float, calls: list[float]) -> Callable[..., list[Tensor]]:
    def scale(batches: Any) -> list[Tensor]:
        calls.append(factor)
        return [factor * values for (values,) in batches]

    return scale


@pytest.mark.parametrize(("mode", "num_calls"), [("eager", 1), ("auto", 1), ("graph", WARMUP_CALLS + 2)])
def test_on_a_cpu_nothing_is_recorded_unless_asked(mode: Any, num_calls: int) -> None:
    calls: list[float] = []
    assert Stepper(mode, CPU).call(scaling_by(2.0, calls), [(torch.ones(2),)], kind="scale")[0].tolist() == [2, 2]
    assert len(calls) == num_calls


def test_what_was_recorded_is_replayed_on_new_batches_until_the_variant_changes() -> None:
    stepper, calls, found = Stepper("graph", CPU), [], []
    for factor, variant, size in [(2.0, "a", 2), (3.0, "a", 2), (3.0, "b", 2), (5.0, "b", 1), (7.0, "b", 2)]:
        batch = (torch.full((size,), float(len(found) + 1)),)
        found.append(stepper.call(scaling_by(factor, calls), [batch], kind="scale", variant=variant)[0])
    assert [values.tolist() for values in found] == [[2, 2], [4, 4], [9, 9], [20], [15, 15]], (
        "results stay what they were"
    )
    assert set(calls) == {2, 3, 5}


def test_of_many_shapes_only_the_first_are_recorded_and_all_are_computed() -> None:
    stepper, calls = Stepper("graph", CPU), list[float]()
    for _ in range(2):
        for length in range(1, MAX_SHAPES + 4):
            (result,) = stepper.call(scaling_by(2.0, calls), [(torch.ones(length),)], kind="scale")
            assert result.tolist() == [2.0] * length
    assert len(stepper._recordings) == MAX_SHAPES
    assert len(calls) == MAX_SHAPES * (WARMUP_CALLS + 1 + 2) + 3 * 2


def test_what_a_recording_changes_is_put_back_before_the_first_replay() -> None:
    count = torch.zeros(())

    @contextmanager
    def undone() -> Iterator[None]:
        before = count.clone()
        yield
        count.copy_(before)

    def add(_batches: object) -> list[Tensor]:
        count.add_(1)
        return []

    stepper = Stepper("graph", CPU)
    for expected in (1, 2):
        stepper.call(add, [], kind="add", undone=undone)
        assert count == expected


def test_putting_back_a_training_leaves_its_tensors_where_they_are(run: Run, small_data: Packed) -> None:
    training = begin(run, small_data)
    with engine._undone(training):
        next(engine.fit(training))
    untouched = begin(run, small_data).model.state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in training.model.state_dict().items())
    momenta = [state["momentum_buffer"] for state in training.optimizer.state.values()]
    assert len(momenta) == len(list(training.model.parameters()))
    assert not any(momentum.any() for momentum in momenta)
    places = [tensor.data_ptr() for tensor in [*momenta, *training.model.parameters()]]
    next(engine.fit(training))
    momenta = [state["momentum_buffer"] for state in training.optimizer.state.values()]
    assert [tensor.data_ptr() for tensor in [*momenta, *training.model.parameters()]] == places


def test_norms_count_batches_that_are_replayed(run: Run, small_data: Packed) -> None:
    training = replaying(run, small_data)
    list(engine.fit(training))
    norms = [module for module in training.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms if norm.num_batches_tracked is not None} == {6}
