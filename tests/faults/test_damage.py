"""Files damaged under a search's hands: what was damaged is never trained on, is made again and is told.

`helpers/faults.py` has the search; `undisturbed` is what it gives.
"""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
from helpers.faults import (
    MOMENTS,
    NUM_EPOCHS,
    TRIALS,
    assert_as_if_nothing_had_happened,
    has_done,
    record_figures,
    start,
)
from helpers.processes import Driver, end_process
from helpers.searches import epoch_numbers, on_frames, results, statuses, write_sampled_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2700)]

Damage = Callable[[Path], None]


def flip_many(file: Path) -> None:
    """Flip a bit in each hundredth byte, in place: whichever frame is read next, it is another."""
    content = bytearray(file.read_bytes())
    for position in range(2000, len(content) - 2000, 100):
        content[position] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)


def truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(4096)


def swap(file: Path) -> None:
    """Put the file of the other split in its place, in place."""
    other = file.with_name("val.arrow" if file.name == "train.arrow" else "train.arrow")
    file.write_bytes(other.read_bytes())


DAMAGES: tuple[Damage, ...] = (flip_many, truncate, swap, Path.unlink)


def damage_once_there(damage: Damage, file: Path) -> None:
    """Damage a file of a pack, which is away for a moment while it is packed again."""
    while True:
        with suppress(FileNotFoundError):
            damage(file)
            return
        time.sleep(0.01)


def test_packed_frames_damaged_before_and_while_a_search_runs_are_never_trained_on(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    (pack,) = (path for path in (place / "cache").iterdir() if path.is_dir())
    rng, repeated, damaged = random.SystemRandom(), 0, 0
    while damaged < MOMENTS:
        flip_many(rng.choice(sorted(pack.glob("*.arrow"))))
        moments = [rng.uniform(0, 0.5) for _ in DAMAGES]
        print(f"damaged {moments} s after epochs 4, 10, 16 and 22")  # noqa: T201 - for whoever has to repeat it
        with start(place, folder.name) as driver:
            driver.until(lambda: "search " in driver.log)
            assert driver.log.count("They were packed again") == 1, "found before the first trial"
            driver.until(lambda: all(len(epoch_numbers(folder / trial)) >= 2 for trial in TRIALS[:2]))
            damage_event_files(folder)
            for number, (damage, moment) in enumerate(zip(DAMAGES, moments, strict=True)):
                driver.until(has_done(folder, 4 + 6 * number))
                time.sleep(moment)
                damage_once_there(damage, pack / rng.choice(["train.arrow", "val.arrow"]))
                damaged += 1
            assert driver.end() == 0
            assert "tried again" not in driver.log
            assert "Traceback" not in driver.log
            repeated += driver.log.count("was started over")
            log = " ".join(driver.log.split())
        assert_as_if_nothing_had_happened(folder, undisturbed)
        assert_tensorboard_reads_what_was_written_after_the_damage(folder, log)
        shutil.rmtree(folder)
    record_figures("packed frames damaged", n=damaged, epochs_repeated=repeated)


def damage_event_files(folder: Path) -> None:
    """Flip a bit in the first trial's, and cut the second's short."""
    for trial in TRIALS[:2]:
        (file,) = (folder / trial).glob("events.*")
        flip(file, file.stat().st_size // 2)
        if trial == "b":
            truncate(file)


def assert_tensorboard_reads_what_was_written_after_the_damage(folder: Path, log: str) -> None:
    """A trial that came upon damaged frames has resumed with another event file; one may have ended before."""
    for trial in TRIALS[:2]:
        message = rf"\b{trial}: the packed frames in (?:(?!the packed frames in).)* epoch (\d+) was started over"
        events = EventAccumulator(str(folder / trial)).Reload()
        if resumed := re.search(message, log):
            shown = [event.step for event in events.Scalars("miou")]
            assert set(shown) >= set(range(int(resumed[1]), NUM_EPOCHS + 1))


def test_a_study_damaged_while_a_search_runs_and_after_it_was_killed_is_rebuilt(place: Path, folder: Path) -> None:
    write_sampled_space(place / "sampled.py", num_epochs=3)
    flags = [*on_frames(place, "sampled.py"), "--trials", "5", "--scheduler", "fifo"]
    flags += ["--max-concurrent", "1", "--cpus-per-trial", "1"]
    quiet = folder.with_name("undisturbed-study")
    with Driver(place, *flags, "--name", quiet.name) as driver:
        assert driver.end() == 0
    with Driver(place, *flags, "--name", folder.name) as driver:
        driver.until(lambda: len(epoch_numbers(folder / "a")) >= 2)
        flip(folder / "study.db", 2 * 4096)
        driver.until(lambda: bool(epoch_numbers(folder / "b")))
        truncate(folder / "study.db")
        driver.until(lambda: "it is rebuilt from the trials' folders" in driver.log)
        driver.until(lambda: bool(epoch_numbers(folder / "t0002")))
        end_process(driver.process.pid, signal.SIGKILL)
    flip(folder / "study.db", 2 * 4096)
    flags = ["--storage", str(place), "--resume", "--name", folder.name]
    with Driver(place, *flags) as driver:
        driver.until(lambda: "it is rebuilt from the trials' folders" in driver.log)
        assert not any(process.is_raylet for process in driver.processes()), "found before Ray is started for it"
        assert driver.end() == 0
        assert "Traceback" not in driver.log
    assert results(folder) == results(quiet)
    assert set(statuses(folder).values()) == {"finished"}
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5
    assert len(list(folder.glob("study.db.damaged-*"))) >= 2
    record_figures("study damaged", n=3, epochs_repeated=0)
    shutil.rmtree(quiet)


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
