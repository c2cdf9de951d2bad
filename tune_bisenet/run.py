"""The command line of the main job: check everything, print the plan, search, print the results.

`python -m tune_bisenet.run` is two processes. The driver does the work. Its parent, the supervisor, hears the signals
and has the last word, whatever ends the driver (docs/decisions/0004-a-parent-has-the-last-word.md).

All else is imported late: signals are heard at once, and `--show` and mistyped flags do not wait for torch and Ray.
"""

import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tune_bisenet.errors import OK, WRONG_INPUT, explain_error

if TYPE_CHECKING:
    from rich.console import Console

    from tune_bisenet.options import InputError, Options

NOT_STARTED: Final = "Nothing was started."

GRACE_SECONDS: Final = 25
"""For a driver to write down where it is after a signal; Kubernetes and Slurm kill after 30."""

SAME_SIGNAL_SECONDS: Final = 1.0
"""`timeout` and others send a signal twice at once, to the process and to its group: that is one request."""

HEARD: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGALRM, signal.SIGCHLD)
"""What the supervisor waits for, in place of handlers."""

REPEATED: Final = (0, -signal.SIGSEGV)
"""Ends of a driver without a last word that neither Ray nor a lack of memory is the cause of: it would end so again."""

ENDED: Final = b"ended"
"""The driver's last word to its supervisor: it has told how it ended. Any other word is the command to resume by."""


def main(argv: Sequence[str] | None = None, *, on_begin: Callable[[str], None] = lambda _command: None) -> int:
    """Run the command line and return its exit code. `on_begin` is told the command to resume by, once it works."""
    import logging

    from tune_bisenet.options import InputError, build_parser, parse_options

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if argv is None else argv
    flags = vars(build_parser().parse_args(arguments))
    if flags.pop("show", False):
        return _show(flags)
    from rich.console import Console

    console = Console()
    options, mistyped = parse_options(flags)
    resume: list[str] = []

    def begin(command: str) -> None:
        resume.append(command)
        on_begin(command)

    try:
        if options.plan:
            return _plan(options, mistyped, console)
        return _search(options, mistyped, console, arguments, begin)
    except (InputError, OSError) as error:
        return _explain(error, resume)


def _search(
    options: "Options",
    mistyped: dict[str, str],
    console: "Console",
    arguments: Sequence[str],
    on_begin: Callable[[str], None],
) -> int:
    """Run a session of a search. Raises InputError, and StorageError if storage does not answer or refuses."""
    from tune_bisenet.options import default_name
    from tune_bisenet.search.prepare import prepare_search
    from tune_bisenet.text import redact

    def show(done: int, total: int) -> None:
        """Print a line at every tenth of the frames: the first search on Cityscapes decodes for minutes."""
        if done == total or (done * 10) // total > ((done - 1) * 10) // total:
            console.print(f"packing frames, once for this data and size: {done} of {total}", highlight=False)

    search = prepare_search(options, mistyped, default_name=default_name(options.space), progress=show)
    from tune_bisenet.search.driver import run_search

    return run_search(search, console, ["python", "-m", "tune_bisenet.run", *map(redact, arguments)], on_begin)


def _plan(options: "Options", mistyped: dict[str, str], console: "Console") -> int:
    """Print what a search would take. Raises InputError, and StorageError if storage does not answer or refuses."""
    from tune_bisenet.options import default_name
    from tune_bisenet.search.prepare import survey_search

    search = survey_search(options, mistyped, default_name=default_name(options.space))
    from tune_bisenet.search.driver import print_plan_page

    print_plan_page(console, search)
    return OK


def _show(flags: dict[str, Any]) -> int:
    from tune_bisenet import spaces

    try:
        space = spaces.load_space(flags.get("space", "runs10"))
        wanted = flags["runs"].split(",") if "runs" in flags else None
        tables = [spaces.space_to_markdown(rows)] if (rows := spaces.select_rows(space, wanted)) else []
        if isinstance(space, spaces.Sampled):
            from tune_bisenet.study import sampling

            with spaces.running_code_of(flags.get("space", "runs10")):
                sampling.check_rows(space)
                tables.append(sampling.parameters_to_markdown(space))
        sys.stdout.write("\n".join(tables))
    except ValueError as error:
        return explain_error(error, advice=NOT_STARTED)
    return 0


def _explain(error: "InputError | OSError", resume: Sequence[str]) -> int:
    """Print what is wrong and what to do, and return the exit code. Raises an error that is no user's or storage's.

    `resume` holds the command to resume by once the search has begun: some mistakes show only when trials are drawn and
    trained.
    """
    from tune_bisenet.options import InputError
    from tune_bisenet.storage import StorageError, is_refused

    if not isinstance(error, InputError | StorageError) and not is_refused(error):
        raise error
    if not resume:
        return explain_error(error, advice=NOT_STARTED)
    advice = f"Nothing is lost. When that is mended, continue: {resume[0]}"
    return explain_error(error, advice=advice, retry=f"continue: {resume[0]}")


# --- two processes ----------------------------------------------------------------------------------------------------


