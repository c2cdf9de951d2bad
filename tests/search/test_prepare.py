"""What can be wrong with the input: each mistake is named with its way out, all together, and nothing is started."""

import io
import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.object_store import object_store
from helpers.rows import plain_epoch, plain_state
from helpers.searches import move_into, on_frames, write_frames, write_space
from PIL import Image
from rich.console import Console

from tune_bisenet import run
from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.config import Precision, Resources
from tune_bisenet.data.packing import CACHE_VARIABLE
from tune_bisenet.options import InputError, Options, parse_options
from tune_bisenet.records import (
    SavedState,
    TrialRecord,
    read_manifest,
    read_saved_state,
    to_json,
    write_manifest,
    write_saved_state,
    write_trial,
)
from tune_bisenet.report.__main__ import main as report_main
from tune_bisenet.report.read import read_search
from tune_bisenet.report.verdicts import judge_search
from tune_bisenet.search import driver
from tune_bisenet.search.console import print_plan
from tune_bisenet.search.forecast import estimate_search
from tune_bisenet.search.prepare import DATASET_VARIABLE, PreparedSearch, prepare_search
from tune_bisenet.search.resources import find_bf16, trains_on_gpu
from tune_bisenet.search.state import SessionOutcome
from tune_bisenet.storage import Storage


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
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.endswith("Nothing was started.\n")
    assert not Path("results").exists()
    return message


FIXTURES = Path(__file__).parents[1] / "fixtures"

AROUND = ["--space", "around10", "--data", "frames", "--backbone", "none", "--proxy"]
"""A sampled search whose few frames are packed at once, for what is found only then."""

PASSWORD = "planted-password"


