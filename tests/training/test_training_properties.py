"""Whatever row is trained, and whenever it is killed: the resumed run equals one never stopped, bit for bit."""

from typing import Any

import pytest
from helpers.fuzz import inputs
from helpers.rows import plain_row
from hypothesis import given
from hypothesis import strategies as st
from trainings import SIZE, assert_same_state, begin, measurements

from tune_bisenet.config import OHEM, SGD, AdamW, Augment, CrossEntropy, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.data.packed import Packed
from tune_bisenet.records import LAST, PREVIOUS
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine

rates = st.sampled_from([1e-4, 0.003, 0.1, 1e6])  # the last of which diverges
shares = st.sampled_from([0.0, 0.4, 1.0])

KILLS = ("before it is saved", "in the middle of the file", "after it is saved")


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Return any run that ends within three epochs."""
    loss: Any = draw(st.sampled_from([CrossEntropy, WeightedCrossEntropy, OHEM]))
    sgd = st.builds(SGD, lr=rates, momentum=st.sampled_from([0.0, 0.9]), weight_decay=shares)
    return plain_row(
        optimizer=draw(sgd | st.builds(AdamW, lr=rates, weight_decay=shares)),
        schedule=WarmupPoly(warmup_iterations=draw(st.integers(0, 5)), power=draw(st.sampled_from([0.5, 0.9, 2.0]))),
        loss=loss(aux_weight=draw(shares), lovasz_after=draw(st.sampled_from([None, 0, 1]))),
        accumulation=draw(st.integers(1, 4)),
        max_grad_norm=draw(st.sampled_from([None, 0.1, 10.0])),
        num_epochs=draw(st.integers(2, 3)),
        batch_size=draw(st.integers(2, 6)),
        image_size=SIZE,
        augment=draw(st.builds(Augment, flip=shares, jitter=st.sampled_from([0.0, 0.4]))),
        head_width=draw(st.sampled_from([1, 16])),
        decay_norms_and_biases=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
        stream=draw(st.integers(0, 2)),
    )


@pytest.mark.slow
@pytest.mark.timeout(2700)
@inputs(3)
@given(run=runs(), stop=st.integers(1, 2), kill=st.sampled_from(KILLS))
def test_any_run_killed_anywhere_equals_one_never_stopped(
    small_data: Packed, tmp_path_factory: pytest.TempPathFactory, run: Run, stop: int, kill: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "killed"  # one folder for all: each state takes 100 MB
    folder = Storage.at(str(path))
    folder.make()
    for name in (LAST, PREVIOUS):
        (path / name).unlink(missing_ok=True)
    unbroken = begin(run, small_data)
    history = []
    for end in engine.fit(unbroken):
        history.append(end.epoch)
        number = end.epoch.epoch
        if number == stop - 1 or (number == stop and kill != "before it is saved"):
            checkpoint.save(checkpoint.state_of(unbroken), history, folder, identity="one")
            if number == stop and kill == "in the middle of the file":
                state = path / (LAST if number % 2 else PREVIOUS)
                state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    resumed = begin(run, small_data)
    epochs = checkpoint.resume(resumed, folder, identity="one")
    assert len(epochs) == (stop if kill == "after it is saved" else stop - 1)
    epochs += [end.epoch for end in engine.fit(resumed)]
    assert repr(measurements(epochs)) == repr(measurements(history))  # by repr, for NaN differs from itself
    assert_same_state(resumed, unbroken)
