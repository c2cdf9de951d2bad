"""One trial without Ray: it trains, reports, stops and resumes from its folder, on a local disk and elsewhere."""

import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import pytest
import torch
from helpers.searches import epoch_numbers, write_frames
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tune_bisenet.config import Run, TrialContext, shared_beginnings
from tune_bisenet.data import packing
from tune_bisenet.data.packed import open_packed
from tune_bisenet.options import InputError, Options
from tune_bisenet.records import TRIAL, Beginning, Latency, TrialRecord, TrialSpec, read_trial, to_plain, write_trial
from tune_bisenet.search import trainable
from tune_bisenet.search.failures import FAILURE, LACKS, WARNING
from tune_bisenet.search.resources import find_bf16
from tune_bisenet.search.trainable import _describe_failure, run_trial, train_trial
from tune_bisenet.storage import RetryPolicy, Storage, StorageError, StorageRefusedError
from tune_bisenet.training import checkpoint, engine
from tune_bisenet.training.engine import Training
from tune_bisenet.training.stepper import CaptureError, Stepper

if TYPE_CHECKING:
    from tune_bisenet.data.packed import Packed

TIMES = {"train_seconds", "val_seconds", "images_per_second", "seconds"}

Report = dict[str, Any]


def context_in(storage: Path, data: "Packed") -> TrialContext:
    return TrialContext(
        data="streets",
        packs={"32x64": str(data.path)},
        data_digests={"32x64": data.digest},
        cache_dir=str(data.path.parent),
        backbone="none",
        backbone_digest="none",
        precision="fp32",
        storage=str(storage),
        threads_per_trial=1,
        gpu_share=0.0,
    )


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    return tiny_run.model_copy(update={"image_size": (32, 64), "num_epochs": 3})


@pytest.fixture
def context(small_data: "Packed", tmp_path: Path) -> Iterator[TrialContext]:
    yield context_in(tmp_path / "search", small_data)
    shutil.rmtree(tmp_path)  # 200 MB of weights


@pytest.fixture
def folder(context: TrialContext, run: Run) -> Path:
    """The trial's folder, before anything is in it."""
    return Path(context.storage) / run.name


