"""What a search writes and reads back: what was never measured, and what is damaged."""

import json
import math
from pathlib import Path

import pytest
from helpers.rows import plain_epoch, plain_row

from tune_bisenet.records import (
    TRIAL,
    DamagedFileError,
    TrialRecord,
    TrialSpec,
    best_of,
    measure,
    read_sound_trial,
    read_trial,
    write_trial,
)
from tune_bisenet.storage import Storage

DIVERGED = plain_epoch(3, 99.0, loss=math.nan)


def test_a_diverged_epoch_has_no_scores_whatever_it_predicted() -> None:
    for spoilt in ({"loss": math.nan}, {"grad_norm": math.inf}, {"miou": math.nan}):
        epoch = plain_epoch(**({"number": 1, "miou": 99.0} | spoilt))
        assert epoch.diverged
        assert math.isnan(epoch.miou)
        assert math.isnan(epoch.pixel_accuracy)
        assert epoch.iou == (None,)


def test_the_best_epoch_is_the_first_of_highest_miou_among_those_that_did_not_diverge() -> None:
    first, second = plain_epoch(1, 40.0), plain_epoch(2, 40.0)
    assert best_of([first, second, DIVERGED]) is first
    assert best_of([DIVERGED]) is None
    assert best_of([]) is None


def test_a_trial_that_diverged_has_measured_what_it_measured_before() -> None:
    names = ("epochs", "best_miou", "best_epoch", "last_miou", "pixel_accuracy")
    assert [measure([plain_epoch(1, 40.0), DIVERGED])[name] for name in names] == [3, 40.0, 1, None, None]
    assert [measure([plain_epoch(1, 99.0, loss=math.nan)])[name] for name in names] == [1, None, None, None, None]


# --- damage that is still JSON ----------------------------------------------------------------------------------------

RECORD = TrialRecord.of_spec(
    TrialSpec(trial="a", run=plain_row("a", num_epochs=4)), [plain_epoch(1, 40.0), plain_epoch(2, 41.5, loss=math.nan)]
)


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    write_trial(Storage.at(str(tmp_path)), RECORD)
    return Storage.at(str(tmp_path)) / "a"


def test_a_record_comes_back_as_it_was_written_however_it_is_laid_out(folder: Storage) -> None:
    assert read_trial(folder) == RECORD
    plain = json.loads(folder.read(TRIAL) or b"")
    folder.write(TRIAL, json.dumps(dict(reversed(plain.items())), indent=4).encode())
    assert read_trial(folder) == RECORD


def test_every_changed_digit_of_a_record_is_noticed(folder: Storage) -> None:
    content = folder.read(TRIAL) or b""
    digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()]
    assert len(digits) > 100
    for index in digits:
        changed = b"1" if content[index : index + 1] != b"1" else b"2"
        folder.write(TRIAL, content[:index] + changed + content[index + 1 :])
        with pytest.raises(DamagedFileError, match=r"trial\.json is damaged"):
            read_trial(folder)
        assert read_sound_trial(folder) is None


@pytest.mark.parametrize("numbers", [[2], [1, 3], [1, 1], [1, 2, 1, 2]])
def test_epochs_count_from_1_without_gaps(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"epoch \d is missing"):
        TrialRecord.of_spec(RECORD.spec, [plain_epoch(number, 40.0) for number in numbers])
