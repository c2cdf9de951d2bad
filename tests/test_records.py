"""What a search writes and reads back: what was never measured, and what is damaged."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import plain_epoch, plain_row

from tune_bisenet.records import (
    TRIAL,
    DamagedFileError,
    Environment,
    Session,
    TrialRecord,
    TrialSpec,
    add_environment,
    best_of,
    code_changes,
    measure,
    read_sound_trial,
    read_trial,
    source_digest,
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


def test_the_record_of_another_trial_is_none_of_this_one(folder: Storage) -> None:
    other = folder.parent / "b"
    other.make()
    other.write(TRIAL, folder.read(TRIAL) or b"")
    with pytest.raises(DamagedFileError, match="it is that of a"):
        read_trial(other)
    assert read_sound_trial(other) is None


@pytest.mark.parametrize("numbers", [[2], [1, 3], [1, 1], [1, 2, 1, 2]])
def test_epochs_count_from_1_without_gaps(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"epoch \d is missing"):
        TrialRecord.of_spec(RECORD.spec, [plain_epoch(number, 40.0) for number in numbers])


# --- sessions ---------------------------------------------------------------------------------------------------------


def session(**changes: Any) -> Session:
    made: dict[str, Any] = {
        "started": datetime(2026, 3, 1, tzinfo=UTC),
        "command": ("python",),
        "commit": "a" * 40,
        "source": "0123456789abcdef",
        "python": "3.12.1",
        "packages": {"torch": "2.14", "numpy": "2.1"},
        "cpus_per_trial": 1,
        "threads_per_trial": 1,
        "gpus_per_trial": 0.0,
        "trials_at_once": 2,
    }
    return Session(**made | changes)


def test_what_code_and_versions_have_changed_between_sessions_is_said_in_one_sentence() -> None:
    first = session()
    assert code_changes([]) == code_changes([first]) == code_changes([first, first]) == ""
    newer = session(commit="b" * 40 + "+changes", source="f" * 16, packages={"torch": "2.15", "numpy": "2.1"})
    changes = "commit aaaaaaaaaaaa → bbbbbbbbbbbb+changes; torch 2.14 → 2.15"
    told = f"Code changed between sessions: {changes}; results of both are in this search."
    assert code_changes([first, first, newer]) == told
    assert "torch 2.14 → 2.15 → 2.14" in code_changes([first, newer, first])


def test_code_that_changed_under_the_same_commit_or_none_is_noticed() -> None:
    for commit in ("a" * 40 + "+changes", None):
        before, after = session(commit=commit), session(commit=commit, source="f" * 16)
        assert "source 0123456789abcdef → ffffffffffffffff" in code_changes([before, after])
    assert code_changes([session(source=""), session()]) == "", "an earlier version recorded none"
    assert len(source_digest()) == 16


def test_environments_tell_which_epochs_were_trained_where() -> None:
    one = Environment(threads=1, device="A10G", torch="2.15.0", numpy="2.4.6", python="3.11.9")
    other = replace(one, device="L4")
    found = add_environment((), one, epochs_done=0)
    assert add_environment(found, one, epochs_done=5) == found == (replace(one, first_epoch=1),)
    found = add_environment(found, other, epochs_done=5)
    found = add_environment(found, one, epochs_done=7)
    assert [(each.device, each.first_epoch) for each in found] == [("A10G", 1), ("L4", 6), ("A10G", 8)]
    assert add_environment(found, other, epochs_done=6) == found[:2], "epochs after the sixth are lost"
    assert add_environment(found, other, epochs_done=0) == (replace(other, first_epoch=1),)
    assert add_environment((one,), other, epochs_done=3) == (one, replace(other, first_epoch=4)), "it was not noted"