@pytest.fixture(scope="module")
def expected(run: Run, small_data: "Packed", tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """The reports of a trial that nothing happens to."""
    path = tmp_path_factory.mktemp("undisturbed")
    reports = train(run, context_in(path, small_data))
    shutil.rmtree(path)
    return reports


def train(run: Run, context: TrialContext) -> list[Report]:
    reports: list[Report] = []
    run_trial(TrialSpec(trial=run.name, run=run), context, report=reports.append)
    return reports


class Killed(BaseException):
    """Ends a trial at its report, as Tune's stop or a signal would."""


def train_and_kill(num_epochs: int, run: Run, context: TrialContext) -> None:
    reports: list[Report] = []

    def report(result: Report) -> None:
        reports.append(result)
        if len(reports) == num_epochs:
            raise Killed

    with pytest.raises(Killed):
        run_trial(TrialSpec(trial=run.name, run=run), context, report=report)


def timeless(reports: list[Report], *, latency: bool = True) -> list[Report]:
    left_out = TIMES if latency else TIMES | {"latency_ms"}
    return [{key: value for key, value in report.items() if key not in left_out} for report in reports]


def record_of(folder: Path) -> TrialRecord:
    record = read_trial(Storage.at(str(folder)))
    assert record is not None
    return record


def test_every_epoch_is_reported_once_with_the_best_so_far(expected: list[Report]) -> None:
    assert [report["epoch"] for report in expected] == [1, 2, 3]
    for report in expected:
        earlier = [other["miou"] for other in expected[: report["epoch"]]]
        assert report["best_miou"] == max(earlier)
        assert report["best_epoch"] == earlier.index(max(earlier)) + 1
        assert report["diverged"] is False
    seconds = sum(report["train_seconds"] + report["val_seconds"] for report in expected)
    assert expected[-1]["seconds"] == pytest.approx(seconds)


def newest(folder: Path) -> Path:
    """Return the state that was written last."""
    states = [path for name in ("last.pt", "previous.pt") if (path := folder / name).exists()]
    return max(states, key=lambda path: path.stat().st_mtime_ns)


def test_an_epoch_is_safe_on_storage_before_it_is_reported(run: Run, context: TrialContext, folder: Path) -> None:
    def report(result: Report) -> None:
        saved = checkpoint.from_bytes(newest(folder).read_bytes())
        assert saved["history"][-1]["epoch"] == result["epoch"]
        assert record_of(folder).epochs[-1].miou == result["miou"]
        assert (folder / "best.pt").exists()

    run_trial(TrialSpec(trial=run.name, run=run), context, report=report)


SWITCH = 2
"""The last epoch that `run` and `switching` have in common."""


@pytest.fixture
def switching(run: Run) -> Run:
    """Return `run` with a loss that switches, as r05 is to r01."""
    loss = run.loss.model_copy(update={"lovasz_after": SWITCH})
    return run.model_copy(update={"name": "switching", "loss": loss})


def sharing(context: TrialContext, *runs: Run) -> TrialContext:
    return context.model_copy(update={"shared_beginnings": shared_beginnings(runs)})


def states_of(trial: Path) -> list[dict[str, Any]]:
    """Return what a trial of an odd number of epochs resumes from, and its best weights."""
    return [checkpoint.from_bytes((trial / name).read_bytes()) for name in ("last.pt", "best.pt")]


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    slots = state.get("optimizer", {"state": {}})["state"].values()
    return [*state["model"].values(), *(tensor for slot in slots for tensor in slot.values())]


def test_epochs_that_two_rows_have_in_common_are_trained_once(
    run: Run, switching: Run, context: TrialContext, folder: Path, small_data: "Packed", tmp_path: Path
) -> None:
    alone = context_in(tmp_path / "alone", small_data)
    train(switching, alone)
    train(run, sharing(context, run, switching))
    reports = train(switching, sharing(context, run, switching))
    trial, other = Path(context.storage) / "switching", Path(alone.storage) / "switching"
    assert [report["epoch"] for report in reports] == [SWITCH, 3]
    for shared, own in zip(states_of(trial), states_of(other), strict=True):
        assert (shared["identity"], shared["run"]) == (own["identity"], own["run"])
        assert all(map(torch.equal, tensors_of(shared), tensors_of(own)))
    record = record_of(trial)
    assert record.beginning == Beginning(trial=run.name, epochs=SWITCH)
    assert record.epochs[:SWITCH] == record_of(folder).epochs[:SWITCH]
    assert record.epochs[-1].miou == record_of(other).epochs[-1].miou
    assert record.state.shared_epochs == SWITCH
    assert record.state.seconds == record.epochs[-1].seconds
    events, expected = (EventAccumulator(str(path)).Reload().Scalars("best_miou") for path in (trial, other))
    assert [(event.step, event.value) for event in events] == [(event.step, event.value) for event in expected]


def test_a_trial_that_took_over_epochs_resumes_as_any_other(
    run: Run, switching: Run, context: TrialContext, folder: Path
) -> None:
    context = sharing(context, run, switching)
    train(run, context)
    train_and_kill(1, switching, context)
    assert epoch_numbers(folder.parent / "switching") == [1, 2]
    train_and_kill(2, switching, context)
    shutil.rmtree(folder.parent / "beginnings")
    reports = train(switching, context)
    assert [report["epoch"] for report in reports] == [3]
    assert record_of(folder.parent / "switching").beginning == Beginning(trial=run.name, epochs=SWITCH)


@pytest.mark.parametrize("damage", ["flipped", "of another training", "no pictures"])
def test_a_beginning_that_cannot_be_used_is_trained_again(
    run: Run, switching: Run, context: TrialContext, folder: Path, damage: str
) -> None:
    context = sharing(context, run, switching)
    train(run, context)
    (kept,) = (folder.parent / "beginnings").iterdir()
    content = (kept / "last.pt").read_bytes()
    if damage == "flipped":
        (kept / "last.pt").write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "of another training":
        (kept / "last.pt").write_bytes(checkpoint.to_bytes(checkpoint.from_bytes(content) | {"identity": "f" * 16}))
    else:
        (kept / "best.npz").unlink()
    assert [report["epoch"] for report in train(switching, context)] == [1, 2, 3]
    assert record_of(folder.parent / "switching").beginning is None


@pytest.mark.slow
@pytest.mark.parametrize("num_epochs", [1, 2])
def test_a_trial_that_was_killed_ends_as_one_that_was_not(
    run: Run, context: TrialContext, folder: Path, expected: list[Report], num_epochs: int
) -> None:
    train_and_kill(num_epochs, run, context)
    again = timeless(train(run, context))
    assert again == timeless(expected)[num_epochs - 1 :], "the last epoch is reported again, then the others"
    assert epoch_numbers(folder) == [1, 2, 3]


def test_a_trial_whose_last_report_was_lost_only_reports_again(
    run: Run, context: TrialContext, folder: Path, expected: list[Report]
) -> None:
    train(run, context)
    before = newest(folder).stat().st_mtime_ns
    assert timeless(train(run, context)) == timeless(expected[-1:])
    assert newest(folder).stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a flipped byte", "a save that did not end", "both states lost"])
def test_a_damaged_state_costs_epochs_and_changes_nothing(
    run: Run, context: TrialContext, folder: Path, expected: list[Report], damage: str
) -> None:
    train_and_kill(2, run, context)
    last = newest(folder)
    if damage == "a flipped byte":
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif damage == "a save that did not end":
        last.rename(folder / f".{last.name}.part")
    else:
        for name in ("last.pt", "previous.pt"):
            (folder / name).write_bytes(b"PK")
    assert timeless(train(run, context)) == timeless(expected)


def test_the_state_of_another_run_is_refused_and_left_as_it_is(run: Run, context: TrialContext, folder: Path) -> None:
    train(run.model_copy(update={"num_epochs": 1}), context)
    before = (folder / "last.pt").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="another run"):
        train(run, context)
    assert (folder / "last.pt").read_bytes() == before


