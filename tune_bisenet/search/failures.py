"""What the end of a trial's process means: another try, fewer trials at once, or never again. And how long is a stall.

Rules over texts, counts and seconds alone. `tuner` asks Ray for these, and does what follows from the answers.
"""

import re
import signal
from collections.abc import Iterator
from typing import Final

from tune_bisenet.records import TrialState
from tune_bisenet.storage import StorageError, StorageRefusedError, is_full, is_refused, retry_seconds

FAILURE: Final = "failure"
"""The key of a report that ends its trial as failed, in words. Tune tries again whatever is raised."""
LACKS: Final = "lacks"
"""The key, beside it, of what is missing: memory of the machine or of its GPU, or access to storage."""

WARNING: Final = "warning"
"""The key under which a report says what the user should know beside its measurements."""

STACK_SIGNAL: Final = signal.SIGUSR2
"""Lets a worker write the stacks of its threads to its log, whatever it is busy with."""
STACK_SECONDS: Final = 10.0
"""How long a worker may take for that: a process that is stopped never does."""

MAX_FAILURES: Final = 3
"""How often in a row, without an epoch between, a trial is put back to its last epoch before it counts as failed.

A lost node, a killed worker or a hiccup of the storage costs an unfinished epoch, however often; a trial that cannot
get further, or takes its node down each time, comes to an end. Ray itself counts no failure that was announced as a
preemption (`cluster.daemons`).
"""

STALL_FACTOR: Final = 10.0
MIN_STALL_SECONDS: Final = 300.0
FIRST_EPOCH_STALL_SECONDS: Final = 4 * 3600.0

TRIAL_FRAMES: Final = ("in run_trial\n", "in keep\n")
"""In the stack of the thread that trains, and of one that writes an epoch meanwhile."""
PACKING_FRAME: Final = "tune_bisenet/data/packing.py"
STORAGE_FRAME: Final = "tune_bisenet/storage.py"

TRACEBACK: Final = "ray::"
"""How errors begin that were raised in a worker; the others are Ray's, of a process that is gone."""
OUT_OF_MEMORY: Final = "out of memory"
"""How errors begin that may be the fault of other trials."""
RAY_KILLED: Final = "due to the node running low on memory"
"""What Ray says of a process that it has killed for memory."""


def last_error(text: str) -> str:
    """Return the last error of Tune's file of a trial's errors, without Ray's colours."""
    last = re.split(r"^Failure # \d+ \(occurred at .*\)\n", text, flags=re.MULTILINE)[-1]
    return re.sub(r"\x1b\[[0-9;]*m", "", last).strip()


def last_line(error: str) -> str:
    return error.rpartition("\n")[2].strip() or "unknown error"


def explain_loss(error: str, *, kernel_killed: bool) -> str:
    """Return why a process was lost, by Ray's `error`, and by whether the kernel has just killed one on its machine."""
    if RAY_KILLED in error:
        return explain_memory_kill(error)
    if kernel_killed and not error.startswith(TRACEBACK):
        return f"{OUT_OF_MEMORY}, probably: the kernel has just killed a process on this machine for it."
    return error


def explain_memory_kill(error: str) -> str:
    """Return in short what Ray says of a process that it has killed for memory; it lists all processes."""
    found = re.search(r"Memory on the node \(IP: ([^,)]+).*? was (\S+) used / (\S+) limit", error, re.DOTALL)
    used = f": {found[2]} of {found[3]} were in use on {found[1]}" if found else ""
    return f"{OUT_OF_MEMORY}: Ray's memory monitor ended the process{used}."


def raise_outage(error: str) -> None:
    """Raise StorageError if storage did not answer, or StorageRefusedError if it refused: no trial is to blame."""
    kinds = r"tune_bisenet\.storage\.(\w+)|PermissionError|OSError(?=: \[Errno 30\])"
    if found := re.search(rf"^(?:{kinds}): (.*)$", error, re.M):
        raise (StorageError if found[1] == "StorageError" else StorageRefusedError)(found[2])


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from: Tune and Ray raise their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_outage(error: BaseException) -> OSError | None:
    """Return the cause that says that storage does not answer or refuses, or that Ray's own folder is full."""
    for cause in causes(error):
        if isinstance(cause, StorageError) or is_full(cause) or is_refused(cause):
            return cause
    return None


def describe_retry(error: str) -> str:
    """Return what becomes of a trial that has tries left, without its name."""
    if error.startswith(TRACEBACK):
        return f"failed and is tried again from its last epoch:\n{error}"
    return f"lost its process ({last_line(error)}); it resumes from its last epoch, where there is room."


def describe_end(error: str) -> str:
    """Return the error of a trial that has none left; for one that ran out of memory alone, with what to do."""
    if not error.startswith(OUT_OF_MEMORY):
        return error
    return f"{error} No other trial shared it: lower the batch size or --image-size, or give the trial more."


def fewer_at_once(at_once: int) -> int | None:
    """Return how many trials may run at once after so many ran out of memory; None for one alone."""
    return at_once - max(1, at_once // 4) if at_once > 1 else None


def stall_seconds(state: TrialState, timeout: float | None) -> float:
    """Return after how long a trial of which nothing is heard is looked into. `timeout` is the user's."""
    epoch_seconds = state.seconds / state.trained_epochs if state.trained_epochs else 0.0
    return timeout or max(MIN_STALL_SECONDS, STALL_FACTOR * epoch_seconds)


def longest_stall(state: TrialState, timeout: float | None, stack: str | None) -> float:
    """Return how long a trial may stay at one place, by its stack; None if that is not known."""
    seconds = stall_seconds(state, timeout)
    if (timeout is None and not state.trained_epochs) or (stack and PACKING_FRAME in stack):
        seconds = max(seconds, FIRST_EPOCH_STALL_SECONDS)
    return seconds + retry_seconds() if stack is None or STORAGE_FRAME in stack else seconds


def stack_of_trial(stacks: str) -> str:
    """Return the stacks of the threads that train and write, out of those of a process; all, if none does."""
    threads = stacks.split("\n\n")
    return "\n\n".join(thread for thread in threads if any(frame in thread for frame in TRIAL_FRAMES)) or stacks
