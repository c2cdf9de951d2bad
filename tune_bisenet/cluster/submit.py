"""Send a search to a Ray cluster as a job, with the code as it is on this machine; follow, list and stop jobs.

    python -m tune_bisenet.cluster.submit --address http://127.0.0.1:8265 -- --space runs10 --storage s3://bucket/searches
    python -m tune_bisenet.cluster.submit --address http://127.0.0.1:8265 logs NAME

Ray's own client talks to the cluster. This module adds which files are sent, which flags make no sense there, that no
password is in a job's command, that a job has its search's name, and what to do when no head answers.
"""

import argparse
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Final

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import search_spaces
import tune_bisenet
from tune_bisenet.options import (
    CONTROL,
    NO_BACKBONE,
    STREETS,
    STUDY_VARIABLE,
    InputError,
    Options,
    build_parser,
    default_name,
    parse_options,
    problems_of,
)
from tune_bisenet.records import COMMIT_VARIABLE, project_commit
from tune_bisenet.spaces import load_space, select_rows
from tune_bisenet.storage import RETRY_VARIABLE
from tune_bisenet.text import has_secret, is_ambiguous, is_uri, redact

COMMAND: Final = "python -m tune_bisenet.cluster.submit"

_DONE, _NOT_ENDED, _REFUSED, _LOST, _INTERRUPTED = 0, 1, 2, 75, 130

STOP_SECONDS: Final = 120  # from SIGTERM to SIGKILL; Ray's default is 3 s, and a search needs 10 to 30
REQUEST_SECONDS: Final = (5.0, 60.0)  # to connect, and for an answer
RECONNECT_SECONDS: Final = 300.0
SHORTEST_PAUSE_SECONDS: Final = 1.0  # between two attempts to reach a cluster that does not answer
LONGEST_PAUSE_SECONDS: Final = 30.0
LOG_CHARACTERS_PER_SECOND: Final = 200_000  # a log is fetched whole each time, so a long one is fetched less often

LOST_HEAD: Final = (
    "If the head is lost, run the command that submitted the search again, with --resume after `--`, on a new cluster: "
    "what it has done is on its storage."
)

_EPILOG: Final = """\
exit codes: that of the run, if the job is followed to its end; 0 done; 1 it failed, or did not end when it was stopped;
2 refused, nothing was started; 75 the connection was lost for good, the job continues; 130 stopped, or Ctrl-C here,
after which the job continues. A cluster that asks for a token gets it from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token if RAY_AUTH_MODE=token is set.
"""


class JobError(ValueError):
    """The cluster refuses, or does not know the job."""


