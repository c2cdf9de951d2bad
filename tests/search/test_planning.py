"""`--plan` from end to end: a real probe, a page, and nothing left behind. Mistakes are refused as ever."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from driving import move_into, on_frames, write_frames, write_sampled_space, write_space
from moto.server import ThreadedMotoServer

from tune_bisenet import run
from tune_bisenet.config import Resources, Run
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.streets import Streets
from tune_bisenet.estimate import probe, timing
from tune_bisenet.estimate.forecast import kinds_of
from tune_bisenet.records import TrialState


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    move_into(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(Path(run.__file__).parents[1]))  # the probe starts in another folder
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {f"r{row:02}": 0.01 for row in range(1, 6)}, num_epochs=4, baseline="r01")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """The page by its titles."""
    capsys.readouterr()
    assert run.main(["--plan", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "A plan: nothing was started. The same command without --plan does it."
    return {line[:11].strip(): line[11:] for line in lines if line[:11].strip()}


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run.main(list(flags)) == 2
    words = capsys.readouterr().err
    assert words.endswith("Nothing was started.\n")
    return words


def test_a_plan_times_trials_and_leaves_nothing_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    page = said(capsys, *on_frames(place), "--gpus-per-trial", "0", "--name", "mine", "--scheduler", "fifo")
    assert sorted(place.rglob("*")) == before
    assert re.match(r"[\d.]+ images per second and trial in training \(± \d+%\), [\d.]+ in validation;", page["speed"])
    assert "on CPU" in page["speed"]
    assert page["time"].startswith("about ")
    assert page["cost"].endswith("machine-hours")
    assert re.match(r"[\d.]+ [MG]B of main memory a trial", page["memory"])
    assert page["search"] == "mine: rows of a test"
    assert any(title.startswith("r02 ") for title in page), "and the promises"


def test_a_speed_that_is_given_is_not_timed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, *on_frames(place), "--images-per-second", "10", "--scheduler", "fifo")
    assert page["speed"].startswith("10 images per second and trial in training, as given")


def test_a_cluster_that_is_not_there_yet_can_be_planned_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpus", "4", "--images-per-second", "0.1", "--price-per-gpu-hour", "2", "--precision", "bf16"]
    page = said(capsys, *on_frames(place), *flags, "--scheduler", "fifo")
    assert page["device"] == "4 trials at once, 1 GPU, 4 CPU cores each, bf16"
    hours = 5 * (4 * (80 + 10 + 0.6) + 0.24) / 3600
    assert page["cost"] == f"{hours:.3g} GPU-hours = {2 * hours:,.2f} to pay"
    halves = said(capsys, *on_frames(place), "--gpus", "2", "--gpus-per-trial", "0.5", "--images-per-second", "1")
    assert halves["device"] == "4 trials at once, 0.5 GPU, 2 CPU cores each, fp32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time trials on")
def test_what_cannot_be_timed_here_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, *on_frames(place), "--gpus", "4")
    assert page["speed"] == "not known: no GPU here to time it on; --images-per-second X states it"
    assert "time" not in page
    assert "estimated" in page["memory"]


def test_weights_are_not_fetched_for_a_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search without a network is refused for them; see test_preflight."""
    page = said(capsys, *on_frames(place), "--backbone", "imagenet", "--images-per-second", "10")
    assert page["backbone"] == "ResNet-18, imagenet"
    assert not (place / "torch").exists()