# --- epochs that are kept while the next one is trained, as on GPUs ---------------------------------------------------


@pytest.fixture
def kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainable, "KEPT_ASIDE", ("cpu",))


@pytest.mark.usefixtures("kept_aside")
def test_an_epoch_kept_aside_is_reported_in_its_turn_when_it_is_safe_on_storage(
    run: Run, context: TrialContext, folder: Path, expected: list[Report]
) -> None:
    reports: list[Report] = []

    def report(result: Report) -> None:
        saved = checkpoint.from_bytes(newest(folder).read_bytes())
        assert saved["history"][-1]["epoch"] == result["epoch"] == len(record_of(folder).epochs)
        assert epoch_numbers(folder) == list(range(1, result["epoch"] + 1))
        assert threading.current_thread() is threading.main_thread(), "Tune ends the thread that reports"
        reports.append(result)

    run_trial(TrialSpec(trial=run.name, run=run), context, report=report)
    assert timeless(reports) == timeless(expected)


@pytest.mark.usefixtures("kept_aside")
def test_a_trial_that_is_killed_in_the_next_epoch_ends_as_one_that_was_not(
    run: Run, context: TrialContext, folder: Path, expected: list[Report]
) -> None:
    train_and_kill(2, run, context)
    assert len(record_of(folder).epochs) == 2
    assert timeless(train(run, context)) == timeless(expected)[1:]


def test_one_epoch_is_kept_at_a_time_and_its_error_comes_where_the_trial_looks() -> None:
    reports: list[Report] = []
    may_end = threading.Event()

    def keep() -> Report:
        assert may_end.wait(timeout=60)
        return {"epoch": 1}

    def fail() -> Report:
        raise StorageError("no room")

    with trainable._Aside(reports.append) as aside:
        aside.start(keep)
        aside.poll()
        assert reports == [], "it is not kept yet"
        may_end.set()
        aside.finish()
        assert reports == [{"epoch": 1}]
        aside.finish()
        aside.start(fail)
        with pytest.raises(StorageError, match="no room"):
            aside.finish()
    assert reports == [{"epoch": 1}]


# --- what no retry mends ----------------------------------------------------------------------------------------------


@pytest.fixture
def reports_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run, TrialContext], list[Report]]:
    """What Tune is told by its trainable."""

    def train_under_tune(run: Run, context: TrialContext) -> list[Report]:
        reports: list[Report] = []
        monkeypatch.setattr(tune, "report", reports.append)
        train_trial(to_plain(TrialSpec(trial=run.name, run=run)), context=context.model_dump(mode="json"))
        return reports

    return train_under_tune


def test_what_no_retry_mends_is_reported_in_the_words_of_the_error(
    run: Run, context: TrialContext, folder: Path, reports_of: Callable[[Run, TrialContext], list[Report]]
) -> None:
    (report,) = reports_of(run, context)
    assert report.keys() == {FAILURE}
    assert "this node does not see" in report[FAILURE], "the search's folder is on another disk"
    folder.mkdir(parents=True)
    (report,) = reports_of(run, context.model_copy(update={"data_digests": {"32x64": "0" * 16}}))
    assert "holds other frames on this node" in report[FAILURE]
    train(run.model_copy(update={"num_epochs": 1}), context)
    (report,) = reports_of(run, context)
    assert "another run" in report[FAILURE]


