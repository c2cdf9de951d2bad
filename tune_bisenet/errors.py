"""What every command line says of an error, and the exit code it ends with. Heavy modules are imported late."""

import os
import sys
from collections.abc import Callable
from typing import Final

OK: Final = 0
FAILED: Final = 1
"""A part of the work could not be done; the rest is."""
WRONG_INPUT: Final = 2
INTERRUPTED: Final = 130


class CommandError(ValueError):
    """The input is right, but what was made of it is not good enough to keep: the command fails."""


def run_command(work: Callable[[], int]) -> int:
    """Return the exit code of `work`; explain what the user, storage or an interrupt did to it."""
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted.\n")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        return explain_error(error)


def explain_error(error: ValueError | OSError, *, advice: str = "", retry: str = "run the same command again.") -> int:
    """Print what is wrong and what to do, then `advice`; return the exit code. Raises errors of the program itself.

    Of storage that does not answer it says that nothing is lost and, with `retry`, what to do when it answers.
    """
    from tune_bisenet.options import InputError, problems_of
    from tune_bisenet.storage import StorageError, is_refused
    from tune_bisenet.text import without_errno

    if isinstance(error, StorageError) and not is_refused(error):
        sys.stderr.write(f"{str(error).removesuffix('.')}. Nothing is lost: when it answers, {retry}\n")
        return os.EX_TEMPFAIL
    if isinstance(error, InputError):
        problems = list(error.problems)
    else:
        problems = problems_of(error) if isinstance(error, ValueError) else [without_errno(str(error))]
    print_problems(problems, advice)
    return FAILED if isinstance(error, CommandError) else WRONG_INPUT


def print_problems(problems: list[str], advice: str = "") -> None:
    """Print a line for each problem on the standard error, and then what to know or to do."""
    sys.stderr.write("".join(f"error: {problem}\n" for problem in problems) + (f"{advice}\n" if advice else ""))