class UnreachableError(JobError):
    """The cluster does not answer at the moment."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    has_run = "--" in words
    end = words.index("--") if has_run else len(words)
    parser = _parser()
    options = parser.parse_args(words[:end])
    is_of_job = options.command in ("status", "logs", "stop")
    if has_run == bool(options.command) or is_of_job != bool(options.job) or (options.no_wait and not has_run):
        parser.error("give the run's flags after `--`, or `list`, or one of status, logs and stop with a job's id")
    try:
        submission = prepare_submission(words[end + 1 :]) if has_run else None
        client = JobClient(options.address)
        if submission:
            return _submit(client, submission, wait=not options.no_wait)
        if options.command == "list":
            _print_table(client.submitted())
            return _DONE
        verbs = {"status": _status, "logs": _follow, "stop": _stop}
        return verbs[options.command](client, options.job)
    except ValueError as error:
        _say(*(f"error: {problem}" for problem in problems_of(error)))
        return _REFUSED
    except KeyboardInterrupt:
        _say("Interrupted. What is on the cluster continues; `list` shows it.")
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        usage="%(prog)s [--address URL] [--no-wait] -- FLAGS OF tune_bisenet.run\n"
        "       %(prog)s [--address URL] {status,logs,stop} JOB\n"
        "       %(prog)s [--address URL] list",
        description="Send a search to a Ray cluster as a job, with the code as it is on this machine, and follow it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", nargs="?", choices=["status", "logs", "stop", "list"], help="logs follows; stop lets it be resumed")
    add("job", nargs="?", metavar="JOB", help="a job's id: the search's name, or what `list` shows")
    add("--address", metavar="URL", default="http://127.0.0.1:8265", help="of the dashboard (default: %(default)s)")
    add("--no-wait", action="store_true", help="submit and end; follow the job later by `logs`")
    return parser


# --- what is sent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A search that is ready to be sent."""

    name: str
    storage: str
    entrypoint: str
    space_files: Mapping[str, Path]
    """The files of a space that is not in the package, by their paths in the job's folder."""
    notes: tuple[str, ...]

    def stage(self, folder: Path) -> None:
        """Copy the two packages and the space's files into the folder that is sent."""
        for package in (tune_bisenet, search_spaces):
            source = Path(package.__path__[0])
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for name, path in self.space_files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def prepare_submission(words: Sequence[str]) -> Submission:
    """Return the search that these flags of a run ask for. Raise InputError with all that is wrong with them."""
    flags = vars(build_parser().parse_args(words))
    if any(has_secret(word) or ("://" in word and is_ambiguous(word)) for word in words):
        raise InputError(  # before another message can show the password
            "an address in the run's flags has a password in it, and everyone who reaches the cluster can read a "
            f"job's command. For a study, leave --study out and set ${STUDY_VARIABLE} on the head before Ray is "
            "started there; for storage and data, give the machines a role."
        )
    problems = [
        f"{flag} starts nothing, and needs no cluster: run python -m tune_bisenet.run {flag} on this machine."
        for flag, name in (("--show", "show"), ("--plan", "plan"))
        if flags.pop(name, False)
    ]
    options, mistyped = parse_options(flags)
    problems += [*mistyped.values(), *_misplaced(options, has_storage="storage" in flags)]
    space, space_files = Path(options.space or "runs10"), {}
    try:
        if options.space or not options.continues:  # a search that is resumed has its space on storage
            space_files = _space_files(space, options.runs)
    except ValueError as error:
        problems += problems_of(error)
    if problems:
        raise InputError(*problems)
    name = options.name or default_name(options.space)
    run = ["python", "-m", "tune_bisenet.run", "--address", "auto", *words]
    run += ["--name", name] if options.name is None else []
    run += ["--space", space.stem] if space_files else []  # which replaces the path: the last one counts
    return Submission(
        name=name,
        storage=options.storage,
        entrypoint="exec " + shlex.join(run),  # the run itself must get the signal that stops a job, not a shell
        space_files=space_files,
        notes=tuple(_notes(options)),
    )


def _misplaced(options: Options, *, has_storage: bool) -> Iterator[str]:
    """Yield what means something on this machine and nothing, or something else, on the cluster."""
    if options.address is not None:
        yield "--address: the run is on the cluster already. Leave it out after `--`."
    if options.continues and options.name is None:
        yield "--resume, --add and --rerun need the --name of the search to continue."
    if not has_storage:
        yield (
            "--storage is needed: what a job writes into its own folder is lost with the cluster. Give a URI as "
            "s3://bucket/searches, or the absolute path of a folder that all its machines share."
        )
    for flag, path in _paths(options).items():
        if not Path(path).is_absolute() and (has_storage or flag != "--storage"):
            yield (
                f"{flag} {path} is a path relative to this folder, and a job starts in another. Give a URI as "
                "s3://bucket/…, or the absolute path on the cluster's machines."
            )
    if options.study and re.match("sqlite:///(?!/)", options.study):
        yield "--study: a file of a relative path is lost with the cluster. Leave --study out, or name a server."