def test_memory_that_torch_does_not_get_is_reported_as_such(
    run: Run, context: TrialContext, folder: Path, reports_of: Callable[[Run, TrialContext], list[Report]]
) -> None:
    folder.mkdir(parents=True)
    (report,) = reports_of(run.model_copy(update={"head_width": 10**9}), context)
    assert report[LACKS] == "memory"
    assert "you tried to allocate" in report[FAILURE]


def test_an_error_that_comes_from_a_network_or_a_disk_is_raised_so_that_tune_tries_again() -> None:
    with pytest.raises(InputError, match="cannot be fetched") as caught:
        raise InputError("the weights cannot be fetched") from ConnectionResetError("reset")
    with pytest.raises(InputError):
        _describe_failure(caught.value)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        _describe_failure(RuntimeError("a fault of the program"))
    with pytest.raises(OSError, match="could not be read"):
        _describe_failure(StorageError("s3://x could not be read for 600 s"))


def test_storage_that_denies_access_is_reported_as_such() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "/results/a")
    assert _describe_failure(denied) == {FAILURE: str(denied), LACKS: "access"}
    with pytest.raises(StorageRefusedError) as refused:
        RetryPolicy("s3://x")(deny)
    report = _describe_failure(refused.value)
    assert report[LACKS] == "access"
    assert "allow reading, writing" in report[FAILURE]


def deny() -> None:
    raise OSError("AWS Error ACCESS_DENIED during PutObject operation")


def test_kernels_that_repeat_their_results_change_nothing_on_a_cpu(
    run: Run, context: TrialContext, expected: list[Report]
) -> None:
    try:
        reports = train(run, context.model_copy(update={"deterministic": True}))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        trainable.choose_kernels(deterministic=False)
    assert timeless(reports) == timeless(expected)


# --- how a GPU is given a step ----------------------------------------------------------------------------------------


def test_a_trial_whose_step_cannot_be_recorded_goes_on_without_and_says_so(
    run: Run, context: TrialContext, folder: Path, expected: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.begin

    def begin(*args: Any, **kwargs: Any) -> Training:
        training = real(*args, **kwargs)
        training.stepper = Stepper("auto", training.device)
        training.stepper.is_eager = False  # as on a GPU
        hook = training.model.register_forward_pre_hook(lambda *_: hook.remove() or 1 / 0)  # type: ignore[func-returns-value]
        return training

    monkeypatch.setattr(engine, "begin", begin)
    reports = train(run, context)
    warnings = [report.pop(WARNING, "") for report in reports]
    assert "one by one instead of as a CUDA graph: a training step cannot be recorded" in warnings[0]
    assert warnings[1:] == ["", ""]
    assert timeless(reports) == timeless(expected)
    (environment,) = record_of(folder).environments
    assert environment.eager.endswith("division by zero")
    assert environment.first_epoch == 1


def test_a_trial_that_must_be_replayed_fails_on_a_cpu_without_another_try(run: Run, context: TrialContext) -> None:
    with pytest.raises(ValueError, match="--step graph") as refused:
        train(run, context.model_copy(update={"step": "graph"}))
    assert "train on a CPU here" in _describe_failure(refused.value)[FAILURE]


def test_a_step_that_cannot_be_recorded_is_not_tried_again_where_only_graphs_are_allowed() -> None:
    def step(_batches: object) -> list[torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(CaptureError) as refused:
        Stepper("graph", torch.device("cpu")).call(step, [], kind="a training step")
    report = _describe_failure(refused.value)
    assert "not permitted" in report[FAILURE]
    assert LACKS not in report


# --- what it was trained in -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_records_what_it_was_trained_in_and_adds_what_it_was_resumed_in(
    run: Run, context: TrialContext, folder: Path
) -> None:
    on_two_threads = context.model_copy(update={"threads_per_trial": 2})
    train_and_kill(1, run, on_two_threads)
    (first,) = record_of(folder).environments
    assert (first.threads, first.cuda, first.torch, first.first_epoch) == (2, None, torch.__version__, 1)
    assert first.device.startswith("CPU")
    train_and_kill(2, run, on_two_threads)
    assert record_of(folder).environments == (first,)
    train_and_kill(1, run, context)  # as it reports epoch 2 again, before it has trained another
    train(run, context)
    assert record_of(folder).environments == (first, replace(first, threads=1, first_epoch=3))


@pytest.mark.slow
def test_the_environment_of_epochs_that_are_lost_is_forgotten(run: Run, context: TrialContext, folder: Path) -> None:
    train_and_kill(1, run, context.model_copy(update={"threads_per_trial": 2}))
    (folder / "last.pt").unlink()
    train_and_kill(1, run, context)
    assert [environment.threads for environment in record_of(folder).environments] == [1]


# --- latency ----------------------------------------------------------------------------------------------------------


def test_latency_is_measured_once_where_it_is_a_goal_and_changes_nothing_else(
    run: Run, context: TrialContext, folder: Path, expected: list[Report]
) -> None:
    assert [report["latency_ms"] for report in expected] == [None] * 3
    measuring = context.model_copy(update={"measures_latency": True})
    train_and_kill(1, run, measuring)
    measured = record_of(folder).latency
    assert measured is not None
    known = replace(measured, median_ms=measured.median_ms + 1)
    write_trial(Storage.at(context.storage), replace(record_of(folder), latency=known))
    reports = train(run, measuring)
    assert [report["latency_ms"] for report in reports] == [known.median_ms] * 3
    assert record_of(folder).latency == known
    assert timeless(reports, latency=False) == timeless(expected, latency=False)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]"])
