"""A cluster's Jobs API, by Ray's own client: submit, ask, stop, and follow a job over lost connections.

Needs `ray[default]`, the extra `cluster`. What a search is, and what is printed, is not known here.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from tune_bisenet.jobs import submission
from tune_bisenet.jobs.job import STOP_SECONDS, ClusterError, Job, LostError, UnreachableError, choose_id, is_local
from tune_bisenet.jobs.submission import Submission
from tune_bisenet.records import COMMIT_VARIABLE, project_commit
from tune_bisenet.storage import RETRY_VARIABLE

REQUEST_SECONDS: Final = (5.0, 60.0)
"""To connect, and for an answer."""

PATIENCE_SECONDS: Final = 300.0
"""How long a lost connection is tried again."""

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 30.0

SILENCE_SECONDS: Final = 60.0
"""After so long without a word the log is opened anew: a connection that died while a laptop slept is silent, too."""


class _Client(JobSubmissionClient):
    """Ray's, which would wait without end for a tunnel that has gone."""

    def _do_request(self, method: str, endpoint: str, **rest: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **rest)


@dataclass(frozen=True)
class Cluster:
    """The cluster whose dashboard is at `address`."""

    address: str
    client: JobSubmissionClient
    say: Callable[[str], None]

    @classmethod
    def at(cls, address: str, *, say: Callable[[str], None]) -> "Cluster":
        """Connected within seconds, or ClusterError."""
        logging.disable(logging.INFO)  # Ray's client tells of each package and connection
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would prefer them to what it is given
            os.environ.pop(name, None)
        if os.environ.get("RAY_AUTH_MODE") == "token" and address.startswith("http://") and not is_local(address):
            say(f"note: the token goes to {address} unencrypted; a tunnel, as `ray dashboard` opens one, hides it.")
        with _explained(address):
            return cls(address, _Client(address), say)

    def command(self, verb: str, job_id: str) -> str:
        """What to type for it."""
        return f"python -m tune_bisenet.submit --address {self.address} {verb} {job_id}"

    def jobs(self) -> list[Job]:
        """All that were submitted, by whomever; not the drivers that merely connected."""
        with _explained(self.address):
            return [Job.of(details) for details in self.client.list_jobs() if details.submission_id]

    def job(self, job_id: str) -> Job:
        """ClusterError if there is none of that id."""
        with _explained(self.address, job_id):
            return Job.of(self.client.get_job_info(job_id))

    def submit(self, search: Submission) -> str:
        """Send it; its job's id."""
        job_id = choose_id(search.name, self.jobs(), continues=search.continues, command=self.command)
        with tempfile.TemporaryDirectory(prefix="tune-bisenet-") as place, _explained(self.address, job_id):
            submission.stage(search.files, Path(place))
            self.client.submit_job(
                entrypoint=search.entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": place, "env_vars": _variables()},
                metadata=search.metadata,
            )
        return job_id

    def stop(self, job_id: str) -> Job:
        """Send it SIGTERM and wait for its end, for as long as Ray would before it kills it, and as long again."""
        deadline, is_told = time.monotonic() + 2 * STOP_SECONDS, False
        while True:
            with _explained(self.address, job_id):
                is_told = is_told or self.client.stop_job(job_id)  # it may be too young to be told
            job = self.job(job_id)
            if job.has_ended or time.monotonic() > deadline:
                return job
            time.sleep(1)

    def follow(self, job_id: str, *, write: Callable[[str], None]) -> Job:
        """`write` its log from the beginning, until it has ended. LostError if the cluster is away for too long."""
        return _Following(self, self.job(job_id), write).to_the_end()


