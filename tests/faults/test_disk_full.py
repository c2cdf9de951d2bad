"""Storage on a disk that becomes full: whatever writes there waits for room, and nothing is spent or left behind.

The disk is a small file system in memory, so most of these need root.
"""

import errno
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.faults import (
    MOMENTS,
    NUM_EPOCHS,
    TRIALS,
    assert_as_if_nothing_had_happened,
    epochs_done,
    has_done,
    record_figures,
    start,
    write_three_rows,
)
from helpers.processes import Driver, end_process
from helpers.rows import plain_epoch, plain_row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.packing import check_room, prepare_packed
from tune_bisenet.data.streets import Streets
from tune_bisenet.run import WRONG_INPUT
from tune_bisenet.search.resources import RESTARTABLE
from tune_bisenet.storage import Storage
from tune_bisenet.training.tensorboard import TrialWriter

FREE_WHERE_FULL = 2_000_000
"""Too little for weights, enough for records of a few kB: so different parts of the search find it full."""


class Disk:
    """A file system of its own that can be filled and emptied."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            path.rmdir()
            pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
        self._filler = path / "filler"

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)

    def fill(self, *, free: int = 0) -> None:
        """Leave so many bytes free, or fewer where others write at the same time."""
        left = max(0, shutil.disk_usage(self.path).free - free)
        chunk = bytes(2**20)
        with self._filler.open("wb", buffering=0) as file:
            while left > 0:
                try:
                    left -= file.write(chunk[:left])
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    def partial_files(self) -> list[Path]:
        return list(self.path.rglob(".*.part"))

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True)
        self.path.rmdir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "small", 1_000_000)
    yield disk
    disk.close()


# --- a file at a time -------------------------------------------------------------------------------------------------


def test_a_file_waits_for_room_and_leaves_no_part_meanwhile(small_disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage.at(str(small_disk.path))
    storage.write("last.pt", b"old")
    small_disk.fill(free=100_000)
    writer = threading.Thread(target=storage.write, args=("last.pt", bytes(300_000)), daemon=True)
    writer.start()
    while "It is full: make room there" not in caplog.text:
        time.sleep(0.01)
    assert small_disk.partial_files() == []
    assert storage.read("last.pt") == b"old"
    storage.write("trials.json", bytes(50_000))  # others find the room that is left
    small_disk.make_room()
    writer.join()
    assert storage.read("last.pt") == bytes(300_000)
    assert small_disk.partial_files() == []


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path))
    storage.write("last.pt", b"kept")
    (tmp_path / ".best.pt.part").write_bytes(b"cut")  # Storage.write's own name for it
    storage.remove_partial_files()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_packing_waits_for_room_and_leaves_no_part_meanwhile(
    small_disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = Streets(num_train=4, num_val=2, frame_size=(64, 128)), small_disk.path / "cache"
    small_disk.fill(free=20_000)
    with pytest.raises(OSError, match="packed frames need"):  # a person at the start of a search does not wait
        check_room(source, image_size=(32, 64), cache_dir=cache)
    packs: list[Packed] = []

    def pack() -> None:
        packs.append(prepare_packed(source, image_size=(32, 64), cache_dir=cache))

    thread = threading.Thread(target=pack, daemon=True)
    thread.start()
    while "It is full: make room there" not in caplog.text:
        time.sleep(0.01)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    small_disk.make_room()
    thread.join()
    assert len(packs[0].train) == 4
    check_room(source, image_size=(32, 64), cache_dir=cache)


def test_packing_that_runs_into_a_full_disk_begins_again_when_there_is_room(
    small_disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = Streets(num_train=4, num_val=2, frame_size=(64, 128)), small_disk.path / "cache"

    def fill(done: int, _total: int) -> None:
        if done == 1 and not caplog.text:
            small_disk.fill()

    packs: list[Packed] = []

    def pack() -> None:
        packs.append(prepare_packed(source, image_size=(32, 64), cache_dir=cache, progress=fill))

    thread = threading.Thread(target=pack, daemon=True)
    thread.start()
    while "It is full: make room there" not in caplog.text:
        time.sleep(0.01)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    small_disk.make_room()
    thread.join()
    assert len(packs[0].train) == 4


def test_an_event_file_waits_for_room_and_is_readable_before_and_after(
    small_disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    run = plain_row("r01")
    epoch = plain_epoch(1, 10.0, iou=(10.0,) * len(CITYSCAPES))
    with TrialWriter(Storage.at(str(small_disk.path)), run=run, trial="r01", completed_epochs=0) as writer:
        writer.add_epoch(epoch, best=epoch)
        writer.flush()
        small_disk.fill(free=8192)  # the next record is cut
        noise = np.random.default_rng(0).integers(0, 256, (128, 384, 3), dtype=np.uint8)
        writer.add_triptychs(1, [("street 1", noise)])
        thread = threading.Thread(target=writer.end, args=("finished",), daemon=True)
        thread.start()
        while "It is full: make room there" not in caplog.text:
            time.sleep(0.01)
        assert tags(small_disk.path)[-1] == "iou/bicycle"
        small_disk.make_room()
        thread.join()
    assert tags(small_disk.path)[-2:] == ["pictures/street 1", "_hparams_/session_end_info"]


def tags(folder: Path) -> list[str]:
    """Return what TensorBoard's reader finds in the folder's event file, in order."""
    (path,) = folder.glob("*tfevents*")
    return [value.tag for event in EventFileLoader(str(path)).Load() for value in event.summary.value]


# --- a search ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(place: Path) -> Iterator[Disk]:
    disk = Disk(place / "disk", 1_200_000_000)
    yield disk
    disk.close()


def resume_on(place: Path, disk: Disk, **variables: str) -> Driver:
    return Driver(place, "--storage", str(disk.path), "--resume", "--name", "search", variables=variables)


def fill_until_trials_wait(place: Path, disk: Disk, driver: Driver) -> None:
    """Fill the disk at a random moment of the next epochs, and see its trials find out."""
    driver.until(has_done(disk.path / "search", epochs_done(disk.path / "search") + 1))
    time.sleep(random.SystemRandom().uniform(0, 0.5))
    count = num_waits(place)
    disk.fill(free=FREE_WHERE_FULL)
    driver.until(lambda: num_waits(place) > count)
    driver.until(lambda: not disk.partial_files())


def num_waits(place: Path) -> int:
    """Count in the logs of Ray's workers how often one began to wait for room."""
    logs = place.glob("ray/session_latest/logs/worker-*.err")
    return sum(path.read_text(errors="replace").count("It is full: make room there") for path in logs)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(2700)