def test_a_damaged_latency_is_measured_again(run: Run, context: TrialContext, folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / TRIAL).write_bytes(content)
    measuring = context.model_copy(update={"measures_latency": True})
    (report,) = train(run.model_copy(update={"num_epochs": 1}), measuring)
    latency = record_of(folder).latency
    assert isinstance(latency, Latency)
    assert report["latency_ms"] == latency.median_ms


# --- data and storage -------------------------------------------------------------------------------------------------


def test_other_frames_than_the_drivers_are_refused(run: Run, context: TrialContext) -> None:
    other = context.model_copy(update={"data_digests": {"32x64": "0" * 16}})
    with pytest.raises(ValueError, match=r"other frames.*0000"):
        train(run, other)


@pytest.mark.skipif(find_bf16(Options()), reason="this machine has bf16 instructions")
def test_a_node_without_bf16_refuses_a_search_that_trains_in_it(run: Run, context: TrialContext) -> None:
    with pytest.raises(ValueError, match=r"no bf16 instructions.*--precision fp32"):
        train(run, context.model_copy(update={"precision": "bf16"}))


def test_a_diverged_trial_reports_it_and_keeps_its_last_good_weights(
    run: Run, context: TrialContext, folder: Path
) -> None:
    hot = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"lr": 1e9})})
    reports = train(hot, context)
    assert [report["diverged"] for report in reports] == [False] * (len(reports) - 1) + [True]
    assert math.isnan(reports[-1]["miou"])
    assert (reports[-1]["best_miou"], reports[-1]["best_epoch"], reports[-1]["last_miou"]) == (None, None, None)
    assert not (folder / "best.pt").exists()
    for path in folder.glob("*.pt"):
        weights = checkpoint.from_bytes(path.read_bytes())["model"]
        assert all(bool(value.isfinite().all()) for value in weights.values()), path.name