@pytest.mark.usefixtures("frames")
@pytest.mark.parametrize("flag", ["--storage", "--data", "--warm-start", "--study"])
def test_an_address_with_a_password_is_refused_without_showing_it(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = "postgresql" if flag == "--study" else "s3"
    message = refused(capsys, *AROUND, "--trials", "2", flag, f"{scheme}://user:{PASSWORD}@host/searches")
    assert PASSWORD not in message
    assert "password" in message


MISTAKES = {
    "an unknown precision": (["--precision", "fp8"], ["--precision fp8", "bf16"]),
    "a space file that is missing": (["--space", "spaces/mine.py"], ["mine.py"]),
    "a backbone file that is missing": (["--backbone", "r18.pth"], ["r18.pth", "none"]),
    "weights that need a network": (["--backbone", "imagenet"], ["--backbone FILE", "--backbone none"]),
    "resuming without a name": (["--resume"], ["--resume", "--name"]),
    "deciding among rows that may be stopped": (["--decide", "--scheduler", "asha"], ["--scheduler asha", "fifo"]),
    "fewer seeds than the first look": (["--decide", "--seeds", "0,1"], ["2 seeds", "looks first at 3"]),
    "a control row of a study": ([*AROUND, "--control"], ["--control", "only a grid"]),
    "noise from nowhere": (["--noise-from", "gone"], ["--noise-from gone", "no search", "STORAGE/NAME"]),
    "looks at a study": ([*AROUND, "--looks", "3,5"], ["--looks", "--confirm"]),
    "an unknown sampler": (["--space", "around10", "--sampler", "best"], ["--sampler best", "tpe", "cmaes", "qmc"]),
    "latency alone": (["--space", "around10", "--objectives", "latency"], ["latency", "miou,latency"]),
    "a sampler for one goal": (
        ["--space", "around10", "--objectives", "miou,latency", "--sampler", "cmaes"],
        ["cmaes", "tpe"],
    ),
    "stopping by one of two goals": (
        ["--space", "around10", "--objectives", "miou,latency", "--scheduler", "asha"],
        ["--scheduler asha", "fifo"],
    ),
    "several seeds of a sampled space": (["--space", "around10", "--seeds", "0,1"], ["--seeds", "--confirm K"]),
    "an earlier search that is missing": ([*AROUND, "--warm-start", "gone"], ["gone"]),
    "a database that does not answer": (
        [*AROUND, "--study", "postgresql://me@127.0.0.1:1/db"],
        ["postgresql://me@127.0.0.1:1/db", "Connection refused"],
    ),
    "a password on the command line": (
        ["--space", "around10", "--study", "postgresql://me:secret@127.0.0.1:1/db"],
        ["postgresql://me@127.0.0.1:1/db", "$TUNE_BISENET_STUDY"],
    ),
    "a hidden password": (
        ["--space", "around10", "--study", "postgresql://me:***@127.0.0.1:1/db"],
        ["password", "$TUNE_BISENET_STUDY"],
    ),
    "an unknown kind of database": ([*AROUND, "--study", "nosuch://x"], ["nosuch://x"]),
    "a warm-up that no draw fits": (
        ["--space", "around10", "--data", "frames", "--backbone", "none"],
        ["does not fit", "--proxy"],
    ),
    "an unknown storage": (["--storage", "nosuch://bucket"], ["nosuch://bucket"]),
    "a storage that is not UTF-8": (
        ["--storage", "caf\udce9"],
        [r"--storage 'caf\udce9' has bytes that are not UTF-8"],
    ),
    "a space that is not UTF-8": (
        ["--space", "caf\udce9.py"],
        [r"--space 'caf\udce9.py' has bytes that are not UTF-8"],
    ),
    "more trials than can be listed": (["--space", "around10", "--trials", "1" + "0" * 12], ["--trials", "1000000"]),
    "more seeds than can be planned": (["--looks", "1000000000"], ["--looks", "1000"]),
    "a seed that torch does not take": (["--seeds", "1" * 23], ["--seeds"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_way_out(capsys: pytest.CaptureFixture[str], frames: Path, mistake: str) -> None:
    assert frames.is_dir()
    flags, words = MISTAKES[mistake]
    message = refused(capsys, *flags)
    assert all(word in message for word in words), message
    assert "secret" not in message


def test_rows_named_like_files_of_a_search_are_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    names = ["search.json", "trials.json", "known.json", "study.db", "study.db-journal", "leaderboard.csv", "Tune"]
    names += ["leaderboard.md", "report.html", "report.md", "tables", "tune", "events.out.tfevents.1.host"]
    write_space(place / "space.py", dict.fromkeys(["fine", *names], 0.01), num_epochs=2)
    message = refused(capsys, "--space", "space.py", "--data", "streets")
    assert all(f"the row {name} is named like a file" in message for name in names)
    assert "fine" not in message


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.usefixtures("frames")
def test_a_folder_that_keeps_ray_from_starting_is_named(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    (place / "file").write_text("")
    for folder, words in {"d" * 80: "too long. Set $RAY_TMPDIR to a shorter", "file": "Ray cannot write to"}.items():
        monkeypatch.setenv(variable, str(place / folder))
        assert words in refused(capsys, *on_frames(place))
    assert not (place / "cache").exists(), "before frames are packed"


@pytest.mark.parametrize("address", ["127.0.0.1:99999", f"{'h' * 70}:6379"])
def test_an_address_that_no_cluster_can_have_is_refused(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert f"no Ray cluster answers at {address}" in refused(capsys, "--space", "smoke", "--address", address)


def test_storage_that_stops_answering_in_the_checks_asks_to_be_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_BISENET_RETRY_SECONDS", "0.5")
    with object_store() as store:

        def drop(request: str) -> None:
            if "search.json" in request:
                raise ConnectionError("dropped")

        store.before_answer = drop
        assert run.main(["--space", "smoke", "--storage", store.uri("results"), "--name", "x"]) == 75
        store.before_answer = lambda _request: None
    message = capsys.readouterr().err
    assert "s3://bucket could not be read" in message
    assert "run the same command again." in message
    assert "Nothing was started" not in message


@pytest.mark.parametrize("variable", [DATASET_VARIABLE, CACHE_VARIABLE])
def test_a_variable_that_is_not_utf8_is_refused_by_its_value(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(place / "caf\udce9"))
    assert r"caf\udce9' has bytes that are not UTF-8" in refused(capsys, "--space", "smoke", "--backbone", "none")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a\nb", "", "..", "-x", "x" * 101, "a b"])
def test_a_name_that_cannot_be_a_folder_is_refused(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "--name" in refused(capsys, f"--name={name}")


def test_all_mistakes_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--epochs", "0", "--image-size", "33x64", "--data", "empty", "--backbone", "r18.pth"]
    message = refused(capsys, *flags, "--space", "nosuch", "--storage", "nosuch://x")
    for word in ("--epochs 0", "33x64", "leftImg8bit", "r18.pth", "runs10", "nosuch://x"):
        assert word in message


def test_an_abbreviated_flag_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--epoch", "3"])
    assert ended.value.code == 2
    assert "--epoch" in capsys.readouterr().err


def test_damaged_frames_are_all_named(capsys: pytest.CaptureFixture[str], frames: Path, place: Path) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    first, second, third = sorted(frames.glob("leftImg8bit/train/town/*.png"))[:3]
    first.write_bytes(first.read_bytes()[:100])
    third.unlink()
    second.write_text("no picture")
    message = refused(capsys, *on_frames(place))
    for path in (second, third):
        assert path.name.removesuffix("_leftImg8bit.png") in message


@pytest.mark.parametrize("damage", ["a flipped byte", "a size of gigapixels"])
def test_a_frame_that_cannot_be_decoded_is_named(
    capsys: pytest.CaptureFixture[str], frames: Path, place: Path, damage: str
) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    path = sorted(frames.glob("leftImg8bit/train/town/*.png"))[0]
    content = bytearray(path.read_bytes())
    if damage == "a flipped byte":
        content[len(content) // 2] ^= 0xFF
    else:
        content[16:24] = struct.pack(">II", 60000, 60000)
    path.write_bytes(content)
    assert path.name in refused(capsys, *on_frames(place))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_a_split_without_a_scored_pixel_is_refused_with_its_ids(
    capsys: pytest.CaptureFixture[str], frames: Path, split: str, kind: str
) -> None:
    for path in frames.glob("gtFine/*/town/*.png"):
        is_void = path.parts[-3] == split
        own_ids = np.arange(32 * 64, dtype=np.uint8).reshape(32, 64) % 7
        void = own_ids if kind == "labelIds" else np.full((32, 64), 255, np.uint8)
        Image.fromarray(void if is_void else np.full((32, 64), 7, np.uint8)).save(path)
        path.rename(path.with_name(path.name.replace("labelTrainIds", kind)))
    message = refused(capsys, "--data", str(frames), "--backbone", "none", "--proxy")
    assert f"no pixel of the {split} labels in {frames}" in message
    assert message.count("no pixel") == 1


@pytest.mark.usefixtures("frames")
def test_a_second_measure_of_classes_that_the_data_do_not_have_is_refused_with_theirs(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    with (place / "space.py").open("a") as file:
        file.write("SPACE = Grid('a test', SPACE.runs, second_measure=('road', 'tram'))\n")
    message = refused(capsys, *on_frames(place))
    assert "tram is not a class of" in message
    assert "There are road, sidewalk," in message
    assert "road is not" not in message


def test_sparse_labels_are_told_in_the_plan(frames: Path) -> None:
    for path in frames.glob("gtFine/val/town/*.png"):
        label = np.full((32, 64), 255, np.uint8)
        label[:8] = 13
        Image.fromarray(label).save(path)
    options, mistyped = parse_options({"data": str(frames), "backbone": "none", "proxy": True})
    prepared = prepare_search(options, mistyped, default_name="x", progress=lambda _done, _total: None)
    (warning,) = prepared.label_warnings
    assert "only 25 % of the pixels in the val labels" in warning
    screen = io.StringIO()
    resources = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=1)
    print_plan(Console(file=screen, width=1000), estimate_search(prepared, resources, []))
    assert warning in screen.getvalue()
    assert "validation: car 25 %; 18 never; void 75 %" in screen.getvalue()


def test_what_is_no_file_is_refused_before_it_is_read(
    capsys: pytest.CaptureFixture[str], frames: Path, place: Path
) -> None:
    os.mkfifo(place / "fifo")
    assert "fifo cannot be read: it is no regular file" in refused(capsys, "--backbone", "fifo")
    assert "that is a file" in refused(capsys, "--data", "fifo", "--backbone", "none")
    shutil.rmtree(frames / "gtFine" / "val")
    (frames / "gtFine" / "val").write_text("")
    assert "gtFine/val" in refused(capsys, "--data", str(frames), "--backbone", "none")


def test_a_variable_names_the_data_and_a_flag_overrides_it(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATASET_VARIABLE, str(place / "elsewhere"))
    assert str(place / "elsewhere") in refused(capsys, "--backbone", "none")
    assert "elsewhere" not in refused(capsys, "--backbone", "none", "--data", "streets", "--runs", "r99")


def test_weights_of_another_network_are_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    import torch

    torch.save({"conv1.weight": torch.zeros(3)}, place / "other.pth")
    torch.save([1, 2, 3], place / "list.pth")
    (place / "text.pth").write_text("no weights")
    assert "is not a ResNet-18" in refused(capsys, "--backbone", "other.pth")
    assert "does not hold a state dict" in refused(capsys, "--backbone", "list.pth")
    assert "cannot be read" in refused(capsys, "--backbone", "text.pth")
    assert "cannot be read" in refused(capsys, "--backbone", str(place))


@pytest.mark.usefixtures("frames")
def test_a_cache_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    (place / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(place / "file" / "cache"))
    message = refused(capsys, *on_frames(place))
    assert CACHE_VARIABLE in message


def test_a_storage_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "file").write_text("")
    assert "--storage file cannot be written to" in refused(capsys, "--storage", "file")


@pytest.mark.skipif(find_bf16(Options()), reason="this machine has bf16 instructions")
def test_bf16_on_a_machine_without_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no bf16 instructions" in refused(capsys, "--precision", "bf16")


@pytest.mark.skipif(trains_on_gpu(Options()), reason="this machine has a GPU")
@pytest.mark.parametrize("flags", [(), ("--device", "cpu"), ("--gpus-per-trial", "0")])
def test_graphs_are_refused_where_trials_train_on_a_cpu(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert "--step graph: trials would train on a CPU" in refused(capsys, "--step", "graph", *flags)


def test_a_gpu_is_trained_on_unless_a_flag_says_otherwise() -> None:
    planned = [Options(gpus=4), Options(gpus=4, device="cpu"), Options(gpus=4, gpus_per_trial=0.0)]
    assert [trains_on_gpu(options) for options in planned] == [True, False, False]


def test_no_mistake_costs_a_decoded_frame(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    refused(capsys, "--runs", "r99")
    assert not (place / "cache").exists()
    assert "packing" not in capsys.readouterr().out


# --- a search that exists ---------------------------------------------------------------------------------------------

RESOURCES = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)
COMMAND = ("python", "-m", "tune_bisenet.run", "--seeds", "3,4")


def prepared(**flags: object) -> PreparedSearch:
    return prepare_search(*parse_options(flags), default_name="default", progress=lambda _done, _total: None)


@pytest.fixture
def search(place: Path, frames: Path) -> PreparedSearch:
    """A search of two rows and two seeds on eleven small frames, whose driver ended before the first trial."""
    write_space(place / "space.py", {"a": 0.01, "b": 0.02}, num_epochs=2, baseline="a")
    flags = {"space": str(place / "space.py"), "data": str(frames), "backbone": "none", "seeds": "3,4"}
    search = prepared(**flags, storage=str(place / "kept"), name="mine")
    write_manifest(search.folder, driver._make_manifest(search, RESOURCES, COMMAND))
    return search


def resumed(search: PreparedSearch) -> list[str]:
    folder = search.folder.local_path
    assert folder is not None
    return ["--storage", str(folder.parent), "--name", folder.name]


def test_the_manifest_holds_all_that_is_needed_to_repeat_a_search(search: PreparedSearch) -> None:
    manifest = read_manifest(search.folder)
    assert manifest is not None
    assert (manifest.name, manifest.space.baseline, manifest.config) == ("mine", "a", search.config)
    assert list(manifest.trials) == ["a-s3", "b-s3", "a-s4", "b-s4"]
    assert tuple(manifest.trials.values()) == search.runs
    assert manifest.data.digests == {"32x64": next(iter(search.packs.values())).digest}
    assert (manifest.data.train_images, manifest.data.val_images) == (8, 3)
    (session,) = manifest.sessions
    assert session.command == COMMAND
    assert {"tune-bisenet", *driver.PACKAGES} == set(session.packages)
    assert session.commit is None or len(session.commit.removesuffix("+changes")) == 40
    assert session.ended is None


def test_a_resumed_search_keeps_its_configuration_and_adds_a_session(search: PreparedSearch) -> None:
    storage, name = resumed(search)[1::2]
    again = prepared(storage=storage, name=name, resume=True)
    assert (again.runs, again.config) == (search.runs, search.config)
    manifest = driver._make_manifest(again, RESOURCES, (*COMMAND, "--resume"))
    outcome = SessionOutcome(signal_number=15, warnings=["a: once", "b: once", "a: once"])
    first, second = driver._end_session(manifest, outcome).sessions
    assert second.warnings == ("a: once", "b: once")
    assert (first.command, first.signal) == (COMMAND, None)
    assert (second.command[-1], second.signal) == ("--resume", 15)
    assert second.ended is not None
    assert second.started <= second.ended


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_is_settled_as_a_search_begins_and_kept_when_it_is_resumed_or_added_to(
    search: PreparedSearch, precision: Precision
) -> None:
    assert search.config.precision == ("bf16" if find_bf16(Options()) else "fp32")
    config = search.config.model_copy(update={"precision": precision})
    manifest = driver._make_manifest(replace(search, config=config), RESOURCES, COMMAND)
    write_manifest(search.folder, manifest)
    storage, name = resumed(search)[1::2]
    kept: dict[str, object] = {"storage": storage, "name": name}
    if precision == "bf16" and not find_bf16(Options()):
        with pytest.raises(InputError, match="no bf16 instructions"):
            prepared(**kept, resume=True, precision="auto")
        return
    assert prepared(**kept, resume=True, precision="auto").config.precision == precision
    assert prepared(**kept, add=True, seeds="5").config.precision == precision


def test_a_control_row_stays_in_its_search(place: Path, frames: Path) -> None:
    write_space(place / "space.py", {"a": 0.01, "b": 0.02}, num_epochs=2, baseline="a")
    flags = {"space": str(place / "space.py"), "data": str(frames), "backbone": "none", "control": True}
    search = prepared(**flags, storage=str(place / "kept"), name="mine", seeds="3,4")
    assert list(search.specs) == ["a-s3", "b-s3", "aa-s3", "a-s4", "b-s4", "aa-s4"]
    write_manifest(search.folder, driver._make_manifest(search, RESOURCES, COMMAND))
    again = prepared(storage=str(place / "kept"), name="mine", resume=True)
    assert (again.runs, again.space) == (search.runs, search.space)
    more = prepared(storage=str(place / "kept"), name="mine", add=True, runs="a,aa", seeds="5")
    assert list(more.specs)[6:] == ["a-s5", "aa-s5"]


CHANGED = [
    ["--resume", "--control"],
    ["--resume", "--epochs", "3"],
    ["--resume", "--seeds", "0,1"],
    ["--resume", "--scheduler", "median"],
    ["--resume", "--runs", "a"],
    ["--resume", "--space", "runs10"],
    ["--add", "--epochs", "3", "--seeds", "1"],
]


@pytest.mark.parametrize("flags", CHANGED, ids=lambda flags: flags[1])
def test_a_resumed_search_takes_no_other_flags(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, flags: list[str]
) -> None:
    message = refused(capsys, *resumed(search), *flags)
    assert f"{flags[1]} differs" in message
    assert "--name" in message


REFUSED = {
    "a name that is taken": (["--data", "frames", "--backbone", "none"], ["a search mine", "--resume"]),
    "adding nothing": (["--add"], ["--add", "--seeds", "--runs"]),
    "adding an unknown row": (["--add", "--runs", "z"], ["no row z"]),
    "adding what is there": (["--add", "--seeds", "3"], ["--add"]),
    "repeating what has not failed": (["--rerun", "a"], ["--rerun a", "b."]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_more_trials_must_be_new_ones_or_have_failed(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, case: str
) -> None:
    failed = plain_state("b-s3", run="b", seed=3, status="failed")
    search.folder.write("trials.json", to_json(SavedState(states=(failed,))))
    flags, words = REFUSED[case]
    message = refused(capsys, *resumed(search), *flags)
    assert all(word in message for word in words), message


def test_what_has_moved_is_known_by_its_content(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path, frames: Path
) -> None:
    frames.rename(place / "elsewhere")
    (place / "space.py").rename(place / "rows.py")
    message = refused(capsys, *resumed(search), "--resume")
    assert "space.py" in message
    assert f"no Cityscapes under {frames}" in message
    assert "name its place by --space and --data" in message
    message = refused(capsys, *resumed(search), "--resume", "--space", "rows.py")
    assert "name its place by --data" in message
    storage, name = resumed(search)[1::2]
    moved = {"data": str(place / "elsewhere"), "space": str(place / "rows.py")}
    again = prepared(storage=storage, name=name, resume=True, **moved)
    assert again.runs == search.runs
    assert again.config == search.config.model_copy(update=moved)
    assert [pack.digest for pack in again.packs.values()] == [pack.digest for pack in search.packs.values()]


def test_other_data_and_another_backbone_are_told_as_what_they_are(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path, frames: Path
) -> None:
    shutil.copytree(frames, place / "fewer")
    for path in (place / "fewer").rglob("*train_000003*"):
        path.unlink()
    message = refused(capsys, *resumed(search), "--resume", "--data", "fewer")
    assert "7 training and 3 validation frames, but this search was started on 8 training and 3" in message
    assert message.count("error:") == 1
    message = refused(capsys, *resumed(search), "--resume", "--backbone", "imagenet", "--plan")
    assert "the backbone imagenet has other weights" in message


def test_after_the_first_error_nothing_is_told_of_another_search(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch
) -> None:
    assert refused(capsys, *resumed(search), "--resume", "--epochs", "3").count("error:") == 1
    assert refused(capsys, "--name", "other", "--resume", "--runs", "r99").count("error:") == 1


def resume_with(search: PreparedSearch, place: Path, rows: dict[str, float], **flags: object) -> PreparedSearch:
    """Prepare a session with these rows in the space, and write what it would begin with."""
    write_space(place / "space.py", rows, num_epochs=2, baseline="a")
    storage, name = resumed(search)[1::2]
    again = prepared(**{"storage": storage, "name": name, "resume": not flags} | flags)
    write_manifest(again.folder, driver._make_manifest(again, RESOURCES, COMMAND))
    return again


def test_a_row_that_was_taken_out_and_put_back_changed_is_refused(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path
) -> None:
    for spec in search.specs.values():
        write_trial(search.folder, TrialRecord.of_spec(spec, [plain_epoch(1, 10.0), plain_epoch(2, 11.0)]))
    assert resume_with(search, place, {"a": 0.01, "b": 0.02}).changes == ()
    (gone,) = resume_with(search, place, {"a": 0.01}).changes
    assert "taken out: row b; results stay in storage" in gone
    write_space(place / "space.py", {"a": 0.01, "b": 0.2}, num_epochs=2, baseline="a")
    message = refused(capsys, *resumed(search), "--resume")
    assert "row b has changed: optimizer lr 0.02 → 0.2." in message
    (back,) = resume_with(search, place, {"a": 0.01, "b": 0.02}).changes
    assert "put back: row b, with the results in storage" in back


def test_the_report_of_a_search_needs_no_space(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path
) -> None:
    for spec in search.specs.values():
        write_trial(search.folder, TrialRecord.of_spec(spec, [plain_epoch(1, 10.0), plain_epoch(2, 11.0)]))

    def reports() -> list[str]:
        pages = []
        for flags in ([], ["--next"], ["--replay"]):
            assert report_main([str(search.folder.path), *flags]) == 0
            pages.append("".join(capsys.readouterr()))
        return pages

    whole = reports()
    assert "b" in [line.split()[0] for line in whole[0].splitlines() if line.strip()]
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2, baseline="a")
    assert reports() == whole, "it lacks a row"
    (place / "space.py").unlink()
    assert reports() == whole, "it has moved"


def test_rows_are_put_into_a_search_by_add_alone(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path
) -> None:
    rows = {"a": 0.01, "b": 0.02, "c": 0.05, "d": 0.07}
    for file in ("space.py", "moved.py"):
        write_space(place / file, rows, num_epochs=2, baseline="a")
        message = refused(capsys, *resumed(search), "--resume", "--space", file)
        assert "rows c, d: not in this search" in message
        assert "--add --runs c,d" in message
    more = resume_with(search, place, rows, add=True, runs="c,d")
    assert more.changes == ("put in: rows c, d",)
    assert {run.name for run in more.runs} == set(rows)
    assert resume_with(search, place, rows).changes == ()


def test_the_digest_of_a_size_that_is_not_trained_any_more_is_kept(search: PreparedSearch) -> None:
    before = read_manifest(search.folder)
    assert before is not None
    digests = {"64x128": "of another size"} | before.data.digests
    data = before.data.model_copy(update={"digests": digests})
    write_manifest(search.folder, before.model_copy(update={"data": data}))
    storage, name = resumed(search)[1::2]
    again = prepared(storage=storage, name=name, resume=True)
    assert driver._make_manifest(again, RESOURCES, COMMAND).data.digests == digests


def test_a_search_is_resumed_with_classes_of_the_same_names_in_any_colours(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path
) -> None:
    classes = CITYSCAPES.model_dump(mode="json")
    path = place / "frames" / "classes.json"
    classes["classes"][0] |= {"colour": [1, 2, 3]}
    path.write_text(json.dumps(classes))
    storage, name = resumed(search)[1::2]
    again = prepared(storage=storage, name=name, resume=True)
    assert driver._make_manifest(again, RESOURCES, COMMAND).data.classes.colours[0] == (1, 2, 3)
    assert again.packs.keys() == search.packs.keys()
    classes["classes"][0] |= {"name": "street"}
    path.write_text(json.dumps(classes))
    message = refused(capsys, *resumed(search), "--resume")
    assert "has the classes street, sidewalk" in message
    assert "was started with road, sidewalk" in message


def test_what_the_stopping_rule_saw_is_rebuilt_from_the_trials_where_it_is_lost(
    search: PreparedSearch, caplog: pytest.LogCaptureFixture
) -> None:
    ended, running = list(search.specs.values())[:2]
    epochs = [plain_epoch(1, 10.0), plain_epoch(2, 11.0)]
    stopped = TrialRecord.of_spec(ended, epochs)
    stopped = replace(stopped, state=replace(stopped.state, status="stopped", stopped_by="below the median"))
    write_trial(search.folder, stopped)
    write_trial(search.folder, TrialRecord.of_spec(running, epochs))
    storage, name = resumed(search)[1::2]
    again = prepared(storage=storage, name=name, resume=True)
    again = replace(again, config=again.config.model_copy(update={"scheduler": "median"}))
    stopper = driver._restore_stopper(again, read_saved_state(again.folder))
    assert stopper.seen == {2: {ended.trial: {1: 10.0, 2: 11.0}, running.trial: {1: 10.0}}}
    assert stopper.stops == {ended.trial: "below the median"}
    assert "trials.json was missing or damaged" in caplog.text
    caplog.clear()
    write_saved_state(again.folder, SavedState(scheduler=stopper.to_json()))
    assert driver._restore_stopper(again, read_saved_state(again.folder)).to_json() == stopper.to_json()
    assert not caplog.text


def test_a_search_that_another_driver_has_run_since_it_was_checked_is_not_overwritten(search: PreparedSearch) -> None:
    storage, name = resumed(search)[1::2]
    late = prepared(storage=storage, name=name, resume=True)
    write_manifest(late.folder, driver._make_manifest(late, RESOURCES, COMMAND))
    before = late.folder.read("search.json")
    for checked in (late, replace(late, earlier=None)):
        with pytest.raises(InputError, match="another driver has run the search"):
            driver.run_search(checked, Console(), COMMAND, print)
    assert late.folder.read("search.json") == before


def test_a_measure_is_declared_before_results_are_seen(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, place: Path
) -> None:
    space = (place / "space.py").read_text()
    for change in ("second_measure=('sky', 'road')", "measured_share=0.5"):
        (place / "space.py").write_text(space.replace("))\n", f"), {change})\n"))
        message = refused(capsys, *resumed(search), "--add", "--seeds", "5")
        assert f"{change.split('=')[0]} of the space is" in message
    (place / "space.py").write_text(space.replace("))\n", "), second_measure=('sky', 'road'))\n"))
    flags = {"space": str(place / "space.py"), "data": str(place / "frames"), "backbone": "none"}
    other = prepared(**flags, storage=str(place / "kept"), name="other")
    assert driver._make_manifest(other, RESOURCES, COMMAND).space.second_measure == ("sky", "road")


def test_noise_is_taken_from_a_search_with_repeats_alone(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch
) -> None:
    message = refused(capsys, "--space", "smoke", "--noise-from", str(search.folder.local_path))
    assert "no two rows" in message
    assert "--add --seeds" in message
    measured = prepared(space="smoke", noise_from=str(FIXTURES / "grid"), name="other", storage=str(search.folder.path))
    assert measured.noise == judge_search(read_search(Storage.at(str(FIXTURES / "grid")))).noise
    assert "noise_from" not in type(measured.config).model_fields


@pytest.mark.parametrize(
    "changes",
    [
        {"sessions": []},
        {"config": 5},
        {"trials": 5},
        {"trials": {"a-s3": {}}},
        {"data": {"digests": {}, "train_images": 8, "val_images": 3}},
        {"config": {"groups": []}},
        {"config": {"limits": [1]}},
        {"backbone_digest": "other"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_damaged_manifest_is_named(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, changes: dict[str, Any]
) -> None:
    content = json.loads(search.folder.read("search.json") or b"")
    for name, value in changes.items():
        content[name] = {**content[name], **value} if name == "config" and isinstance(value, dict) else value
    search.folder.write("search.json", json.dumps(content).encode())
    message = refused(capsys, *resumed(search), "--resume")
    assert "search.json is damaged" in message
    assert "another --name" in message


@pytest.mark.parametrize("missing", [None, "config", "trials", "data", "space", "sessions", "name"])
def test_a_manifest_without_its_keys_starts_no_other_search(
    capsys: pytest.CaptureFixture[str], search: PreparedSearch, missing: str | None
) -> None:
    content = json.loads(search.folder.read("search.json") or b"")
    damaged = json.dumps({key: value for key, value in content.items() if key != missing} if missing else {}).encode()
    search.folder.write("search.json", damaged)
    assert "search.json is damaged" in refused(capsys, *resumed(search), "--resume")
    assert "search.json is damaged" in refused(capsys, *resumed(search))
    assert report_main([str(search.folder.path)]) == 2
    assert "search.json is damaged" in capsys.readouterr().err
    assert search.folder.read("search.json") == damaged
