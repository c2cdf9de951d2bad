"""The command line for clusters: send a search as a job, follow it, ask for it, stop it.

python -m tune_bisenet.submit --address http://127.0.0.1:8265 -- --space runs10 --storage s3://bucket/searches
python -m tune_bisenet.submit --address http://127.0.0.1:8265 logs NAME

The job lives on the cluster: whatever ends this command, the search goes on.
"""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from tune_bisenet.jobs import submission
from tune_bisenet.jobs.job import INTERRUPTED, STOP_SECONDS, LostError, checked_address
from tune_bisenet.jobs.submission import Submission
from tune_bisenet.options import InputError

if TYPE_CHECKING:
    from tune_bisenet.jobs.api import Cluster

OK: Final = 0
NOT_ENDED: Final = 1
WRONG_INPUT: Final = 2
LOST: Final = 75
"""The connection was lost for too long (EX_TEMPFAIL): the job goes on, follow it again."""

EPILOG: Final = """\
exit codes: that of the run, where it is followed to its end; 0 done; 1 it failed, or did not end when it was stopped;
2 refused, nothing was started; 75 the connection was lost for good, the job goes on; 130 stopped, or Ctrl-C here, after
which the job goes on. A cluster that asks for a token gets it from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token when RAY_AUTH_MODE=token is set.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    ours, separator, runs = _split(words)
    parser = _parser()
    given = parser.parse_args(ours)
    _check_shape(parser, given, has_run=separator)
    try:
        return _dispatch(given, runs)
    except InputError as error:
        return _refuse(list(error.problems))
    except ValueError as error:
        return _refuse([str(error)])
    except LostError as error:
        _say(str(error))
        return LOST
    except KeyboardInterrupt:
        _say("Interrupted. What is on the cluster goes on; `list` shows it.")
        return INTERRUPTED


def _split(words: list[str]) -> tuple[list[str], bool, list[str]]:
    """Our own words, whether there is a `--`, and the run's words behind it."""
    if "--" not in words:
        return words, False, []
    at = words.index("--")
    return words[:at], True, words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.submit",
        usage="%(prog)s [--address URL] [--no-wait] -- FLAGS OF tune_bisenet.run\n"
        "       %(prog)s [--address URL] {status,logs,stop} JOB\n"
        "       %(prog)s [--address URL] list",
        description="Send a search to a Ray cluster as a job, with the code as it is here, and follow it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["status", "logs", "stop", "list"],
        help="how a job stands; its log from the beginning, followed to the end; end it, so that it can be resumed; "
        "all jobs",
    )
    parser.add_argument("job", nargs="?", metavar="JOB", help="a job's id: the search's name, or as `list` shows it")
    parser.add_argument(
        "--address",
        metavar="URL",
        default="http://127.0.0.1:8265",
        help="of the cluster's dashboard (default: %(default)s, where `ray dashboard` brings it)",
    )
    parser.add_argument("--no-wait", action="store_true", help="submit and end; follow it later by `logs`")
    return parser


def _check_shape(parser: argparse.ArgumentParser, given: argparse.Namespace, *, has_run: bool) -> None:
    """End with usage and exit code 2 where the words do not fit together."""
    if has_run == (given.command is not None):
        parser.error("either the run's flags behind `--`, or one of status, logs, stop, list")
    if given.command in ("status", "logs", "stop") and given.job is None:
        parser.error(f"{given.command} needs a job's id; `list` shows them")
    if given.command == "list" and given.job is not None:
        parser.error("list takes no job")
    if given.no_wait and not has_run:
        parser.error("--no-wait is for a run behind `--`")


def _dispatch(given: argparse.Namespace, runs: list[str]) -> int:
    address = checked_address(given.address)
    search = None if given.command else submission.prepare(runs)
    cluster = _cluster(address)
    if search is not None:
        return _submit(cluster, search, wait=not given.no_wait)
    match given.command:
        case "status":
            return _print_status(cluster, given.job)
        case "logs":
            return _follow(cluster, given.job)
        case "stop":
            return _stop(cluster, given.job)
        case _:
            return _print_list(cluster)


def _cluster(address: str) -> "Cluster":
    try:
        from tune_bisenet.jobs.api import Cluster
    except ImportError as error:
        raise ValueError(
            f"Ray's Jobs API is not installed here ({error}). It comes with the extra cluster: "
            "pip install 'tune-bisenet[cluster]'."
        ) from error
    return Cluster.at(address, say=_say)


def _submit(cluster: "Cluster", search: Submission, *, wait: bool) -> int:
    for caution in search.cautions:
        _say(f"note: {caution}")
    job = cluster.submit(search)
    _say(f"submitted as job {job}; it goes on without this terminal.")
    for verb in ("logs", "status", "stop"):
        _say(f"  {cluster.command(verb, job)}")
    return _follow(cluster, job) if wait else OK


def _follow(cluster: "Cluster", job_id: str) -> int:
    """Print its log until it ends; its exit code."""
    try:
        job = cluster.follow(job_id, write=_write)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        _say(f"\nJob {job_id} goes on. Follow it again: {cluster.command('logs', job_id)}")
        _say(f"End it: {cluster.command('stop', job_id)}")
        return INTERRUPTED
    if job.status == "FAILED" and job.driver_code is None:
        _say(job.message)  # why it never ran, or was lost: its log cannot tell
    _say(f"job {job_id}: {job.words}.")
    return job.exit_code


def _stop(cluster: "Cluster", job_id: str) -> int:
    """Let it end cleanly, and wait for that."""
    job = cluster.job(job_id)
    if job.has_ended:
        _say(f"job {job_id} has ended already: {job.words}.")
        return OK
    _say(f"job {job_id} is told to end; it saves what it has. After {STOP_SECONDS} s Ray kills it.")
    started = time.monotonic()
    job = cluster.stop(job_id)
    seconds = time.monotonic() - started
    if not job.has_ended:
        _say(f"job {job_id} has not ended within {seconds:.0f} s. See: {cluster.command('logs', job_id)}")
        return NOT_ENDED
    _say(f"job {job_id}: {job.words} after {seconds:.0f} s" + (", killed." if seconds >= STOP_SECONDS else "."))
    if job.search and job.status == "STOPPED":
        _say(f"Go on with it: submit --resume --name {job.search} with its --storage.")
    return OK


# --- what is printed ------------------------------------------------------------------------------------------------


def _print_status(cluster: "Cluster", job_id: str) -> int:
    job = cluster.job(job_id)
    lines = [("job", job.id), ("status", job.words), ("search", job.search), ("storage", job.storage)]
    lines += [("submitted", _when(job.started)), ("ended", _when(job.ended))]
    for title, text in lines:
        if text:
            _print(f"{title:<10} {text}")
    if job.status == "FAILED":
        _print(job.message)
    return OK


def _print_list(cluster: "Cluster") -> int:
    """The newest last, next to the prompt."""
    jobs = sorted(cluster.jobs(), key=lambda job: job.started or 0)
    rows = [("job", "status", "submitted", "ended", "storage")]
    rows += [(job.id, job.words, _when(job.started), _when(job.ended), job.storage or "") for job in jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return OK


def _when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _print(line: str) -> None:
    _write(f"{line}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    """Beside the job's log, which has standard output to itself."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _refuse(problems: list[str]) -> int:
    sys.stderr.write("".join(f"error: {problem}\n" for problem in problems))
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