def test_a_node_without_the_pack_packs_its_own(run: Run, context: TrialContext, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames")
    source = packing.open_source(str(tmp_path / "frames"))
    pack = packing.prepare_packed(source, image_size=(32, 64), cache_dir=tmp_path / "driver")
    changes = {
        "data": str(tmp_path / "frames"),
        "packs": {"32x64": str(tmp_path / "on another machine")},
        "data_digests": {"32x64": pack.digest},
        "cache_dir": str(tmp_path / "worker"),
    }
    assert len(train(run, context.model_copy(update=changes))) == run.num_epochs
    assert list((tmp_path / "worker").glob("*/train.arrow"))


def test_a_node_without_the_pack_and_the_data_fetches_the_drivers_pack(
    run: Run, context: TrialContext, small_data: "Packed", tmp_path: Path
) -> None:
    shared = Storage.at((tmp_path / "shared").as_uri())
    packing.publish_packed(small_data.path, small_data.digest, shared)
    changes = {
        "data": str(tmp_path / "nowhere"),
        "packs": {"32x64": str(tmp_path / "on another machine" / small_data.path.name)},
        "shared_packs": shared.uri,
        "cache_dir": str(tmp_path / "worker"),
    }
    assert len(train(run, context.model_copy(update=changes))) == run.num_epochs
    assert (tmp_path / "worker" / small_data.path.name / "train.arrow").is_file()


def flip(pack: Path) -> None:
    content = bytearray((pack / "train.arrow").read_bytes())
    for position in range(2000, len(content) - 2000, 100):  # whichever frame is read first, it is damaged
        content[position] ^= 1
    with (pack / "train.arrow").open("r+b") as file:
        file.write(content)


def truncate(pack: Path) -> None:
    os.truncate(pack / "val.arrow", 1000)


def delete(pack: Path) -> None:
    (pack / "train.arrow").unlink()


@pytest.mark.parametrize(("damage", "after"), [(flip, 0), (flip, 1), (truncate, 1), (delete, 1)])
def test_damaged_frames_are_fetched_again_and_change_no_result(
    run: Run,
    context: TrialContext,
    expected: list[Report],
    small_data: "Packed",
    tmp_path: Path,
    damage: Callable[[Path], None],
    after: int,
) -> None:
    shared = Storage.at((tmp_path / "shared").as_uri())
    packing.publish_packed(small_data.path, small_data.digest, shared)
    pack = tmp_path / "worker" / small_data.path.name
    shutil.copytree(small_data.path, pack)
    reports: list[Report] = []

    def report(result: Report) -> None:
        reports.append(result)
        if len(reports) == after:
            damage(pack)

    if after == 0:
        damage(pack)
    changes = {"data": str(tmp_path / "nowhere"), "shared_packs": shared.uri, "cache_dir": str(pack.parent)}
    run_trial(TrialSpec(trial=run.name, run=run), context.model_copy(update=changes), report=report)
    warnings = [report.pop("warning") for report in reports if "warning" in report]
    by_epoch = {report["epoch"]: report for report in timeless(reports)}
    assert list(by_epoch.values()) == timeless(expected)
    if damage is delete and after:  # the trial has the file open
        assert warnings == []
    else:
        (warning,) = warnings
        assert str(pack) in warning
        assert "epoch 2" in warning or after == 0
        assert open_packed(pack).digest == small_data.digest


class SlowToTakeEvents:
    """A file system without local paths that refuses TensorBoard's files so many times, and takes everything else."""

    def __init__(self, folder: Path) -> None:
        self._inner = pyarrow.fs.SubTreeFileSystem(str(folder), pyarrow.fs.LocalFileSystem())
        self.num_refusals = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_output_stream(self, path: str, **options: Any) -> Any:
        if "tfevents" in path and self.num_refusals:
            self.num_refusals -= 1
            raise ConnectionResetError("unreachable")
        return self._inner.open_output_stream(path, **options)


@pytest.fixture
def filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowToTakeEvents:
    """The file system of every storage of this test."""
    filesystem = SlowToTakeEvents(tmp_path)
    bucket = Storage(filesystem, "bucket", "s3://bucket", RetryPolicy("s3://bucket"))
    monkeypatch.setattr(Storage, "at", lambda _address: bucket)
    return filesystem


def test_event_files_wait_for_storage_as_checkpoints_do(
    run: Run, context: TrialContext, tmp_path: Path, filesystem: SlowToTakeEvents, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem.num_refusals = 2
    copied = []

    def report(_result: Report) -> None:
        copied.append(len(list((tmp_path / "bucket" / run.name).glob("*.tfevents.*"))))
        filesystem.num_refusals = 1

    run_trial(TrialSpec(trial=run.name, run=run), context, report=report)
    assert copied == [1] * run.num_epochs
    assert caplog.text.count("s3://bucket cannot be written") == 1 + run.num_epochs


@pytest.mark.usefixtures("filesystem")
def test_in_object_storage_the_event_files_follow_every_epoch(run: Run, context: TrialContext, tmp_path: Path) -> None:
    sizes = []

    def report(_result: Report) -> None:
        (events,) = (tmp_path / "bucket" / run.name).glob("*.tfevents.*")
        sizes.append(events.stat().st_size)

    run_trial(TrialSpec(trial=run.name, run=run), context, report=report)
    assert sizes == sorted(set(sizes)), "every epoch adds to it"
    assert len(sizes) == run.num_epochs
    assert [report["epoch"] for report in train(run, context)] == [run.num_epochs], "it resumes there"