def test_a_full_disk_costs_no_try_and_no_result(place: Path, disk: Disk, undisturbed: list[dict[str, str]]) -> None:
    folder, num_full, seconds_to_end = disk.path / "search", 0, [0.0]
    while num_full < MOMENTS:
        shutil.rmtree(folder, ignore_errors=True)
        with start(place, "search", "--storage", str(disk.path)) as driver:
            while num_full < MOMENTS and epochs_done(folder) < NUM_EPOCHS:
                fill_until_trials_wait(place, disk, driver)
                disk.make_room()
                num_full += 1
            fill_until_trials_wait(place, disk, driver)
            began = time.monotonic()
            end_process(driver.process.pid, signal.SIGTERM)
            assert driver.end(seconds=120) == 128 + signal.SIGTERM
            seconds_to_end.append(time.monotonic() - began)
            driver.assert_nothing_lives_on()
            assert_no_try_spent(driver)
        disk.make_room()
        with resume_on(place, disk, TUNE_BISENET_RETRY_SECONDS="5") as driver:
            fill_until_trials_wait(place, disk, driver)
            assert driver.end() == RESTARTABLE
            assert_no_try_spent(driver)
        disk.make_room()
        with resume_on(place, disk) as driver:
            assert driver.end() == 0
        assert_as_if_nothing_had_happened(folder, undisturbed)
        assert disk.partial_files() == []
        for trial in TRIALS:
            scalars = EventAccumulator(str(folder / trial)).Reload().Scalars("miou")
            assert [scalar.step for scalar in scalars] == list(range(1, NUM_EPOCHS + 1))
    record_figures("disk full", n=num_full, worst_seconds_to_end=round(max(seconds_to_end), 1), epochs_repeated=0)


def assert_no_try_spent(driver: Driver) -> None:
    assert "tried again" not in driver.log
    assert "failed" not in driver.log
    assert "Traceback" not in driver.log
    assert "--resume" in driver.log.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(2700)
def test_a_search_needs_no_more_than_its_plan_says(place: Path, disk: Disk) -> None:
    write_three_rows(place)
    disk.fill(free=30_000_000)
    with start(place, "search", "--storage", str(disk.path)) as driver:
        assert driver.end() == WRONG_INPUT
        needed = re.search(r"the results need up to (\d+) MB in \S+/search, where 30 MB are free", driver.log)
        assert needed
    assert not (disk.path / "search").exists()
    disk.make_room()
    disk.resize((int(needed[1]) + 1) * 1_000_000)
    with start(place, "search", "--storage", str(disk.path)) as driver:
        assert driver.end() == 0
        assert f"at most {needed[1]} MB in all" in driver.log
    assert num_waits(place) == 0
