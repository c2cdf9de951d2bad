"""The watcher of a spot machine: polls the cloud's notice, and drains this node of Ray in time.

    python -m tune_bisenet.spot --cloud aws

It runs beside Ray on each worker that may be taken away. A node that is drained gets no new trials; those that run go
on for as long as the machine lives. When it is gone, Ray starts them elsewhere and does not count that as a failure.
It ends when its node has been drained. Of Ray it knows one command, run in a process of its own.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from urllib.error import HTTPError

Cloud = Literal["aws", "gcp"]

METADATA_URLS: Final[dict[Cloud, str]] = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
}

POLL_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 2.0
"""A metadata service is next door: one that takes longer is not there."""

TOKEN_SECONDS: Final = 60
"""How long a token of IMDSv2 is asked for. Each poll asks for a new one."""

GCP_SECONDS: Final = 30.0
"""What Google leaves a machine after its notice."""

DRAIN_SECONDS: Final = 60.0
"""How long one attempt to drain may take."""

EARLY: Final = 0.5
"""The part of the time left that Ray is told. It takes the loss of a node for a preemption only if it comes later than
it was told; until then and after, trials go on all the same."""

log = logging.getLogger("tune_bisenet.spot")


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away."""

    words: str
    seconds_left: float


# --- the cloud ------------------------------------------------------------------------------------------------------


class Metadata:
    """A cloud's metadata service, as seen from a machine."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # No proxy is asked for what lies on the machine's own link.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, headers: dict[str, str], *, method: str = "GET") -> str | None:
        """The answer; None if there is no such page. OSError or ValueError if nobody answers as this service does."""
        request = urllib.request.Request(self._url + path, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=ANSWER_SECONDS) as response:
                return str(response.read().decode())
        except HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise


def aws_notice(metadata: Metadata) -> Notice | None:
    """IMDSv2's `instance-action`: two minutes before. A recommendation to rebalance is no notice."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = metadata.ask("/latest/api/token", lifetime, method="PUT")
    if token is None:
        raise ValueError("it gives out no token (PUT /latest/api/token)")
    answer = metadata.ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if answer is None:
        return None
    action = json.loads(answer)
    at = datetime.fromisoformat(action["time"])
    return Notice(f"AWS will {action['action']} this machine at {at:%H:%M:%S %Z}", at.timestamp() - time.time())


def gcp_notice(metadata: Metadata) -> Notice | None:
    """`preempted`: half a minute before. `maintenance-event`: up to an hour before, as GPUs cannot be moved alive."""
    for page, is_notice in (("preempted", "TRUE".__eq__), ("maintenance-event", "TERMINATE".__eq__)):
        answer = metadata.ask(f"/computeMetadata/v1/instance/{page}", {"Metadata-Flavor": "Google"})
        if answer is None:
            raise ValueError(f"it has no page instance/{page}")
        if is_notice(answer.strip().removesuffix("_ON_HOST_MAINTENANCE")):
            return Notice(f"Google will take this machine away ({page}: {answer.strip()})", GCP_SECONDS)
    return None


NOTICES: Final[dict[Cloud, Callable[[Metadata], Notice | None]]] = {"aws": aws_notice, "gcp": gcp_notice}


# --- Ray ------------------------------------------------------------------------------------------------------------


def drain(notice: Notice, *, address: str, node_id: str | None) -> str:
    """Have Ray drain this node; why it did not, in words, empty if it did.

    The command is hidden in `ray --help`, and the only door to this that is not Python code private to Ray. It finds
    the node that it runs on, and the cluster's token where Ray does.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.words]
    command += ["--deadline-remaining-seconds", str(max(1, int(notice.seconds_left * EARLY)))]
    command += ["--node-id", node_id] if node_id else []
    # Where there is no Ray to be found, the variable keeps it from starting one.
    environment = os.environ | {"RAY_ADDRESS": os.environ.get("RAY_ADDRESS") or address}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=DRAIN_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {DRAIN_SECONDS:.0f} s"
    return "" if done.returncode == 0 else _last_line(done.stderr or done.stdout)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no word of why"


# --- the watch ------------------------------------------------------------------------------------------------------


def watch(look: Callable[[], Notice | None], act: Callable[[Notice], str], *, poll_seconds: float) -> None:
    """Look until there is a notice, then act on it until that works. What stays the same is said once."""
    said = ""
    while True:
        began_at = time.monotonic()
        notice, trouble = _looked(look)
        if notice is not None:
            trouble = act(notice)
            if not trouble:
                log.warning("%s. Its node of Ray is drained: no new trials come here.", notice.words)
                return
            trouble = f"{notice.words}, but its node of Ray cannot be drained: {trouble}. Trying again."
        if trouble != said:
            log.warning("%s", trouble or "The metadata service answers: there is no notice.")
            said = trouble
        time.sleep(max(0.0, poll_seconds - (time.monotonic() - began_at)))


def _looked(look: Callable[[], Notice | None]) -> tuple[Notice | None, str]:
    """The notice, or why nobody knows of one."""
    try:
        return look(), ""
    except (OSError, ValueError, LookupError, TypeError) as error:  # not there, or what it says makes no sense
        return None, f"The metadata service gives no answer: {error}. Asking on."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line until this node has been drained."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    given = _parser().parse_args(argv)
    cloud: Cloud = given.cloud
    metadata = Metadata(given.metadata_url or METADATA_URLS[cloud])
    watch(
        lambda: NOTICES[cloud](metadata),
        lambda notice: drain(notice, address=given.address, node_id=given.node_id),
        poll_seconds=given.poll_seconds,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.spot",
        description="Watch for the cloud's notice that this spot machine will be taken away, and drain its node of "
        "Ray. Runs beside Ray on each worker; ends when the node has been drained.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cloud", required=True, choices=sorted(NOTICES), help="whose machine this is")
    add("--poll-seconds", type=_seconds, default=POLL_SECONDS, metavar="S", help="default: %(default)g")
    add("--metadata-url", type=_url, metavar="URL", help="another metadata service than the cloud's, for trying out")
    add("--address", default="auto", metavar="HOST:PORT", help="of the cluster (default: the Ray on this machine)")
    add("--node-id", metavar="HEX", help="of the node to drain (default: the one on this machine)")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 60:
        raise argparse.ArgumentTypeError(f"{text}: give seconds above 0, at most 60, or the notice is seen too late.")
    return seconds


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text} is no address of a web server: it begins with http:// or https://.")
    return text


if __name__ == "__main__":
    sys.exit(main())
