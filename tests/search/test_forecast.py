"""What a search will take: throughput, workload, list scheduling, cost and disk, each by hand."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.searches import move_into, write_frames, write_sampled_space, write_space

from tune_bisenet.config import SGD, AdamW, Optimizer, Resources, Run
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.packing import prepare_packed
from tune_bisenet.data.streets import Streets
from tune_bisenet.options import InputError, parse_options
from tune_bisenet.records import TrialState
from tune_bisenet.search.forecast import (
    KEEPING_SECONDS,
    SEARCH_BYTES,
    TRIAL_SECONDS,
    UNBOUNDED_SAMPLE,
    VAL_SHARE,
    Estimate,
    Throughput,
    checkpoint_bytes,
    estimate_search,
    find_workload,
    makespan,
    pack_bytes,
    trial_bytes,
)
from tune_bisenet.search.prepare import PreparedSearch, survey_search
from tune_bisenet.spaces import DataFacts
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine
from tune_bisenet.training.model import BiSeNet

TWO_CORES = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)
TWO_GPUS = Resources(cpus_per_trial=4, gpus_per_trial=1, max_concurrent=None, concurrency=2)
EPOCH = KEEPING_SECONDS + 8 + 3 * VAL_SHARE
TRIAL = TRIAL_SECONDS + 4 * EPOCH
"""Seconds of four epochs of eight training and three validation images at one image per second."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    move_into(tmp_path, monkeypatch)
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {f"r{row:02}": 0.01 for row in range(1, 6)}, num_epochs=4, baseline="r01")
    write_sampled_space(tmp_path / "sampled.py", num_epochs=4)
    return tmp_path


def search_of(place: Path, **flags: str | bool) -> PreparedSearch:
    defaults = {"space": str(place / "space.py"), "data": str(place / "frames"), "backbone": "none"}
    options, mistyped = parse_options(defaults | {"scheduler": "fifo"} | flags)
    return survey_search(options, mistyped, default_name="mine")


def estimate_of(place: Path, resources: Resources = TWO_CORES, **flags: str | bool) -> Estimate:
    return estimate_search(search_of(place, images_per_second="1", **flags), resources, [])


def state(run: str, **known: Any) -> TrialState:
    return TrialState(trial=run, run=run, seed=0, num_epochs=4, **known)


# --- throughput -----------------------------------------------------------------------------------------------------


def test_an_epoch_takes_its_full_batches_and_its_validation_in_proportion_to_the_pixels(tiny_run: Run) -> None:
    facts = DataFacts(num_train=10, num_val=3, suggested_image_size=(64, 128))
    throughput = Throughput(images_per_second=2.0, val_images_per_second=4.0, num_pixels=64 * 128, source="")
    assert tiny_run.batch_size == 4
    assert throughput.epoch_seconds(tiny_run, facts) == 8 / 2 + 3 / 4
    large = tiny_run.model_copy(update={"image_size": (128, 256), "num_epochs": 10})
    seconds = throughput.trial_seconds(large, facts, epochs_done=7)
    assert seconds == pytest.approx(TRIAL_SECONDS + 3 * (KEEPING_SECONDS + 4 * (8 / 2 + 3 / 4)))


def test_earlier_sessions_tell_the_throughput(tiny_run: Run) -> None:
    """Eight images and a third of three are worth nine; 8 epochs of 9 in 36 seconds are two a second."""
    facts = DataFacts(num_train=10, num_val=3, suggested_image_size=(64, 128))
    rows = [tiny_run.model_copy(update={"name": name}) for name in "abc"]
    states = [state("a", epochs=6, seconds=30.0), state("b", epochs=2, seconds=6.0), state("c")]
    throughput = Throughput.measured(states, rows, facts)
    assert throughput is not None
    assert throughput.images_per_second == pytest.approx(2.0)
    assert throughput.epoch_seconds(rows[0], facts) == pytest.approx(4.5)
    assert Throughput.measured([state("a")], rows, facts) is None


# --- time and cost --------------------------------------------------------------------------------------------------