def _paths(options: Options) -> dict[str, str]:
    """Return the flags whose values are paths, not URIs or names."""
    values = {name: getattr(options, name) for name in ("storage", "data", "backbone", "warm_start", "noise_from")}
    return {
        "--" + name.replace("_", "-"): value.removeprefix("file://")
        for name, value in values.items()
        if value and value not in (STREETS, NO_BACKBONE, "imagenet") and not is_uri(value.removeprefix("file://"))
    }


def _notes(options: Options) -> Iterator[str]:
    if paths := _paths(options):
        named = ", ".join(f"{flag} {path}" for flag, path in paths.items())
        yield f"{named}: on the cluster's machines, not on this one, and all of them must see it."
    if options.data is None and not options.continues:
        yield "--data is left out: $CITYSCAPES_DATASET of the head decides, else the built-in streets."
    if os.environ.get(STUDY_VARIABLE):
        yield f"${STUDY_VARIABLE} is not sent: the head's own holds."


def _space_files(space: Path, runs: tuple[str, ...] | None) -> dict[str, Path]:
    """Return a space's own file and what it imports, by where they are sent. Raise ValueError if it cannot be used.

    The file is sent into `search_spaces`, so that the space has the same name on every cluster.
    """
    loaded_before = set(sys.modules)
    select_rows(load_space(str(space)), runs and [name for name in runs if name != CONTROL])
    if space.suffix != ".py" and "/" not in str(space):
        return {}
    shipped = Path(search_spaces.__path__[0]) / space.name
    if not re.fullmatch(r"(?!__init__)\w+", space.stem):
        raise ValueError(f"--space {space}: the file's name must be that of a module. Rename it.")
    if shipped.exists() and space.read_bytes() != shipped.read_bytes():
        raise ValueError(f"--space {space}: search_spaces has another {space.stem} already. Rename the file.")
    return {f"{search_spaces.__name__}/{space.name}": space.resolve()} | _modules_of_this_folder(loaded_before)


def _modules_of_this_folder(loaded_before: set[str]) -> dict[str, Path]:
    """Return the files in the working directory that a space has imported; the run must find them, too."""
    folder, not_sent = Path.cwd(), [Path(sys.prefix), Path(tune_bisenet.__path__[0]), Path(search_spaces.__path__[0])]
    imported = [name for name in sys.modules.keys() - loaded_before if not name.startswith("space_")]
    paths = [Path(file).resolve() for name in imported if (file := getattr(sys.modules[name], "__file__", None))]
    return {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.is_relative_to(folder) and not any(path.is_relative_to(other.resolve()) for other in not_sent)
    }


# --- the cluster ----------------------------------------------------------------------------------------------------


