"""One trial without Ray: it trains, reports, stops and goes on from its folder, on a local disk and elsewhere."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import pytest
from driving import write_frames

from tune_bisenet import storage as storage_module
from tune_bisenet.config import Run, TrialContext
from tune_bisenet.data import sharing
from tune_bisenet.records import LATENCY
from tune_bisenet.search.trainable import run_trial
from tune_bisenet.storage import RetryingFileSystem, RetryPolicy, Storage
from tune_bisenet.training import checkpoint
from tune_bisenet.training.benchmark import Latency

if TYPE_CHECKING:
    from tune_bisenet.data.packed import Packed

TIMES = {"train_seconds", "val_seconds", "images_per_second", "total_seconds"}


def job_in(storage: Path, data: "Packed") -> TrialContext:
    return TrialContext(
        data="streets",
        packs={"32x64": str(data.path)},
        data_digests={"32x64": data.digest},
        cache_dir=str(data.path.parent),
        backbone="none",
        backbone_digest="none",
        precision="fp32",
        storage=str(storage),
        cpus_per_trial=1,
        use_gpu=False,
        default_seed=0,
    )


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    return tiny_run.model_copy(update={"image_size": (32, 64), "num_epochs": 3})


@pytest.fixture
def job(small_data: "Packed", tmp_path: Path) -> Iterator[TrialContext]:
    yield job_in(tmp_path / "search", small_data)
    shutil.rmtree(tmp_path)  # 200 MB of weights


@pytest.fixture(scope="module")
def expected(run: Run, small_data: "Packed", tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a trial reports that nothing happens to."""
    place = tmp_path_factory.mktemp("undisturbed")
    reports = trained(run, job_in(place, small_data))
    shutil.rmtree(place)
    return reports


def trained(run: Run, job: TrialContext) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    run_trial(run, job, report=reports.append)
    return reports


class Killed(BaseException):
    """Ends a trial at its report, as Tune's stop or a signal would."""


def killed_after(num_epochs: int, run: Run, job: TrialContext) -> None:
    reports: list[dict[str, Any]] = []

    def report(result: dict[str, Any]) -> None:
        reports.append(result)
        if len(reports) == num_epochs:
            raise Killed

    with pytest.raises(Killed):
        run_trial(run, job, report=report)


def timeless(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in report.items() if key not in TIMES} for report in reports]


def numbers_of(folder: Path) -> list[dict[str, Any]]:
    return timeless(json.loads((folder / "epochs.json").read_text()))


def test_every_epoch_is_reported_once_with_the_best_so_far(expected: list[dict[str, Any]]) -> None:
    reports = expected
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    for report in reports:
        earlier = [other["miou"] for other in reports[: report["epoch"]]]
        assert report["best_miou"] == max(earlier)
        assert report["best_epoch"] == earlier.index(max(earlier)) + 1
        assert report["diverged"] is False
    assert reports[-1]["total_seconds"] == pytest.approx(
        sum(report["train_seconds"] + report["val_seconds"] for report in reports)
    )


def test_an_epoch_is_safe_on_storage_before_it_is_reported(run: Run, job: TrialContext) -> None:
    folder = Path(job.storage) / run.name

    def report(result: dict[str, Any]) -> None:
        saved = checkpoint.from_bytes((folder / "last.pt").read_bytes())
        assert saved["history"][-1]["epoch"] == result["epoch"]
        assert numbers_of(folder)[-1]["epoch"] == result["epoch"]
        assert (folder / "best.pt").exists()

    run_trial(run, job, report=report)


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_a_trial_that_was_killed_ends_as_one_that_was_not(
    run: Run, job: TrialContext, expected: list[dict[str, Any]], num_epochs: int
) -> None:
    killed_after(num_epochs, run, job)
    reports = trained(run, job)
    assert timeless(reports) == timeless(expected)[num_epochs - 1 :], (
        "the last epoch is reported again, then the others"
    )
    assert [epoch["epoch"] for epoch in numbers_of(Path(job.storage) / run.name)] == [1, 2, 3]


def test_a_trial_whose_end_nobody_heard_of_reports_it_again(
    run: Run, job: TrialContext, expected: list[dict[str, Any]]
) -> None:
    trained(run, job)
    before = (Path(job.storage) / run.name / "last.pt").stat().st_mtime_ns
    assert timeless(trained(run, job)) == timeless(expected[-1:])
    assert (Path(job.storage) / run.name / "last.pt").stat().st_mtime_ns == before


