"""`--plan` from end to end: a real benchmark, a page, and nothing left behind. Mistakes are refused."""

import re
from pathlib import Path

import pytest
import torch
from helpers.object_store import object_store
from helpers.rows import SESSION, plain_manifest
from helpers.searches import move_into, on_frames, write_frames, write_sampled_space, write_space

from tune_bisenet import run
from tune_bisenet.options import parse_options
from tune_bisenet.records import SEARCH, TRIALS, SavedState, TrialState, to_json
from tune_bisenet.search.prepare import survey_search


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    move_into(tmp_path, monkeypatch)
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {f"r{row:02}": 0.01 for row in range(1, 6)}, num_epochs=4, baseline="r01")
    return tmp_path


def page_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Return the plan's lines by their titles."""
    capsys.readouterr()
    assert run.main(["--plan", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "nothing was started" in lines[-1]
    return {line[:11].strip(): line[11:] for line in lines if line[:11].strip()}


def refusal_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run.main(list(flags)) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_times_a_trial_and_leaves_nothing_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    page = page_of(capsys, *on_frames(place), "--gpus-per-trial", "0", "--name", "mine", "--scheduler", "fifo")
    assert sorted(place.rglob("*")) == before
    assert re.match(r"[\d.]+ images/s per trial in training, ± \d+%, timed for \d+ s with r01 at 32x64", page["speed"])
    assert page["cost"].endswith("machine-hours")
    assert re.match(r"[\d.]+ [MG]B per trial", page["memory"])
    assert page["search"] == "mine: rows of a test"
    assert any(title.startswith("r02 ") for title in page), "the power of its claims"


def test_a_cluster_that_does_not_exist_yet_can_be_planned_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpus", "4", "--images-per-second", "0.1", "--price-per-gpu-hour", "2", "--precision", "bf16"]
    page = page_of(capsys, *on_frames(place), *flags, "--scheduler", "fifo")
    assert page["device"] == "4 trials at once, 1 GPU, 4 CPU cores each, bf16"
    hours = 5 * (4 * (80 + 10 + 0.6) + 0.24) / 3600
    assert page["cost"] == f"{hours:.3g} GPU-hours = {2 * hours:,.2f} to pay"
    halves = page_of(capsys, *on_frames(place), "--gpus", "2", "--gpus-per-trial", "0.5", "--images-per-second", "1")
    assert halves["device"] == "4 trials at once, 0.5 GPU, 2 CPU cores each, bf16"


def test_a_plan_says_what_was_published_where_a_row_expects_a_level(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpus", "4", "--images-per-second", "1"]
    assert "published" not in page_of(capsys, *on_frames(place), *flags)
    text = (place / "space.py").read_text()
    (place / "space.py").write_text(text.replace("if over else None", "if over else Expect(miou=(50, 60))"))
    assert "sees 32 crops" in page_of(capsys, *on_frames(place), *flags)["published"]  # four epochs of eight images


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time trials on")
def test_a_speed_that_cannot_be_timed_is_not_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, *on_frames(place), "--gpus", "4")
    assert "no GPU" in page["speed"]
    assert not {"time", "cost", "memory"} & page.keys()


def test_a_study_is_planned_by_what_it_may_draw(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sampled_space(place / "sampled.py", num_epochs=4)
    flags = ["--backbone", "imagenet", "--time-budget", "1h", "--images-per-second", "1"]
    page = page_of(capsys, *on_frames(place, "sampled.py"), *flags)
    assert page["backbone"] == "ResNet-18, imagenet"
    assert not (place / "torch").exists(), "weights are not fetched for a plan"
    assert "room for about 186" in page["time"]  # an hour of 38.64 s trials, two at once


def begun(place: Path) -> None:
    """A search x of which r01 has ended."""
    flags = {"space": str(place / "space.py"), "data": str(place / "frames"), "backbone": "none", "scheduler": "fifo"}
    options, mistyped = parse_options(flags | {"storage": str(place), "name": "x", "precision": "fp32"})
    search = survey_search(options, mistyped, default_name="x")
    manifest = plain_manifest(
        name="x",
        config=search.config,
        trials={run.name: run for run in search.runs},
        sessions=[SESSION | {"threads_per_trial": 2, "gpus_per_trial": 0}],
    )
    ended = TrialState.of_run("r01", search.runs[0], status="finished", epochs=4, seconds=40.0, best_miou=1.0)
    folder = place / "x"
    folder.mkdir()
    (folder / SEARCH).write_bytes(to_json(manifest))
    (folder / TRIALS).write_bytes(to_json(SavedState(states=(ended,), seconds=40)))


def test_a_plan_to_resume_counts_what_is_left(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten seconds an epoch were measured: 8 images in training, and 3 in validation that take a third as long."""
    begun(place)
    page = page_of(capsys, "--resume", "--name", "x", "--storage", str(place), "--max-concurrent", "1")
    assert page["speed"].startswith("0.9 images/s")
    assert page["time"].startswith("about 2 min 51 s")  # four trials of four epochs


def test_a_plan_to_add_names_its_trials_and_the_threads_of_the_first_session(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(place)
    flags = ["--name", "x", "--storage", str(place), "--images-per-second", "9", "--gpus", "1"]
    fewer = page_of(capsys, "--add", "--seeds", "1", *flags, "--cpus-per-trial", "1")
    assert "r01, " in fewer["trials"]
    assert "r01-s1" in fewer["trials"], "as the search itself will name it"
    assert fewer["device"] == "1 trial at once, 1 GPU, 1 CPU core each, 2 threads as in the first session, fp32"
    as_many = page_of(capsys, "--resume", *flags, "--cpus-per-trial", "2")
    assert "thread" not in as_many["device"]


def test_object_storage_is_only_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--space", str(place / "space.py"), "--data", str(place / "frames"), "--images-per-second", "1"]
    with object_store() as store:
        page_of(capsys, *flags, "--backbone", "none", "--storage", store.uri("searches"))
        assert store.listed() == []
        refusal = refusal_of(capsys, "--plan", *flags, "--storage", store.uri("searches", bucket="not-mine"))
    assert "there is no bucket not-mine" in refusal


MISTAKES = {
    "GPUs of a search": (["--gpus", "4"], "--gpus is for --plan"),
    "two clusters": (["--plan", "--gpus", "4", "--address", "127.0.0.1:1"], "--gpus and --address"),
    "GPUs that are not used": (["--plan", "--gpus", "4", "--gpus-per-trial", "0"], "--gpus-per-trial 0 uses none"),
    "no GPUs": (["--plan", "--gpus", "0"], "--gpus 0"),
    "a speed of nothing": (["--plan", "--images-per-second", "0"], "--images-per-second 0"),
    "a price below zero": (["--plan", "--price-per-gpu-hour", "-1"], "--price-per-gpu-hour -1"),
    "a row that is not there": (["--plan", "--runs", "r99"], "no row r99"),
    "GPU-hours without GPUs": (["--plan", "--gpus-per-trial", "0", "--gpu-hours", "1"], "trials here have no GPU"),
    "a cluster that does not answer": (["--plan", "--address", "127.0.0.1:1"], "no Ray cluster answers"),
    "more cores than there are": (["--plan", "--cpus-per-trial", "9999"], "Lower --cpus-per-trial"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_way_out(capsys: pytest.CaptureFixture[str], place: Path, mistake: str) -> None:
    flags, fragment = MISTAKES[mistake]
    assert fragment in refusal_of(capsys, *on_frames(place), *flags)
    assert not (place / "cache").exists()