class JobClient(JobSubmissionClient):
    """Ray's client for the cluster whose dashboard is at an address. What goes wrong is raised as JobError."""

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"https?://[^/\s@?#]+/?", address):
            raise ValueError(
                f"--address {redact(address)} is not the address of a dashboard: write it as http://127.0.0.1:8265, "
                "without a password. `ray dashboard cluster/gpu.yaml` opens a tunnel to it."
            )
        is_local = re.match(r"http://(127\.|localhost\b(?!\.)|\[::1\])", address)
        if os.environ.get("RAY_AUTH_MODE") == "token" and address.startswith("http://") and not is_local:
            _say(f"note: the token goes to {address} unencrypted; a tunnel, as `ray dashboard` opens one, hides it.")
        logging.disable(logging.INFO)  # Ray reports each package and connection
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would prefer them to the address it is given
            os.environ.pop(name, None)
        self.address = address.rstrip("/")
        try:
            super().__init__(self.address)
        except AuthenticationError as error:  # there is no token on this machine
            raise self._token_error(error) from error
        except (RuntimeError, KeyError, OSError) as error:  # ray[default] is not installed, or it is no dashboard
            raise JobError(f"cannot use {self.address} as a Ray dashboard: {error}") from error

    def _do_request(self, method: str, endpoint: str, **rest: Any) -> Any:
        """Limit the time of a request: by itself Ray waits without end for a tunnel that has gone."""
        try:
            return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **rest)
        except AuthenticationError as error:
            raise self._token_error(error) from error
        except OSError as error:
            raise UnreachableError(
                f"no answer from a Ray dashboard at {self.address} ({type(error).__name__}). Is the tunnel open (`ray "
                f"dashboard cluster/gpu.yaml`), and the cluster up? {LOST_HEAD}"
            ) from error

    def _token_error(self, error: AuthenticationError) -> JobError:
        return JobError(
            f"the cluster at {self.address} asks for its token. Set RAY_AUTH_MODE=token, and the token by "
            f"RAY_AUTH_TOKEN_PATH=FILE or in ~/.ray/auth_token. {str(error).partition('. ')[0]}."
        )

    def _raise_error(self, response: Any) -> None:
        reason = response.text.strip().splitlines()[-1]
        if response.status_code == 404:
            raise JobError(f"{reason} at {self.address}; `list` shows its jobs. {LOST_HEAD}")
        kind = UnreachableError if response.status_code >= 500 else JobError
        raise kind(f"the cluster at {self.address} refuses: {reason}")

    def command(self, verb: str, job_id: str | None) -> str:
        """Return the command line for one of the verbs."""
        return f"{COMMAND} --address {self.address} {verb} {job_id}"

    def submitted(self) -> list[JobDetails]:
        """Return all jobs that were submitted, the newest last; drivers that merely connected are none."""
        jobs = [job for job in self.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def submit(self, submission: Submission) -> str:
        """Send a search. Return the id of its job: the search's name, `name-2` for its second job and so on."""
        name, jobs = submission.name, self.submitted()
        for job in jobs:
            if (job.metadata or {}).get("search") == name and not job.status.is_terminal():
                follow, stop = (self.command(verb, job.submission_id) for verb in ("logs", "stop"))
                raise JobError(
                    f"the search {name} is {job.status.lower()} as job {job.submission_id}. Follow it: {follow}. "
                    f"End it: {stop}. For another search give another --name."
                )
        candidates = chain([name], (f"{name}-{number}" for number in count(2)))
        job_id = next(id_ for id_ in candidates if id_ not in {job.submission_id for job in jobs})
        variables = {COMMIT_VARIABLE: project_commit(), RETRY_VARIABLE: os.environ.get(RETRY_VARIABLE)}
        variables["RAY_JOB_STOP_WAIT_TIME_S"] = str(STOP_SECONDS)
        with tempfile.TemporaryDirectory(prefix="tune-bisenet-") as folder:
            submission.stage(Path(folder))
            self.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": {k: v for k, v in variables.items() if v}},
                metadata={"search": name, "storage": redact(submission.storage)},  # which everyone can read
            )
        return job_id

    def follow(self, job_id: str) -> JobDetails | None:
        """Print a job's log from its beginning until it has ended; None if the cluster is away too long."""
        start_time, num_printed = self.get_job_info(job_id).start_time, 0
        answered_at, pause_seconds = time.monotonic(), SHORTEST_PAUSE_SECONDS
        while True:
            try:
                job, log = self.get_job_info(job_id), self.get_job_logs(job_id)
            except UnreachableError as error:
                if time.monotonic() - answered_at > RECONNECT_SECONDS:
                    again = f"Job {job_id} continues if the head lives. Follow it again: {self.command('logs', job_id)}"
                    _say(str(error), again)
                    return None
                if pause_seconds == SHORTEST_PAUSE_SECONDS:
                    _say(f"The connection is lost; job {job_id} continues. Retrying for {RECONNECT_SECONDS:.0f} s.")
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                continue
            if pause_seconds > SHORTEST_PAUSE_SECONDS:
                _say("Connected again.")
            answered_at, pause_seconds = time.monotonic(), SHORTEST_PAUSE_SECONDS
            if job.start_time != start_time:
                _say(f"Job {job_id} was started again on a new head. Its log from the beginning:")
                start_time, num_printed = job.start_time, 0
            _print(log[num_printed:])
            num_printed = len(log)
            if job.status.is_terminal():  # which it was before the log was fetched, so that is complete
                return job
            time.sleep(max(1.0, num_printed / LOG_CHARACTERS_PER_SECOND))


