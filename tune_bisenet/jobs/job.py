"""Jobs as a cluster tells of them: how they stand, what exit code that makes, and which id the next one gets.

Values and words; Ray's own types are read in `Job.of` alone.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from tune_bisenet.storage import redact

INTERRUPTED: Final = 130

STOP_SECONDS: Final = 120
"""How long Ray waits between SIGTERM and SIGKILL; by itself it would wait 3 s, and a search needs 10 to 30."""

NOTHING_STARTED_CODES: Final = frozenset({2, 126, 127})
"""Of a driver: the input was wrong, or the shell found no Python."""

NEVER_RAN: Final = frozenset(
    {
        "RUNTIME_ENV_SETUP_FAILURE",
        "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
        "JOB_SUPERVISOR_ACTOR_START_FAILURE",
        "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE",
        "JOB_ENTRYPOINT_COMMAND_START_ERROR",
    }
)

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the cluster says of a job."""

    id: str
    status: Status
    search: str | None
    """The search's name; None of a job that was submitted by other means."""
    storage: str | None
    started: float | None
    """Seconds since the epoch."""
    ended: float | None
    driver_code: int | None
    error_type: str | None
    message: str

    @classmethod
    def of(cls, details: Any) -> "Job":
        """From Ray's JobDetails."""
        metadata = details.metadata or {}
        return cls(
            id=details.submission_id or details.job_id,
            status=details.status.value,
            search=metadata.get("search"),
            storage=metadata.get("storage"),
            started=details.start_time / 1000 if details.start_time else None,
            ended=details.end_time / 1000 if details.end_time else None,
            driver_code=details.driver_exit_code,
            error_type=details.error_type,
            message=details.message or "",
        )

    @property
    def has_ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def started_nothing(self) -> bool:
        """Whether it ended without having begun a search."""
        return self.status == "FAILED" and (
            self.driver_code in NOTHING_STARTED_CODES or (self.error_type or "") in NEVER_RAN
        )

    @property
    def exit_code(self) -> int:
        """What following it to its end gives: the run's own exit code, where it is known."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return INTERRUPTED
        code = 1 if self.driver_code is None else self.driver_code
        return code if code >= 0 else 128 - code  # a signal's number, as Python tells it

    @property
    def words(self) -> str:
        if self.status == "FAILED" and self.driver_code is not None:
            return f"failed with exit code {self.exit_code}"
        return self.status.lower()


class ClusterError(ValueError):
    """The cluster refuses, or knows nothing of what it is asked for."""


class UnreachableError(ClusterError):
    """The cluster does not answer, at the moment at least."""


class LostError(Exception):
    """The cluster answered once, and has not for too long."""


class TakenError(ValueError):
    """There is a job for this search already."""


def choose_id(name: str, jobs: Sequence[Job], *, continues: bool, command: Callable[[str, str], str]) -> str:
    """The job id of a search: its name, `name-2` for its second job and so on. TakenError if it must not have one now.

    `command` gives the command line for a verb and a job.
    """
    same = [job for job in jobs if job.search == name and not job.started_nothing]
    for job in same:
        if not job.has_ended:
            raise TakenError(
                f"the search {name} is {job.words} as job {job.id}. Follow it: {command('logs', job.id)}. "
                f"End it: {command('stop', job.id)}. For another search take another --name."
            )
    if same and not continues:
        last = max(same, key=lambda job: job.started or 0)
        raise TakenError(
            f"the search {name} has been submitted before, as job {last.id}, which {last.words}. "
            "Go on with it by --resume among the run's flags, or take another --name."
        )
    taken = {job.id for job in jobs}
    candidates = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


# --- the cluster's address ------------------------------------------------------------------------------------------


def checked_address(address: str) -> str:
    """Without a slash at its end. ValueError if it is not that of a dashboard."""
    try:
        parts = urlsplit(address)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(
            f"--address {redact(address)} is not the address of a dashboard: write it as http://127.0.0.1:8265. "
            "`ray dashboard cluster/gpu.yaml` opens a tunnel to it."
        )
    if "@" in parts.netloc:
        raise ValueError("--address: leave name and password out; Ray asks for a token (RAY_AUTH_MODE=token).")
    return address.rstrip("/")


def is_local(address: str) -> bool:
    """Whether it is this machine's: the end of a tunnel, as a rule."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
