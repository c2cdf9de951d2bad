"""What can be wrong with the input: each mistake is named with its way out, all together, and nothing is started."""

import json
import struct
from pathlib import Path

import pytest
from driving import move_into, write_frames, write_space

from tune_bisenet import run, spaces
from tune_bisenet.records import TrialState
from tune_bisenet.search.prepare import CACHE_VARIABLE, DATASET_VARIABLE


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to search in, and an environment that names no data."""
    move_into(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def frames(place: Path) -> Path:
    write_frames(place / "frames")
    return place / "frames"


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the command line says to these flags, which it must refuse without leaving a trace."""
    code = run.main(list(flags))
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.endswith("Nothing was started.\n")
    assert not Path("results").exists()
    return said


MISTAKES = {
    "no epochs": (["--epochs", "0"], ["--epochs 0", "greater than 0"]),
    "epochs in words": (["--epochs", "ten"], ["--epochs ten"]),
    "a size that is no multiple": (["--image-size", "100x200"], ["100x200", "multiple of 32", "96x192 and 128x224"]),
    "a size that is none": (["--image-size", "big"], ["big is not a size", "512x1024"]),
    "an unknown row": (["--space", "smoke", "--runs", "a,r99"], ["no row r99", "a, b, c"]),
    "a seed below zero": (["--seeds", "0,-1"], ["--seeds", "-1"]),
    "a seed twice": (["--seeds", "1,1"], ["--seeds", "twice"]),
    "an unknown scheduler": (["--scheduler", "best"], ["--scheduler best", "asha", "fifo"]),
    "an unknown precision": (["--precision", "fp8"], ["--precision fp8", "bf16"]),
    "no cores": (["--cpus-per-trial", "0"], ["--cpus-per-trial 0"]),
    "less than no GPU": (["--gpus-per-trial", "-1"], ["--gpus-per-trial -1"]),
    "an unknown space": (["--space", "nosuch"], ["there is none of that name", "runs10", "smoke"]),
    "a space file that is not there": (["--space", "spaces/mine.py"], ["mine.py", "no file"]),
    "a folder without data": (["--data", "empty"], ["no Cityscapes under", "leftImg8bit", "--data"]),
    "a backbone file that is not there": (["--backbone", "r18.pth"], ["r18.pth", "there is no such file", "none"]),
    "weights that need a network": (
        ["--backbone", "imagenet"],
        ["cannot be fetched", "--backbone FILE", "--backbone none"],
    ),
    "resuming nothing in particular": (["--resume"], ["--resume", "need the --name"]),
    "resuming what is not there": (["--resume", "--name", "x"], ["there is no search x", "--storage"]),
    "a sampler for a grid": (["--sampler", "tpe", "--trials", "3"], ["--trials, --sampler", "a grid of declared rows"]),
    "an unknown sampler": (["--space", "around10", "--sampler", "best"], ["--sampler best", "tpe", "cmaes", "qmc"]),
    "an unknown goal": (["--space", "around10", "--objectives", "speed"], ["--objectives", "speed"]),
    "latency alone": (["--space", "around10", "--objectives", "latency"], ["latency is no choice", "miou,latency"]),
    "a sampler for one goal": (
        ["--space", "around10", "--objectives", "miou,latency", "--sampler", "cmaes"],
        ["cmaes searches for one goal", "tpe"],
    ),
    "stopping by one of two goals": (
        ["--space", "around10", "--objectives", "miou,latency", "--scheduler", "asha"],
        ["--scheduler asha stops by mIoU alone", "fifo"],
    ),
    "several seeds of a sampled space": (["--space", "around10", "--seeds", "0,1"], ["one seed", "--confirm K"]),
    "a time without a unit": (["--time-budget", "8"], ["8 is no time", "8h"]),
    "no hours": (["--gpu-hours", "0"], ["--gpu-hours 0"]),
    "a teacher that is not there": (["--space", "around10", "--warm-start", "gone"], ["no search in", "gone"]),
    "a database that does not answer": (
        ["--space", "around10", "--study", "postgresql://me:secret@127.0.0.1:1/db"],
        ["postgresql://me:***@127.0.0.1:1/db cannot be used", "Connection refused"],
    ),
    "a database without a password": (
        ["--space", "around10", "--study", "postgresql://me:***@127.0.0.1:1/db"],
        ["nothing of its password is kept", "$TUNE_BISENET_STUDY"],
    ),
    "an unknown kind of database": (["--space", "around10", "--study", "nosuch://x"], ["nosuch://x cannot be used"]),
    "a warm-up that no draw fits": (
        ["--space", "around10", "--data", "frames", "--backbone", "none"],
        ["does not fit", "--proxy"],
    ),
    "an unknown storage": (["--storage", "nosuch://bucket"], ["cannot use nosuch://bucket as storage"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_way_out(capsys: pytest.CaptureFixture[str], frames: Path, mistake: str) -> None:
    assert frames.is_dir()
    flags, words = MISTAKES[mistake]
    said = refused(capsys, *flags)
    assert all(word in said for word in words), said
    assert "secret" not in said


BROKEN_SPACE = """
from search_spaces.around10 import *

def sample_some(trial):
    if trial.suggest_float("luck", 0, 1) > 0.9:
        raise KeyError("forgotten")
    return sample(trial)

SPACE = Sampled("mine", sample_some)
"""


def test_a_space_that_breaks_in_one_branch_is_refused_naming_the_draw(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    (place / "mine.py").write_text(BROKEN_SPACE)
    said = refused(capsys, "--space", str(place / "mine.py"))
    assert "of 200 random draws from the space cannot be trained" in said
    assert "luck 0.9" in said
    assert "forgotten" in said


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "a\nb", "", ".", "..", "-x", "x" * 101, "a b"])
def test_a_name_that_is_no_folder_name_is_refused(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "no name for a search" in refused(capsys, f"--name={name}")


def test_all_mistakes_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--space", "nosuch", "--data", "empty", "--backbone", "r18.pth", "--storage", "nosuch://x")
    for words in ("nosuch cannot be used", "no Cityscapes under", "there is no such file", "as storage"):
        assert words in said


def test_mistyped_flags_do_not_hide_what_else_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(
        capsys, "--epochs", "0", "--image-size", "33x64", "--name", "../x", "--data", "empty", "--space", "nosuch"
    )
    for words in ("--epochs 0", "33x64", "no name for a search", "no Cityscapes under", "nosuch cannot be used"):
        assert words in said


def test_an_abbreviated_flag_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--epoch", "3"])
    assert ended.value.code == 2
    assert "--epoch" in capsys.readouterr().err


def test_a_warm_up_that_does_not_fit_names_the_proxy(capsys: pytest.CaptureFixture[str], frames: Path) -> None:
    said = refused(capsys, "--data", str(frames), "--backbone", "none", "--runs", "r01", "--epochs", "2")
    assert "r01: a warm-up of" in said
    assert "--proxy" in said


def test_damaged_frames_are_named_all_of_them(capsys: pytest.CaptureFixture[str], frames: Path, place: Path) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    first, second, third = sorted(frames.glob("leftImg8bit/train/town/*.png"))[:3]
    first.write_bytes(first.read_bytes()[:100])
    third.unlink()
    second.write_text("no picture")
    said = refused(capsys, "--space", "space.py", "--data", str(frames), "--backbone", "none")
    for path in (second, third):
        assert path.name.removesuffix("_leftImg8bit.png") in said


def test_a_frame_whose_pixels_are_damaged_is_named(
    capsys: pytest.CaptureFixture[str], frames: Path, place: Path
) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    path = sorted(frames.glob("leftImg8bit/train/town/*.png"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert path.name in refused(capsys, "--space", "space.py", "--data", str(frames), "--backbone", "none")


def test_the_variable_names_the_data(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATASET_VARIABLE, str(place / "elsewhere"))
    assert f"no Cityscapes under {place / 'elsewhere'}" in refused(capsys, "--backbone", "none")


def test_a_flag_overrides_the_variable(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATASET_VARIABLE, str(place / "elsewhere"))
    said = refused(capsys, "--backbone", "none", "--data", "streets", "--runs", "r99")
    assert "no Cityscapes" not in said


def test_weights_of_another_network_are_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    import torch

    torch.save({"conv1.weight": torch.zeros(3)}, place / "other.pth")
    torch.save([1, 2, 3], place / "list.pth")
    (place / "text.pth").write_text("no weights")
    assert "is not a ResNet-18" in refused(capsys, "--backbone", "other.pth")
    assert "does not hold a state dict" in refused(capsys, "--backbone", "list.pth")
    assert "cannot be read" in refused(capsys, "--backbone", "text.pth")
    assert "cannot be read" in refused(capsys, "--backbone", str(place))


def test_a_cache_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], frames: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    (place / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(place / "file" / "cache"))
    said = refused(capsys, "--space", "space.py", "--data", str(frames), "--backbone", "none")
    assert CACHE_VARIABLE in said


def test_a_storage_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "file").write_text("")
    assert "--storage file cannot be written to" in refused(capsys, "--storage", "file")


BROKEN_SPACES = {
    "no space": ("x = 1", "defines no SPACE"),
    "a typing error": ("SPACE = (", "cannot be used"),
    "an unknown name": ("SPACE = Gird('x', ())", "Gird"),
    "no rows": ("from tune_bisenet.spaces import Grid\nSPACE = Grid('x', ())", "no rows"),
    "a missing module": ("import nosuch_module", "nosuch_module"),
}


@pytest.mark.parametrize("broken", BROKEN_SPACES)
def test_a_broken_space_file_is_refused(capsys: pytest.CaptureFixture[str], place: Path, broken: str) -> None:
    content, words = BROKEN_SPACES[broken]
    (place / "space.py").write_text(content)
    assert words in refused(capsys, "--space", "space.py")


def test_a_row_with_a_mistake_is_named_with_its_field(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    write_space(place / "space.py", {"a": -1.0}, num_epochs=2)
    said = refused(capsys, "--space", "space.py")
    assert "lr" in said
    assert "greater than 0" in said


@pytest.mark.skipif("avx512_bf16" in Path("/proc/cpuinfo").read_text(), reason="this CPU has bf16 instructions")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_bf16_on_a_cpu_without_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no bf16 instructions" in refused(capsys, "--precision", "bf16")


def test_no_mistake_costs_a_decoded_frame(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    refused(capsys, "--runs", "r99")
    assert not (place / "cache").exists()
    assert "packing" not in capsys.readouterr().out


def test_a_picture_that_claims_to_be_huge_is_refused(
    capsys: pytest.CaptureFixture[str], frames: Path, place: Path
) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    path = sorted(frames.glob("leftImg8bit/train/town/*.png"))[0]
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    path.write_bytes(content)
    assert path.name in refused(capsys, "--space", "space.py", "--data", str(frames), "--backbone", "none")


# --- a search that is there already ---------------------------------------------------------------------------------


@pytest.fixture
def search(place: Path) -> Path:
    """What an earlier driver left of a search on the streets: enough of it to be asked about."""
    choices = {
        "space": "smoke",
        "data": "streets",
        "backbone": "none",
        "parts": [{"runs": None, "seeds": [0]}],
        "epochs": 2,
        "image_size": [32, 64],
        "proxy": True,
        "scheduler": "fifo",
        "precision": "fp32",
    }
    data = {"name": "streets", "digests": {"32x64": "0" * 64}}
    folder = place / "kept" / "mine"
    folder.mkdir(parents=True)
    (folder / "search.json").write_text(json.dumps({"choices": choices, "data": data, "trials": {}, "sessions": []}))
    return folder


def test_a_name_that_is_taken_is_not_taken_again(capsys: pytest.CaptureFixture[str], search: Path) -> None:
    said = refused(capsys, "--space", "smoke", "--storage", str(search.parent), "--name", search.name)
    assert "there is a search mine" in said
    assert "--resume" in said


CHANGED = [["--epochs", "3"], ["--seeds", "0,1"], ["--scheduler", "asha"], ["--runs", "a"], ["--space", "runs10"]]


@pytest.mark.parametrize("flags", CHANGED, ids=lambda flags: flags[0])
def test_a_resumed_search_takes_no_other_flags(
    capsys: pytest.CaptureFixture[str], search: Path, flags: list[str]
) -> None:
    said = refused(capsys, "--storage", str(search.parent), "--name", search.name, "--resume", *flags)
    assert flags[0] in said
    assert "differs from what this search was started with" in said
    assert "--name" in said


def failed(search: Path, row: str) -> None:
    """Let the earlier driver have left a failed trial of `row`."""
    standing = TrialState(trial=row, run=row, seed=0, num_epochs=2, status="failed")
    (search / "trials.json").write_text(json.dumps({"standings": [standing.to_json()], "scheduler": {}}))


ADDED = {
    "nothing": ([], "needs to be told what"),
    "what differs": (["--seeds", "1", "--epochs", "3"], "--epochs differs"),
    "an unknown row": (["--runs", "z"], "no row z"),
}


@pytest.mark.parametrize(("flags", "words"), ADDED.values(), ids=ADDED)
def test_a_search_takes_more_trials_of_its_own_kind_only(
    capsys: pytest.CaptureFixture[str], search: Path, flags: list[str], words: str
) -> None:
    assert words in refused(capsys, "--storage", str(search.parent), "--name", search.name, "--add", *flags)


def test_what_a_search_has_already_cannot_be_added(capsys: pytest.CaptureFixture[str], search: Path) -> None:
    record = json.loads((search / "search.json").read_text())
    rows = [row.model_copy(update={"image_size": (32, 64)}) for row in spaces.load_space("smoke").runs]
    record["trials"] = {row.name: row.model_dump(mode="json") for row in rows}
    (search / "search.json").write_text(json.dumps(record))
    said = refused(capsys, "--storage", str(search.parent), "--name", search.name, "--add", "--seeds", "0")
    assert "has all these rows and seeds already" in said


def test_only_what_failed_is_run_again(capsys: pytest.CaptureFixture[str], search: Path) -> None:
    failed(search, "b")
    said = refused(capsys, "--storage", str(search.parent), "--name", search.name, "--rerun", "a")
    assert "--rerun a: nothing of that has failed. What has: b." in said


def test_frames_that_have_changed_since_are_refused(capsys: pytest.CaptureFixture[str], search: Path) -> None:
    said = refused(capsys, "--storage", str(search.parent), "--name", search.name, "--resume")
    assert "the frames in streets have changed since this search was started" in said


def test_rows_that_have_changed_since_are_refused(capsys: pytest.CaptureFixture[str], search: Path) -> None:
    record = json.loads((search / "search.json").read_text())
    row = spaces.load_space("smoke").runs[1]
    edited = row.model_copy(update={"accumulation": 3, "image_size": (32, 64)})
    record["trials"] = {"b": edited.model_dump(mode="json")}
    (search / "search.json").write_text(json.dumps(record))
    said = refused(capsys, "--storage", str(search.parent), "--name", search.name, "--resume")
    assert "the space says other things of b than when this search was started" in said


def test_a_damaged_manifest_is_named(capsys: pytest.CaptureFixture[str], search: Path) -> None:
    (search / "search.json").write_text('{"choices":')
    said = refused(capsys, "--storage", str(search.parent), "--name", search.name, "--resume")
    assert "search.json is damaged" in said