class _Following:
    """A log that is being written elsewhere, over connections that come and go."""

    def __init__(self, cluster: Cluster, job: Job, write: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._job_id = job.id
        self._started = job.started
        self._write = write
        self._shown = 0
        """Characters of the log that have been written."""
        self._heard_at = time.monotonic()
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def to_the_end(self) -> Job:
        while True:
            try:
                self._meet(self._cluster.job(self._job_id))
                is_whole = self._tail()
                job = self._cluster.job(self._job_id)
            except UnreachableError as error:
                self._lost(error)
                continue
            self._heard()
            if job.has_ended and is_whole:
                return job
            time.sleep(FIRST_PAUSE_SECONDS)

    def _meet(self, job: Job) -> None:
        """Where a head has died and another goes on with the search, the job of that id has another log."""
        if job.started != self._started:
            self._cluster.say(f"On a new head, job {job.id} has begun anew. Its log from the beginning:")
            self._started, self._shown = job.started, 0

    def _tail(self) -> bool:
        """Write what is new, until the log is closed, True, or has been silent for long, False."""
        with _explained(self._cluster.address, self._job_id):
            return asyncio.run(self._listen())

    async def _listen(self) -> bool:
        passed = 0  # each time the log comes from its beginning
        chunks = self._cluster.client.tail_job_logs(self._job_id)
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), SILENCE_SECONDS)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            new = chunk[max(0, self._shown - passed) :]
            passed += len(chunk)
            if new:
                self._heard()
                self._shown += len(new)
                self._write(new)

    def _heard(self) -> None:
        if self._pause_seconds > FIRST_PAUSE_SECONDS:
            self._cluster.say("Connected again.")
        self._heard_at, self._pause_seconds = time.monotonic(), FIRST_PAUSE_SECONDS

    def _lost(self, error: UnreachableError) -> None:
        """Wait before the next try; LostError after the last."""
        job_id, again = self._job_id, self._cluster.command("logs", self._job_id)
        if time.monotonic() - self._heard_at > PATIENCE_SECONDS:
            words = f"If the head lives, job {job_id} goes on by itself. Follow it again: {again}"
            raise LostError(f"{error}\n{words}") from error
        if self._pause_seconds == FIRST_PAUSE_SECONDS:
            self._cluster.say(f"The connection is lost; job {job_id} goes on. Trying for {PATIENCE_SECONDS:.0f} s.")
        time.sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)


# --- errors, in words -----------------------------------------------------------------------------------------------


@contextmanager
def _explained(address: str, job_id: str = "") -> Iterator[None]:
    """What goes wrong with the cluster as a ClusterError that says what to do."""
    try:
        yield
    except BrokenPipeError:
        raise  # of our own output
    except AuthenticationError as error:
        raise ClusterError(_token_words(address, str(error))) from error
    except (OSError, RuntimeError, KeyError, aiohttp.ClientError) as error:
        raise _in_words(error, address, job_id) from error


def _token_words(address: str, said: str) -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        missing = "Set RAY_AUTH_MODE=token, and the token by RAY_AUTH_TOKEN_PATH=FILE or in ~/.ray/auth_token."
    elif "invalid or incorrect" in said:
        missing = "The one in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token is another cluster's."
    else:
        missing = "RAY_AUTH_MODE=token is set, but RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token holds none."
    return f"the cluster at {address} asks for its token. {missing}"


def _in_words(error: Exception, address: str, job_id: str) -> ClusterError:
    said = str(error)
    if "already exists" in said:
        return ClusterError(f"there is a job {job_id} at {address} already: somebody was faster. `list` shows it.")
    if "Version check returned 404" in said or isinstance(error, KeyError):
        return ClusterError(f"what answers at {address} is no Ray dashboard.")
    if "status code 404" in said:
        return ClusterError(
            f"the cluster at {address} knows no job {job_id}; `list` shows those it knows. Jobs are forgotten with "
            "their head: a search whose head has died goes on by the command that submitted it with --resume behind "
            "`--`."
        )
    if "status code" in said:
        return UnreachableError(f"the cluster at {address} cannot do that: {said.strip().splitlines()[-1]}")
    return UnreachableError(
        f"no answer from a Ray dashboard at {address} ({type(error).__name__}). Is the tunnel open "
        "(`ray dashboard cluster/gpu.yaml`), and the cluster up? A search whose head has died goes on, on a new "
        "cluster, by the command that submitted it with --resume behind `--`: what it has done is on its storage."
    )


def _variables() -> dict[str, str]:
    """What a job is told besides its command. The cluster shows them to all who can reach it."""
    given = {COMMIT_VARIABLE: project_commit(), RETRY_VARIABLE: os.environ.get(RETRY_VARIABLE)}
    known = {name: value for name, value in given.items() if value}
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)} | known
