"""What a search will take: kinds of epochs, speeds, list scheduling, disk, and the trials that are left."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from search_spaces.runs10 import SPACE
from tune_bisenet.config import OHEM, SGD, CrossEntropy, Run, WarmupPoly
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.streets import Streets
from tune_bisenet.estimate.forecast import (
    ENDLESS_SAMPLE,
    KEEPING_SECONDS,
    TRIAL_SECONDS,
    VAL_SHARE,
    Measured,
    Timed,
    Timing,
    commonest,
    given_speed,
    grid_work,
    kinds_of,
    makespan,
    measured_speed,
    pack_bytes,
    sampled_work,
    trial_seconds,
)
from tune_bisenet.records import TrialState
from tune_bisenet.spaces import DataFacts

FACTS = DataFacts(num_train=10, num_val=3, suggested_image_size=(32, 64))


def row(name: str = "a", *, num_epochs: int = 10, **fields: Any) -> Run:
    return Run(
        **{
            "name": name,
            "optimizer": SGD(lr=0.01, momentum=0.9, weight_decay=1e-4),
            "schedule": WarmupPoly(warmup_iterations=1, power=0.9),
            "loss": CrossEntropy(aux_weight=1.0),
            "accumulation": 1,
            "max_grad_norm": None,
            "num_epochs": num_epochs,
            "image_size": (32, 64),
            **fields,
        }
    )


def standing(run: str, **known: Any) -> TrialState:
    return TrialState.from_json({"trial": run, "run": run, "seed": 0, "num_epochs": 10, **known})


SWITCHING = row("b", loss=CrossEntropy(aux_weight=1.0, lovasz_after=7))


# --- kinds and speeds -----------------------------------------------------------------------------------------------


def test_the_ten_rows_have_epochs_of_two_kinds() -> None:
    """Only r05 switches its loss; rates, class weights and accumulation take no time worth telling."""
    plain, lovasz = commonest(SPACE.runs)
    assert (plain.lovasz, lovasz.lovasz) == (False, True)
    assert sum(kind.lovasz for run in SPACE.runs for kind in kinds_of(run)) == 15


def test_epochs_before_and_after_the_switch_take_their_own_time() -> None:
    before, after = kinds_of(SWITCHING)[0], kinds_of(SWITCHING)[-1]
    speed = Timed({before: Timing(train=1.0, val=0.5), after: Timing(train=2.0, val=0.5)})
    # Two batches of four are trained of ten images, and three are validated.
    assert trial_seconds(SWITCHING, speed, FACTS) == pytest.approx(
        TRIAL_SECONDS + 10 * KEEPING_SECONDS + 7 * 9.5 + 3 * 17.5
    )
    assert trial_seconds(SWITCHING, speed, FACTS, epochs_done=8) == pytest.approx(
        TRIAL_SECONDS + 2 * KEEPING_SECONDS + 2 * 17.5
    )


def test_a_kind_that_was_not_timed_goes_by_the_most_alike_and_by_its_pixels() -> None:
    small = kinds_of(row())[0]
    speed = Timed({small: Timing(train=1.0, val=0.5), small._replace(lovasz=True): Timing(train=2.0, val=0.5)})
    large = kinds_of(row(image_size=(64, 128)))[0]
    assert speed.timing(large) == Timing(train=4.0, val=2.0)
    assert speed.timing(large._replace(lovasz=True)).train == 8.0
    assert speed.timing(kinds_of(row(loss=OHEM(aux_weight=1.0)))[0]).train == 1.0


def test_a_given_speed_is_of_training_images() -> None:
    seconds = given_speed(2.0, row()).epoch_seconds(row(), 1, FACTS)
    assert seconds == pytest.approx(8 / 2 + 3 * VAL_SHARE / 2)


def test_earlier_sessions_tell_the_speed_of_their_rows_and_the_mean_of_others() -> None:
    speed = measured_speed([standing("a", epochs=4, seconds=8.0), standing("b", epochs=1, seconds=4.0), standing("c")])
    assert speed == Measured({"a": 2.0, "b": 4.0})
    assert [speed.epoch_seconds(row(name), 1, FACTS) for name in "abc"] == [2.0, 4.0, 3.0]
    assert measured_speed([standing("a")]) is None


# --- a cluster's time -----------------------------------------------------------------------------------------------


def test_trials_take_the_first_free_place_in_their_order() -> None:
    assert makespan([3, 3, 3, 3, 3], at_once=2) == 9
    assert makespan([1, 1, 4], at_once=2) == 5
    assert makespan([4, 1, 1], at_once=2) == 4
    assert makespan([2.5], at_once=8) == 2.5
    assert makespan([], at_once=2) == 0


def test_the_makespan_is_that_of_a_clock_that_ticks() -> None:
    rng = random.Random(0)
    for _ in range(50):
        durations = [rng.randint(1, 9) for _ in range(rng.randint(1, 12))]
        at_once = rng.randint(1, 5)
        waiting, running = list(durations), []
        for now in itertools.count():
            running = [end for end in running if end > now]
            while waiting and len(running) < at_once:
                running.append(now + waiting.pop(0))
            if not running:
                break
        assert makespan(durations, at_once=at_once) == now


# --- disk -----------------------------------------------------------------------------------------------------------


def test_the_disk_foretold_is_that_of_a_pack(tmp_path: Path) -> None:
    source = Streets(num_train=12, num_val=5, frame_size=(64, 128))
    packed = prepare(source, image_size=(32, 64), cache_dir=tmp_path)
    size = sum(path.stat().st_size for path in packed.path.iterdir())
    facts = DataFacts(num_train=12, num_val=5, suggested_image_size=(64, 128))
    foretold = pack_bytes(facts, image_size=(32, 64), frame_size=(64, 128))
    assert foretold <= size <= 1.05 * foretold + 10_000


# --- the trials that are left ---------------------------------------------------------------------------------------


def test_ended_trials_are_not_trained_again_and_others_go_on() -> None:
    rows = [row("a"), row("b"), row("c"), row("d")]
    known = [
        standing("a", status="finished", epochs=10),
        standing("b", status="waiting", epochs=4),
        standing("c", status="failed", epochs=6),
    ]
    work = grid_work(rows, known)
    assert [(run.name, done) for run, done in work.left] == [("b", 4), ("c", 6), ("d", 0)]
    assert work.runs == tuple(rows)
    assert [run.name for run, _done in grid_work(rows, known, only=["c"]).left] == ["c"]


def test_a_study_begins_with_its_rows_and_draws_the_rest() -> None:
    begun = [row("a"), row("t0001")]
    known = [standing("a", status="stopped", epochs=4), standing("t0001", epochs=3)]
    work = sampled_work(begun, [row("b")], [row("x"), row("y")], known, limit=6)
    assert [(run.name, done) for run, done in work.left] == [("t0001", 3), ("b", 0), ("x", 0), ("y", 0), ("x", 0)]
    assert len(work.runs) == 6
    assert not work.endless


def test_fresh_seeds_come_on_top_of_the_trials() -> None:
    assert len(sampled_work([], [row("a")], [row("x")], [], limit=3, fresh=2).left) == 5


def test_without_a_number_of_trials_some_stand_for_all() -> None:
    work = sampled_work([], [row("a")], [row("x")], [], limit=None)
    assert work.endless
    assert len(work.left) == ENDLESS_SAMPLE