def test_a_flipped_byte_costs_one_epoch_and_changes_nothing(
    run: Run, job: TrialContext, expected: list[dict[str, Any]]
) -> None:
    killed_after(2, run, job)
    last = Path(job.storage) / run.name / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert timeless(trained(run, job)) == timeless(expected)


def test_a_kill_between_two_files_costs_one_epoch_and_changes_nothing(
    run: Run, job: TrialContext, expected: list[dict[str, Any]]
) -> None:
    killed_after(2, run, job)
    folder = Path(job.storage) / run.name
    (folder / "last.pt").rename(folder / ".last.pt.part")
    assert timeless(trained(run, job)) == timeless(expected)


def test_with_both_states_lost_a_trial_starts_over(run: Run, job: TrialContext, expected: list[dict[str, Any]]) -> None:
    killed_after(2, run, job)
    for name in ("last.pt", "previous.pt"):
        (Path(job.storage) / run.name / name).write_bytes(b"PK")
    assert timeless(trained(run, job)) == timeless(expected)


def test_the_state_of_another_run_is_refused_and_left_as_it_is(run: Run, job: TrialContext) -> None:
    trained(run.model_copy(update={"num_epochs": 1}), job)
    last = Path(job.storage) / run.name / "last.pt"
    before = last.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="was written by another run"):
        trained(run, job)
    assert last.read_bytes() == before


# --- latency ----------------------------------------------------------------------------------------------------


def without_latency(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [report | {"latency_ms": None} for report in timeless(reports)]


def kept_latency(run: Run, job: TrialContext) -> Latency:
    return Latency.from_json(json.loads((Path(job.storage) / run.name / LATENCY).read_bytes()))


def test_latency_is_none_where_nobody_asks_for_it(run: Run, job: TrialContext, expected: list[dict[str, Any]]) -> None:
    assert [report["latency_ms"] for report in expected] == [None] * 3
    trained(run.model_copy(update={"num_epochs": 1}), job)
    assert not (Path(job.storage) / run.name / LATENCY).exists()


def test_latency_is_kept_and_in_every_report_and_changes_nothing_else(
    run: Run, job: TrialContext, expected: list[dict[str, Any]]
) -> None:
    measuring = job.model_copy(update={"measures_latency": True})
    reports = trained(run, measuring)
    assert {report["latency_ms"] for report in reports} == {kept_latency(run, measuring).median_ms}
    assert without_latency(reports) == timeless(expected)


def test_a_trial_that_goes_on_keeps_the_latency_it_has(
    run: Run, job: TrialContext, expected: list[dict[str, Any]]
) -> None:
    measuring = job.model_copy(update={"measures_latency": True})
    killed_after(1, run, measuring)
    known = Latency(median_ms=12.5, low_ms=12.0, high_ms=13.0, repeats=10, device="another")
    (Path(job.storage) / run.name / LATENCY).write_text(json.dumps(known.to_json()))
    reports = trained(run, measuring)
    assert [report["latency_ms"] for report in reports] == [12.5] * 3
    assert kept_latency(run, measuring) == known
    assert without_latency(reports) == timeless(expected)


@pytest.mark.parametrize("content", [b"", b'{"median_ms": 1', b"\xff\xfe", b"[]", b'{"median_ms": null}'])
def test_a_damaged_latency_is_measured_anew(run: Run, job: TrialContext, content: bytes) -> None:
    measuring = job.model_copy(update={"measures_latency": True})
    folder = Path(job.storage) / run.name
    folder.mkdir(parents=True)
    (folder / LATENCY).write_bytes(content)
    (report,) = trained(run.model_copy(update={"num_epochs": 1}), measuring)
    assert report["latency_ms"] == kept_latency(run, measuring).median_ms


# --- data and places --------------------------------------------------------------------------------------------


def test_other_frames_than_the_drivers_are_refused(run: Run, job: TrialContext) -> None:
    other = job.model_copy(update={"data_digests": {"32x64": "0" * 16}})
    with pytest.raises(ValueError, match="holds other frames on this node"):
        trained(run, other)


def test_a_diverged_trial_says_so_and_keeps_its_last_good_weights(run: Run, job: TrialContext) -> None:
    hot = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"lr": 1e9})})
    reports = trained(hot, job)
    assert [report["diverged"] for report in reports] == [False] * (len(reports) - 1) + [True]
    assert math.isfinite(reports[-1]["miou"])
    assert math.isfinite(reports[-1]["best_miou"])
    for path in (Path(job.storage) / run.name).glob("*.pt"):
        weights = checkpoint.from_bytes(path.read_bytes())["model"]
        assert all(bool(value.isfinite().all()) for value in weights.values()), path.name