def test_the_makespan_is_that_of_a_clock_that_ticks() -> None:
    rng = random.Random(0)
    for _ in range(50):
        durations = [rng.randint(1, 9) for _ in range(rng.randint(1, 12))]
        num_slots = rng.randint(1, 5)
        waiting, running = list(durations), []
        for now in itertools.count():
            running = [end for end in running if end > now]
            while waiting and len(running) < num_slots:
                running.append(now + waiting.pop(0))
            if not running:
                break
        assert makespan(durations, num_slots=num_slots) == now


def test_five_trials_on_two_slots_take_three_rounds(place: Path) -> None:
    estimate = estimate_of(place)
    assert estimate.trial_seconds == pytest.approx([TRIAL] * 5)
    assert estimate.wall_seconds == pytest.approx(3 * TRIAL)
    assert estimate.device_hours(3600) == 0.5, "two trials share the machine"
    assert estimate_of(place, TWO_GPUS).device_hours(3600) == 1


# --- the workload ---------------------------------------------------------------------------------------------------


def test_ended_trials_are_not_trained_again_and_others_continue(place: Path) -> None:
    states = [
        state("r01", status="finished", epochs=4),
        state("r02", epochs=2),
        state("r03", status="failed", epochs=3),
    ]
    workload = find_workload(search_of(place), states)
    assert [(run.name, epochs) for run, epochs in workload.remaining] == [
        ("r02", 2),
        ("r03", 3),
        ("r04", 0),
        ("r05", 0),
    ]
    assert len(workload.runs) == 5
    assert not workload.is_unbounded


def test_a_study_trains_its_rows_draws_the_rest_and_confirms(place: Path) -> None:
    search = search_of(place, space=str(place / "sampled.py"), trials="7", confirm="2")
    workload = find_workload(search, [])
    assert [run.name for run in workload.runs[:2]] == ["a", "b"]
    assert len(workload.remaining) == 7 + 3 * 2
    unbounded = find_workload(search_of(place, space=str(place / "sampled.py"), time_budget="1h"), [])
    assert unbounded.is_unbounded
    assert len(unbounded.remaining) == UNBOUNDED_SAMPLE


def test_epochs_that_rows_have_in_common_are_counted_once_for_each_seed(place: Path) -> None:
    ten_rows = {"space": "runs10", "proxy": True, "epochs": "4", "seeds": "0,1", "runs": "r01,r05"}
    whole = estimate_of(place, no_share=True, **ten_rows)
    shared = estimate_of(place, **ten_rows)
    assert whole.workload.shared_epochs == (0, 0, 0, 0)
    assert shared.workload.shared_epochs == (0, 3, 0, 3), "r05 switches after 3 of 4 epochs"
    assert shared.trial_seconds == pytest.approx([TRIAL, TRIAL - 3 * EPOCH, TRIAL, TRIAL - 3 * EPOCH])
    assert whole.trial_seconds == pytest.approx([TRIAL] * 4)
    _best, last = checkpoint_bytes(shared.workload.runs[0])
    kept = trial_bytes(shared.workload.runs[0], shared.search.facts, frame_size=(32, 64))
    assert shared.storage_bytes == whole.storage_bytes + 2 * (kept + last)
    begun = estimate_search(shared.search, TWO_CORES, [state("r05", status="waiting", epochs=1, seconds=1.0)])
    assert begun.workload.shared_epochs == (0, 0, 0, 3)


def test_speed_is_that_of_the_epochs_a_trial_has_trained_itself(tiny_run: Run) -> None:
    facts = DataFacts(num_train=8, num_val=3, suggested_image_size=(64, 128))
    rows = [tiny_run.model_copy(update={"name": name}) for name in ("a", "b")]
    states = [state("a", epochs=6, seconds=30.0), state("b", epochs=6, shared_epochs=4, seconds=6.0)]
    throughput = Throughput.measured(states, rows, facts)
    assert throughput
    assert throughput.epoch_seconds(rows[0], facts) == pytest.approx(36 / 8)


# --- disk -----------------------------------------------------------------------------------------------------------


