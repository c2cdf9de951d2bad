"""How many trials should share a GPU: the rule on benchmarks made up, everything around it on a machine without one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.rows import SESSION, plain_manifest
from helpers.searches import move_into, on_frames, write_frames, write_space

from tune_bisenet import run
from tune_bisenet.options import Options, build_parser, parse_options
from tune_bisenet.records import SEARCH, to_json
from tune_bisenet.search.prepare import PreparedSearch, survey_search
from tune_bisenet.search.resources import Cluster, Node
from tune_bisenet.search.sharing import (
    choose_packing,
    format_choice,
    measure_packings,
    possible_packings,
    settle_sharing,
)
from tune_bisenet.training.benchmark import TrainingBenchmark

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time trials on")


def benchmark_of(images_per_second: float, *, memory_bytes: int = 10, available_bytes: int = 20) -> TrainingBenchmark:
    return TrainingBenchmark(
        images_per_second=images_per_second,
        val_images_per_second=3 * images_per_second,
        spread=0.0,
        memory_bytes=memory_bytes,
        available_bytes=available_bytes,
        device="a GPU",
        num_processes=1,
        seconds=8.0,
    )


# benchmarks by the number of trials side by side, images per second being those of each -> trials that share a GPU
CHOICES = {
    "a gain of just 10 % is too little": ({1: benchmark_of(100), 2: benchmark_of(55)}, 1),
    "a gain of over 10 %": ({1: benchmark_of(100), 2: benchmark_of(55.1)}, 2),
    "the most images in all": ({1: benchmark_of(100), 2: benchmark_of(65), 3: benchmark_of(50)}, 3),
    "two, where a third slows all": ({1: benchmark_of(100), 2: benchmark_of(65), 3: benchmark_of(40)}, 2),
    "memory that just fits": ({1: benchmark_of(100), 2: benchmark_of(65, memory_bytes=20)}, 2),
    "memory over the share": (
        {1: benchmark_of(100), 2: benchmark_of(65), 3: benchmark_of(60, memory_bytes=21)},
        2,
    ),
    "three fail": ({1: benchmark_of(100), 2: benchmark_of(65)}, 2),
    "two and three fail": ({1: benchmark_of(100)}, 1),
    "one does not fit": ({1: benchmark_of(100, memory_bytes=21), 2: benchmark_of(65)}, 1),
    "one fails": ({2: benchmark_of(65)}, 1),
    "all fail": ({}, 1),
}


@pytest.mark.parametrize(("measured", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_packing_with_the_most_images_is_taken_if_it_pays_and_fits(
    measured: dict[int, TrainingBenchmark], expected: int
) -> None:
    assert choose_packing(measured) == expected


def test_the_choice_is_told_with_the_figures_of_all_that_was_tried() -> None:
    measured = {1: benchmark_of(100, memory_bytes=8 * 10**9, available_bytes=140 * 10**9)}
    text = format_choice(1, measured, "2 failed: out of memory")
    assert text.startswith("1 trial has a GPU to itself: ")
    assert "(1: 100 images/s in all, 8 GB of 140 GB each; 2 failed: out of memory)" in text
    measured |= {2: benchmark_of(65.5, memory_bytes=8 * 10**9, available_bytes=70 * 10**9)}
    text = format_choice(2, measured, "")
    assert text.startswith("2 trials share a GPU: 1.31 x the images a second of one (1: 100 images/s")
    assert text.endswith("; 2: 131 images/s in all, 8 GB of 70 GB each)")


# (CPUs, GPUs), trials, flags -> packings, each with its cores for a trial
POSSIBLE = {
    "one, two and three": ((12, 1), 10, {}, {1: 12, 2: 6, 3: 4}),
    "as many as there are trials": ((12, 1), 2, {}, {1: 12, 2: 6}),
    "a GPU for each trial": ((12, 4), 4, {}, {1: 3}),
    "one more trial than GPUs": ((12, 4), 5, {}, {1: 3, 2: 2}),
    "as many as may run at once": ((12, 1), 10, {"max_concurrent": 2}, {1: 12, 2: 6}),
    "as many as there are cores": ((2, 1), 10, {}, {1: 2, 2: 1}),
    "as many as there are cores asked for": ((12, 1), 10, {"cpus_per_trial": 7}, {1: 7}),
}


@pytest.mark.parametrize(("machine", "num_trials", "flags", "expected"), POSSIBLE.values(), ids=POSSIBLE)
def test_no_more_trials_are_tried_side_by_side_than_would_run_so(
    machine: tuple[int, int], num_trials: int, flags: dict[str, int], expected: dict[int, int]
) -> None:
    cpus, gpus = machine
    options = Options.model_validate(flags | {"gpus_per_trial": "auto"})
    found = possible_packings(Cluster((Node(cpus=cpus, gpus=gpus),)), options, num_trials=num_trials)
    assert {packing: resources.cpus_per_trial for packing, resources in found.items()} == expected
    assert all(resources.gpus_per_trial == 1 / packing for packing, resources in found.items())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    move_into(tmp_path, monkeypatch)
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {f"r{row:02}": 0.01 for row in range(1, 6)}, num_epochs=4, baseline="r01")
    return tmp_path


def surveyed(place: Path, *flags: str) -> PreparedSearch:
    options, mistyped = parse_options(vars(build_parser().parse_args([*on_frames(place), *flags])))
    return survey_search(options, mistyped, default_name="x")


@without_gpu
def test_without_a_gpu_auto_is_as_if_left_out(place: Path) -> None:
    settled = settle_sharing(surveyed(place, "--gpus-per-trial", "auto"))
    assert settled.options.gpus_per_trial is None
    assert settled.config.auto_gpus_per_trial is None
    assert settled.sharing.endswith("this machine has no GPU")
    plain = surveyed(place, "--gpus-per-trial", "0")
    assert settle_sharing(plain) == plain


def test_a_share_that_was_measured_holds_unless_another_is_given(place: Path) -> None:
    def settled(*flags: str) -> PreparedSearch:
        search = surveyed(place, *flags)
        config = search.config.model_copy(update={"auto_gpus_per_trial": 1 / 3})
        return settle_sharing(replace(search, config=config))

    for flags in ((), ("--gpus-per-trial", "auto")):
        kept = settled(*flags)
        assert kept.options.gpus_per_trial == kept.config.auto_gpus_per_trial == 1 / 3
        assert kept.sharing.startswith("3 trials share a GPU, as was measured")
    assert settled("--gpus-per-trial", "1").options.gpus_per_trial == 1
    assert settled("--device", "cpu").options.gpus_per_trial is None


@without_gpu
def test_a_packing_that_cannot_be_trained_ends_the_measurement(place: Path) -> None:
    search = surveyed(place)
    possible = possible_packings(Cluster((Node(cpus=4, gpus=1),)), Options(), num_trials=5)
    assert measure_packings(search, possible) == ({}, "1 failed: this machine has no GPU to time a trial on")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--gpus", "2"), "the GPUs of --gpus are not there"),
        (("--device", "cpu"), "no trial trains on a GPU"),
        pytest.param((), "this machine has no GPU", marks=without_gpu),
    ],
)
def test_a_plan_says_why_auto_was_not_measured_and_plans_for_the_default(
    place: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], reason: str
) -> None:
    common = ("--plan", *on_frames(place), "--images-per-second", "1", *flags)
    assert run.main(list(common)) == 0
    expected = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device")]
    assert run.main([*common, "--gpus-per-trial", "auto"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("device")] == expected
    (sharing,) = (line for line in lines if line.startswith("sharing"))
    assert reason in sharing


def test_a_plan_to_resume_goes_by_the_share_in_search_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = surveyed(place, "--storage", str(place), "--name", "x")
    manifest = plain_manifest(
        name="x",
        config=search.config.model_copy(update={"auto_gpus_per_trial": 0.5}),
        trials={run.name: run for run in search.runs},
        sessions=[SESSION],
    )
    (place / "x").mkdir()
    (place / "x" / SEARCH).write_bytes(to_json(manifest))
    flags = ["--plan", "--resume", "--name", "x", "--storage", str(place), "--gpus", "2", "--images-per-second", "1"]
    assert run.main(flags) == 0
    assert "4 trials at once, 0.5 GPU," in capsys.readouterr().out