def test_a_node_without_the_pack_makes_its_own(run: Run, job: TrialContext, tmp_path: Path) -> None:
    from tune_bisenet.data.cityscapes import open_cityscapes
    from tune_bisenet.data.packing import prepare

    write_frames(tmp_path / "frames")
    source = open_cityscapes(tmp_path / "frames")
    driver_pack = prepare(source, image_size=(32, 64), cache_dir=tmp_path / "driver")
    changes = {
        "data": str(tmp_path / "frames"),
        "packs": {"32x64": str(tmp_path / "on another machine")},
        "data_digests": {"32x64": driver_pack.digest},
        "cache_dir": str(tmp_path / "worker"),
    }
    assert len(trained(run, job.model_copy(update=changes))) == run.num_epochs
    assert list((tmp_path / "worker").glob("*/train.arrow"))


def test_a_node_without_the_pack_or_the_data_fetches_what_the_driver_packed(
    run: Run, job: TrialContext, small_data: "Packed", tmp_path: Path
) -> None:
    shared = Storage.at((tmp_path / "shared").as_uri())
    sharing.publish(small_data.path, shared)
    changes = {
        "data": str(tmp_path / "nowhere"),
        "packs": {"32x64": str(tmp_path / "on another machine" / small_data.path.name)},
        "shared_packs": shared.uri,
        "cache_dir": str(tmp_path / "worker"),
    }
    assert len(trained(run, job.model_copy(update=changes))) == run.num_epochs
    assert (tmp_path / "worker" / small_data.path.name / "train.arrow").is_file()


class WithoutEvents:
    """A file system that takes everything but TensorBoard's files, until it is told to."""

    def __init__(self, place: Path) -> None:
        self._inner = pyarrow.fs.SubTreeFileSystem(str(place), pyarrow.fs.LocalFileSystem())
        self.takes_events = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_output_stream(self, path: str, **options: Any) -> Any:
        if "tfevents" in path and not self.takes_events:
            raise ConnectionResetError("away")
        return self._inner.open_output_stream(path, **options)


def test_event_files_that_cannot_be_copied_do_not_end_a_trial_and_follow_later(
    run: Run, job: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inner = WithoutEvents(tmp_path)
    patient = pyarrow.fs.PyFileSystem(RetryingFileSystem(inner, RetryPolicy("s3://bucket")))
    bucket = Storage(patient, "bucket", "s3://bucket", RetryPolicy("s3://bucket"))
    monkeypatch.setattr(Storage, "at", lambda _place: bucket)
    monkeypatch.setattr(storage_module, "FIRST_PAUSE_SECONDS", 60.0)  # longer than a copy is waited for
    there = []

    def report(result: dict[str, Any]) -> None:
        there.append(len(list((tmp_path / "bucket" / run.name).glob("*.tfevents.*"))))
        inner.takes_events = result["epoch"] >= 2

    run_trial(run, job, report=report)
    assert there == [0, 0, 1]
    assert caplog.text.count("TensorBoard's files are not copied before the next epoch") == 2


def test_in_object_storage_the_event_files_follow_every_epoch(
    run: Run, job: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Storage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()), "bucket", "s3://bucket")
    monkeypatch.setattr(Storage, "at", lambda _place: bucket)  # nothing reaches S3 here; this has no local paths either
    sizes = []

    def report(_result: dict[str, Any]) -> None:
        (events,) = (tmp_path / "bucket" / run.name).glob("*.tfevents.*")
        sizes.append(events.stat().st_size)

    run_trial(run, job, report=report)
    assert sizes == sorted(set(sizes)), "every epoch adds to it"
    assert len(sizes) == run.num_epochs
    names = {path.name for path in (tmp_path / "bucket" / run.name).iterdir()}
    assert {"last.pt", "best.pt", "epochs.json"} <= names
    reports: list[dict[str, Any]] = []
    run_trial(run, job, report=reports.append)
    assert [report["epoch"] for report in reports] == [run.num_epochs], "it goes on from there"
