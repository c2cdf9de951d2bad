"""What is decided about a trial whose process has ended or is quiet: by Ray's own texts, by counts and by seconds."""

from types import ModuleType

import pytest
from helpers.rows import plain_state
from ray.exceptions import OutOfMemoryError, RayError

from tune_bisenet import storage
from tune_bisenet.data import packing
from tune_bisenet.search import failures
from tune_bisenet.storage import StorageError, StorageRefusedError

KILLED = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 4a25) was "
    "11.45GB used / 23.54GB limit (0.486488) OOM kill reason: Memory usage 12175695872B exceeded threshold"
)
"""The beginning of what Ray 2.60 says."""
DIED = "The actor died unexpectedly before finishing this task.\nThe actor is dead because its worker process has died."
RAISED = "ray::ImplicitFunc.train() (pid=7, ip=127.0.0.1)\nValueError: out of luck"


@pytest.mark.parametrize(("at_once", "fewer"), [(1, None), (2, 1), (3, 2), (5, 4), (16, 12)])
def test_a_quarter_fewer_run_at_once_and_one_alone_is_never_less(at_once: int, fewer: int | None) -> None:
    assert failures.fewer_at_once(at_once) == fewer


@pytest.mark.parametrize(
    ("error", "kernel_killed", "begins"),
    [
        (KILLED, False, "out of memory: Ray's memory monitor ended the process: 11.45GB of 23.54GB were in use on 127"),
        (f"... {failures.RAY_KILLED}", True, "out of memory: Ray's memory monitor ended the process."),
        (DIED, True, "out of memory, probably: the kernel"),
        (DIED, False, DIED),
        (RAISED, True, RAISED),
    ],
)
def test_a_process_that_was_killed_for_memory_is_told_from_one_that_died_or_raised(
    error: str, kernel_killed: bool, begins: str
) -> None:
    reason = failures.explain_loss(error, kernel_killed=kernel_killed)
    assert reason.startswith(begins)
    assert failures.describe_end(reason).endswith("give the trial more.") == reason.startswith(failures.OUT_OF_MEMORY)


def test_an_error_of_the_trial_is_shown_whole_and_a_lost_process_in_a_line() -> None:
    assert failures.describe_retry(RAISED).endswith(f":\n{RAISED}")
    assert "(The actor is dead because its worker process has died.)" in failures.describe_retry(DIED)
    assert failures.last_line("") == "unknown error"


def test_the_last_of_a_trials_errors_is_read_without_colours() -> None:
    text = f"Failure # 1 (occurred at 2026-11-29_10-00-00)\n{DIED}\nFailure # 2 (occurred at 2026-11-29_10-01-00)\n"
    assert failures.last_error(f"{text}\x1b[36mray::\x1b[39m{RAISED.removeprefix('ray::')}\n") == RAISED


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("tune_bisenet.storage.StorageError: s3://x could not be read for 600 s: reset", StorageError),
        ("tune_bisenet.storage.StorageRefusedError: s3://x: AWS Error ACCESS_DENIED. Allow it.", StorageRefusedError),
        ("PermissionError: [Errno 13] Permission denied: '/results/a'", StorageRefusedError),
        ("OSError: [Errno 30] Read-only file system: '/results/a'", StorageRefusedError),
        ("ValueError: no", None),
        ("OSError: [Errno 5] Input/output error", None),
    ],
)
def test_a_worker_whose_storage_failed_ends_the_search_whatever_raised_it(
    text: str, kind: type[StorageError] | None
) -> None:
    error = f'ray::ImplicitFunc.train()\n  File "x.py", line 1, in write\n{text}'
    if kind is None:
        failures.raise_outage(error)
        return
    with pytest.raises(kind) as raised:
        failures.raise_outage(error)
    assert type(raised.value) is kind
    assert text.endswith(str(raised.value))


def test_an_outage_is_found_under_errors_of_tune_and_ray() -> None:
    outage, memory = StorageError("away"), OutOfMemoryError("full")
    for cause in (outage, memory):
        above = RuntimeError("Tune")
        above.__cause__ = RayError("Ray")
        above.__cause__.__context__ = cause
        assert failures.find_outage(above) is (cause if cause is outage else None)
        assert list(failures.causes(above))[-1] is cause


def test_a_stall_is_ten_epochs_and_storage_and_packing_have_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_BISENET_RETRY_SECONDS", "7")
    waiting = plain_state("r01", status="running", epochs=0, seconds=0.0)
    assert failures.stall_seconds(waiting, None) == 300
    assert failures.longest_stall(waiting, None, "in forward") == 4 * 3600, "no epoch is measured"
    running = plain_state("r01", status="running", epochs=1, seconds=100.0)
    assert failures.stall_seconds(running, None) == failures.longest_stall(running, None, "in forward") == 1000
    assert failures.longest_stall(running, 60.0, "in forward") == 60
    assert failures.longest_stall(running, 60.0, None) == 67, "it may wait for storage"
    assert failures.longest_stall(running, 60.0, stack_in(storage)) == 67
    assert failures.longest_stall(running, 60.0, stack_in(packing)) == 4 * 3600


def stack_in(module: ModuleType) -> str:
    """Return what faulthandler writes of a thread that is in this module."""
    return f'Thread 0x1 (most recent call first):\n  File "{module.__file__}", line 1 in wait\n'


def test_of_a_process_only_the_thread_that_trains_is_shown() -> None:
    stacks = "Thread 1:\n  in wait\n\nThread 2:\n  in forward\n  in run_trial\n"
    assert failures.stack_of_trial(stacks) == "Thread 2:\n  in forward\n  in run_trial\n"
    assert failures.stack_of_trial("Thread 1:\n  in wait\n") == "Thread 1:\n  in wait\n"


def test_a_trial_whose_epoch_waits_for_storage_in_another_thread_has_the_time_of_retries() -> None:
    training = "Thread 2:\n  in result\n  in finish\n  in run_trial\n"
    writing = f'Thread 3:\n  File "{storage.__file__}", line 1 in write\n  File "trainable.py", line 2 in keep\n'
    running = plain_state("r01", status="running", epochs=1, seconds=1.0)
    stack = failures.stack_of_trial(f"{training}\n\nThread 1:\n  in wait\n\n\n{writing}")
    waits, trains = (failures.longest_stall(running, None, text) for text in (stack, training))
    assert waits == trains + storage.retry_seconds()