def test_a_sampled_search_is_planned_by_what_it_may_draw(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sampled_space(place / "sampled.py", num_epochs=4)
    page = said(capsys, *on_frames(place, "sampled.py"), "--trials", "7", "--images-per-second", "1")
    assert page["trials"] == "7, the rows a, b first, 4 epochs of 2 iterations each"
    assert "truly best row" in page["scheduler"]
    assert "confirms nothing" in page["promises"]


def begun(place: Path) -> None:
    """A search x of which r01 has ended."""
    kept = TrialState(
        trial="r01", run="r01", seed=0, num_epochs=4, status="finished", epochs=4, seconds=40.0, best_miou=1.0
    )
    folder = place / "x"
    folder.mkdir()
    choices = {"space": str(place / "space.py"), "data": str(place / "frames"), "backbone": "none"}
    more = {"parts": [{"runs": None, "seeds": [0]}], "epochs": None, "image_size": None, "proxy": False}
    record = {"choices": choices | more | {"scheduler": "fifo", "precision": "fp32"}, "trials": {}, "data": {}}
    (folder / "search.json").write_text(json.dumps(record))
    (folder / "trials.json").write_text(json.dumps({"standings": [kept.to_json()], "scheduler": None, "seconds": 40}))


def test_a_plan_to_resume_counts_what_is_left(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(place)
    page = said(capsys, "--resume", "--name", "x", "--storage", str(place), "--max-concurrent", "1")
    assert page["speed"] == "10.0 s an epoch, as in earlier sessions of this search"
    assert page["time"] == "about 2 min 50 s for all to their end, 1 at once, after Ray's start"


def test_a_plan_to_add_names_trials_as_the_search_will(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(place)
    page = said(capsys, "--add", "--seeds", "1", "--name", "x", "--storage", str(place), "--images-per-second", "9")
    assert "r01, " in page["trials"]
    assert "r01-s1" in page["trials"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """An empty bucket of a real S3 server, that of moto."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="mine")
    yield client, f"s3://mine/searches?scheme=http&region=us-east-1&endpoint_override={host}:{port}"
    server.stop()


def test_object_storage_is_only_read(place: Path, capsys: pytest.CaptureFixture[str], bucket: tuple[Any, str]) -> None:
    client, storage = bucket
    flags = ["--space", str(place / "space.py"), "--data", str(place / "frames"), "--images-per-second", "1"]
    said(capsys, *flags, "--backbone", "none", "--storage", storage)
    assert client.list_objects_v2(Bucket="mine")["KeyCount"] == 0
    assert "there is no bucket not-mine" in refused(
        capsys, "--plan", *flags, "--storage", storage.replace("//mine", "//not-mine")
    )


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
    flags, words = MISTAKES[mistake]
    assert words in refused(capsys, *on_frames(place), *flags)
    assert not (place / "cache").exists()


def test_a_damaged_frame_among_those_that_are_timed_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = min((place / "frames/leftImg8bit/train/town").iterdir())
    first.write_bytes(first.read_bytes()[:-60])
    assert first.name in refused(capsys, "--plan", *on_frames(place), "--gpus-per-trial", "0")


# --- the probe ------------------------------------------------------------------------------------------------------


def test_every_kind_of_epoch_is_timed_side_by_side(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 20.0)  # on a busy machine the first kind may take all of the eight
    switching = tiny_run.model_copy(update={"loss": tiny_run.loss.model_copy(update={"lovasz_after": 1})})
    two = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)
    source = Streets(num_train=4, num_val=2, frame_size=(64, 128))
    found = timing.time_trials(source, [tiny_run, switching], two, "fp32")
    assert set(found.speed.timings) == set(kinds_of(switching))
    assert all(timed.train > 0 and timed.val > 0 for timed in found.speed.timings.values())
    assert (found.side_by_side, found.num_untimed, found.card_bytes) == (2, 0, None)
    assert 100e6 < found.process_bytes < 5e9


def test_a_probe_that_fails_says_why(tiny_run: Run) -> None:
    order = probe.Order(runs=(tiny_run,), packs=("nowhere",), precision="fp32", use_gpu=False, threads=1, seconds=1.0)
    with pytest.raises(timing.ProbeError, match="no pack at nowhere"):
        timing._answer(order)


def test_few_frames_are_repeated_without_a_copy(tiny_data: Packed) -> None:
    many = probe._repeated(tiny_data, 20)
    assert (len(many.train), len(many.val)) == (20, 20)
    assert many.train.images[8] is tiny_data.train.images[0]
    assert many.val.names[4] == tiny_data.val.names[0]