def supervise() -> int:
    """Run `main` in a child, the driver, and return the exit code, whatever ends it. Nothing that it started lives on.

    A signal kills a driver that has no search yet; one that trains may first write down where it is. A second signal,
    or no end within `GRACE_SECONDS`, kills that, too: a search resumes from whatever is in storage.
    """
    signals_before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # by default some systems do not even keep it for sigwait
    line, drivers_line = socket.socketpair()
    driver = os.fork()
    if not driver:
        line.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _drive(drivers_line, signals_before)
    drivers_line.close()
    words: list[bytes] = []
    interrupted, heard_at = 0, 0.0
    while True:
        number = signal.sigwait(HEARD)
        words += _read_words(line)
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(driver, os.WNOHANG)
            if ended:
                break
        elif number == signal.SIGTSTP:
            _signal_group(driver, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)  # until the shell's fg
            _signal_group(driver, signal.SIGCONT)
        elif number == signal.SIGALRM or (interrupted and time.monotonic() - heard_at > SAME_SIGNAL_SECONDS):
            _signal_group(driver, signal.SIGKILL)
        elif not interrupted:
            interrupted, heard_at = number, time.monotonic()
            signal.alarm(GRACE_SECONDS)
            os.kill(driver, number if words else signal.SIGKILL)
    _signal_group(driver, signal.SIGKILL)
    words += _read_words(line)
    return _exit_code(os.waitstatus_to_exitcode(status), words, interrupted)


def _drive(line: socket.socket, signals_before: set[int]) -> NoReturn:
    """Be the driver: run `main`, and end with its exit code and a last word on `line`, or without one."""
    import threading
    import traceback

    def end_with_the_supervisor() -> None:
        with suppress(OSError):  # what it left unread resets the connection
            line.recv(1)  # nothing is ever sent
        os._exit(os.EX_TEMPFAIL)

    os.setpgid(0, 0)  # Ctrl-C is for the supervisor alone
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it writes to a terminal whose foreground it is not in
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # whatever is imported or called at that moment: no traceback
    signal.pthread_sigmask(signal.SIG_SETMASK, signals_before)
    threading.Thread(target=end_with_the_supervisor, daemon=True).start()
    has_told = False
    try:
        code = main(on_begin=lambda command: line.sendall(os.fsencode(command) + b"\0"))
        has_told = True
    except SystemExit as end:  # argparse's; at a signal in its start, Ray's; at a broken pipe, rich's
        code = end.code if isinstance(end.code, int) else 0
        has_told = code in (0, WRONG_INPUT)
    except BaseException:
        traceback.print_exc()
        code = os.EX_SOFTWARE
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a broken pipe
            stream.flush()
    if has_told:
        line.sendall(ENDED + b"\0")
    os._exit(code)  # what Ray, torch and pyarrow do when an interpreter ends is not always an end


def _read_words(line: socket.socket) -> list[bytes]:
    """Return what the driver has said since the last call."""
    try:
        return line.recv(1 << 16, socket.MSG_DONTWAIT).split(b"\0")[:-1]
    except BlockingIOError:
        return []


def _signal_group(driver: int, number: int) -> None:
    """Send a signal to the driver, to the Ray that it started and to all workers of that."""
    with suppress(ProcessLookupError, PermissionError):  # the group is gone; macOS says the other of a zombie's
        os.killpg(driver, number)


def _exit_code(code: int, words: Sequence[bytes], interrupted: int) -> int:
    """Return the exit code of a driver that has ended; say what happened and what to do if it could not."""
    if ENDED in words or code == WRONG_INPUT:
        return code
    from tune_bisenet.text import redact

    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # shows the cursor, which progress bars hide
        sys.stdout.flush()
    resume = [os.fsdecode(word) for word in words if word != ENDED]
    again = shlex.join(["python", "-m", "tune_bisenet.run", *map(redact, sys.argv[1:])])
    advice = f"Nothing is lost. To continue: {resume[-1]}" if resume else f"The same command starts it again: {again}"
    if interrupted or -code in (signal.SIGINT, signal.SIGTERM):
        what, code = "interrupted. ", 128 + (interrupted or -code)
    elif code == os.EX_SOFTWARE:
        what = "This is an error of the program: please report it, with what is above. "
    elif code == os.EX_TEMPFAIL:  # it has told why
        what = ""
    elif code in REPEATED:
        end = "ended itself without a word" if code == 0 else f"was killed by {signal.Signals(-code).name}"
        what = f"The driver {end}, mostly by code of the space, such as os._exit or a recursion without an end. "
        code = os.EX_SOFTWARE
    else:
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}, without a word"
        what, code = f"The driver {end}: mostly because Ray died or memory ran out. ", os.EX_TEMPFAIL
    with suppress(OSError):  # a broken pipe
        sys.stderr.write(f"{what}{advice}\n")
    return code


def command() -> int:
    """Run the command line in two processes, or under a debugger, which needs the terminal for itself, in one."""
    return main() if sys.gettrace() else supervise()


if __name__ == "__main__":
    sys.exit(command())