# --- what is printed ------------------------------------------------------------------------------------------------


def _exit_code(job: JobDetails) -> int:
    """Return the run's own exit code where it is known."""
    if job.status == JobStatus.SUCCEEDED:
        return _DONE
    if job.status == JobStatus.STOPPED:
        return _INTERRUPTED
    code = 1 if job.driver_exit_code is None else int(job.driver_exit_code)
    return code if code >= 0 else 128 - code  # Python gives a signal's number as a negative code


def _describe(job: JobDetails) -> str:
    has_code = job.status == JobStatus.FAILED and job.driver_exit_code is not None
    return f"failed with exit code {_exit_code(job)}" if has_code else str(job.status.lower())


def _submit(client: JobClient, submission: Submission, *, wait: bool) -> int:
    _say(*(f"note: {note}" for note in submission.notes))
    job_id = client.submit(submission)
    _say(f"submitted as job {job_id}; it continues without this terminal.")
    _say(*(f"  {client.command(verb, job_id)}" for verb in ("logs", "status", "stop")))
    return _follow(client, job_id) if wait else _DONE


def _follow(client: JobClient, job_id: str) -> int:
    try:
        job = client.follow(job_id)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        _say(f"\nJob {job_id} continues. Follow it again: {client.command('logs', job_id)}")
        _say(f"End it: {client.command('stop', job_id)}")
        return _INTERRUPTED
    if job is None:
        return _LOST
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        _say(job.message or "")  # why it never ran, or was lost; its log cannot say
    _say(f"job {job_id}: {_describe(job)}.")
    return _exit_code(job)


def _stop(client: JobClient, job_id: str) -> int:
    job = client.get_job_info(job_id)
    if job.status.is_terminal():
        _say(f"job {job_id} has ended already: {_describe(job)}.")
        return _DONE
    _say(f"job {job_id} gets SIGTERM and saves what it has. After {STOP_SECONDS} s Ray kills it.")
    began, is_signalled = time.monotonic(), False
    while not job.status.is_terminal() and time.monotonic() - began < 2 * STOP_SECONDS:
        is_signalled = is_signalled or client.stop_job(job_id)  # a job can be too young for a signal
        time.sleep(1)
        job = client.get_job_info(job_id)
    seconds = time.monotonic() - began
    if not job.status.is_terminal():
        _say(f"job {job_id} has not ended within {seconds:.0f} s. See: {client.command('logs', job_id)}")
        return _NOT_ENDED
    _say(f"job {job_id}: {_describe(job)} after {seconds:.0f} s.")
    if job.status == JobStatus.STOPPED and (name := (job.metadata or {}).get("search")):
        _say(f"Continue it: submit with --resume --name {name} and its --storage after `--`.")
    return _DONE


def _status(client: JobClient, job_id: str) -> int:
    job = client.get_job_info(job_id)
    _print_table([job])
    if job.status == JobStatus.FAILED:
        _print(f"{job.message}\n")
    return _DONE


def _print_table(jobs: Sequence[JobDetails]) -> None:
    rows = [("job", "status", "submitted", "ended", "storage")]
    for job in jobs:
        storage = (job.metadata or {}).get("storage", "")
        rows.append((str(job.submission_id), _describe(job), _when(job.start_time), _when(job.end_time), storage))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def _when(milliseconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000)) if milliseconds else ""


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(*lines: str) -> None:
    """Write to standard error: standard output is the job's log alone."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