def test_the_size_of_a_pack_is_forecast(tmp_path: Path) -> None:
    source = Streets(num_train=12, num_val=5, frame_size=(64, 128))
    packed = prepare_packed(source, image_size=(32, 64), cache_dir=tmp_path)
    size = sum(path.stat().st_size for path in packed.path.iterdir())
    facts = DataFacts(num_train=12, num_val=5, suggested_image_size=(64, 128))
    forecast = pack_bytes(facts, image_size=(32, 64), frame_size=(64, 128))
    assert forecast <= size <= 1.05 * forecast + 10_000


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.01, momentum=0.9, weight_decay=1e-4), AdamW(lr=1e-3, weight_decay=1e-4)]
)
def test_the_sizes_of_checkpoints_are_forecast(
    tiny_run: Run, tiny_data: Packed, tmp_path: Path, optimizer: Optimizer
) -> None:
    run = tiny_run.model_copy(update={"optimizer": optimizer, "num_epochs": 1})
    training = engine.begin(run, tiny_data, device=torch.device("cpu"), precision="fp32", backbone=None)
    (end,) = engine.fit(training)
    folder = Storage.at(str(tmp_path))
    checkpoint.save(checkpoint.state_of(training), [end.epoch], folder, identity="x")
    checkpoint.save_best(checkpoint.state_of(training), end.epoch, folder, identity="x")
    sizes = [(tmp_path / name).stat().st_size for name in (checkpoint.BEST_WEIGHTS, checkpoint.LAST)]
    assert checkpoint_bytes(run) == pytest.approx(sizes, rel=0.01)


@pytest.mark.parametrize(("head_width", "num_classes"), [(256, 19), (64, 5), (512, 200)])
def test_the_size_of_the_network_is_known_without_torch(tiny_run: Run, head_width: int, num_classes: int) -> None:
    weights = BiSeNet(num_classes=num_classes, head_width=head_width).state_dict().values()
    run = tiny_run.model_copy(update={"head_width": head_width})
    assert checkpoint_bytes(run, num_classes)[0] == sum(tensor.nbytes for tensor in weights)


def test_storage_holds_all_best_weights_and_the_checkpoints_of_running_trials(place: Path) -> None:
    estimate = estimate_of(place)
    example, facts = estimate.search.example, estimate.search.facts
    best, last = checkpoint_bytes(example)
    kept = trial_bytes(example, facts, frame_size=(32, 64))
    assert best < kept < best + 1e6
    assert estimate.storage_bytes == SEARCH_BYTES + 5 * kept + 2 * 3 * last
    assert math.isclose(last, 2 * best)
    begun = [state(f"r{row:02}", status="waiting", epochs=1, seconds=1.0) for row in range(1, 5)]
    begun += [state("r05", status="finished", epochs=4, seconds=4.0)]
    resumed = estimate_search(estimate.search, TWO_CORES, begun)
    assert resumed.storage_bytes == SEARCH_BYTES + 4 * kept + 4 * 3 * last, "all four have checkpoints"
    unbounded = estimate_of(place, space=str(place / "sampled.py"), time_budget="1h")
    assert unbounded.storage_bytes == SEARCH_BYTES + 2 * kept + 2 * 3 * last


def test_room_for_results_is_what_is_free_and_what_their_trials_have(place: Path) -> None:
    estimate = estimate_of(place)
    folder, free = estimate.search.folder.local_path, estimate.free_storage_bytes
    assert folder is not None
    assert free is not None
    for name in ("r01", "another"):
        (folder / name).mkdir(parents=True)
        with (folder / name / "last.pt").open("wb") as file:
            file.truncate(10**12)  # a sparse file takes no room
    assert estimate.free_storage_bytes == pytest.approx(10**12 + free, rel=0.01)
    estimate.check_storage()
    (run, epochs), *_ = estimate.workload.remaining
    endless = (run.model_copy(update={"num_epochs": 10**11}), epochs)
    with pytest.raises(InputError, match=r"need up to 1e\+03 TB in .*mine, where .* are free: make room there"):
        replace(estimate, workload=replace(estimate.workload, remaining=(endless,))).check_storage()
