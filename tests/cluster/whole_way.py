"""The whole way of cluster/README.md on AWS, without a network: run in namespaces of its own, as root.

EC2 and S3 are moto's; the machines that it "launches" are those of `machines`, each alone with its processes, ports and
home. cluster/gpu.yaml is filled in and otherwise as it is, and the commands are README.md's own. Ray's launcher and its
autoscaler, SSH, rsync, our set-up and start commands, the job, its trials and what they leave on S3 are real. Three
things are not: `make setup` finds its 3 GB here already; a machine's GPU is only pretended, so trials are told to train
on the CPU; and idle workers leave after seconds, not minutes.

    unshare --net --pid --mount --fork --kill-child --mount-proc python whole_way.py FOLDER

Prints one line of JSON, `Seen`.
"""

import csv
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.request import urlopen

from clouds import Cloud
from driving import write_frames
from files import AMI, GROUP, SUBNET, filled_text
from laptop import Laptop, answers, wait
from machines import GATEWAY, METADATA, Machine, Machines, become_laptop, network_of
from mock_aws import MockAws, account, mock_aws_server
from nodes import processes

SECONDS = 1600
"""After which all is given up, also where whoever started this is gone."""

BUCKET = "mine"
SEARCH = "paper"
TRIALS = ("a", "b", "c")
SMALL = "--space smoke --epochs 2 --backbone none --device cpu --gpus-per-trial 1 --max-concurrent 2"
"""What README.md's search is changed to: three trials on eight frames, two at once, each on a GPU that is pretended."""

SUBMIT = "python -m tune_bisenet.submit --address http://127.0.0.1:8265"
DASHBOARD, TENSORBOARD, OPTUNA = 8265, 6006, 8080

MAKE = f"""#!/bin/sh
echo "make $*" >> ~/made
ln -sfn {sys.prefix} ~/tune_bisenet/.venv
"""


@dataclass
class Seen:
    """What was seen on the way. Machines go by their addresses in the cluster."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Since the beginning, at the end of each part."""
    said: dict[str, str] = field(default_factory=dict)
    """By each command."""
    kinds: dict[str, list[str]] = field(default_factory=dict)
    """The types of the machines that EC2 had running at the end of each part."""
    markets: list[str | None] = field(default_factory=list)
    """Of each worker that was launched: spot, or None for on-demand."""
    head: str = ""
    workers: list[str] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    """What set-up asked of make."""
    trainers: set[str] = field(default_factory=set)
    """Machines on which processes were seen that train."""
    watchers: set[str] = field(default_factory=set)
    """And that watch for a spot notice."""
    watchers_said: dict[str, str] = field(default_factory=dict)
    metadata_asked: list[str] = field(default_factory=list)
    trained_on: dict[str, list[str]] = field(default_factory=dict)
    """By trial, what Tune wrote down."""
    statuses: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    """Those that TensorBoard lists through the tunnel."""
    heard_on_head: list[tuple[str, int]] = field(default_factory=list)
    """Addresses and ports of the pages at which it listens."""
    open_to_all: list[int] = field(default_factory=list)
    """Those of their ports that its public address answers at."""
    reported: list[str] = field(default_factory=list)
    """The files of the report that was written after `ray down`."""


class Way:
    """Goes it, and sees."""

    def __init__(self, laptop: Laptop, aws: MockAws, machines: Machines) -> None:
        self.laptop = laptop
        self.aws = aws
        self.machines = machines
        self.seen = Seen(said=laptop.said)
        self._began = time.monotonic()

    def go(self) -> None:
        """From the file to the report, in README.md's order."""
        laptop = self.laptop
        laptop.run("token", "ray get-auth-token")
        laptop.run("check", "python -m tune_bisenet.check_cluster")
        laptop.run("up", "ray up", "--yes")
        (head,) = self.machines.alive
        self.seen.head = head.private
        self._ended("up")
        with laptop.tunnel("dashboard", "ray dashboard", DASHBOARD):
            self._search()
        wait(lambda: len(self.machines.alive) == 1, 600, "the workers did not leave")
        self._ended("idle")
        with laptop.tunnel("attach", "ray attach", TENSORBOARD) as attached:
            assert attached.stdin is not None
            attached.stdin.write("ray status\n")
            attached.stdin.flush()
            self._look_at_pages(head)
            wait(lambda: "Pending Demands" in laptop.log("attach"), 250, "`ray status` on the head says nothing")
        self._ended("pages")
        laptop.run("down", "ray down", "--yes")
        self._ended("down")
        self._fetch()
        self._ended("report")

    def _ended(self, part: str) -> None:
        self.seen.seconds[part] = round(time.monotonic() - self._began, 1)
        reservations = self.aws.client("ec2").describe_instances()["Reservations"]
        instances = [instance for reservation in reservations for instance in reservation["Instances"]]
        running = [one["InstanceType"] for one in instances if one["State"]["Name"] in ("pending", "running")]
        self.seen.kinds[part] = running
        sys.stderr.write(f"{self.seen.seconds[part]:6.1f} s  {part}: {running}\n")

    # --- the search -------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        laptop = self.laptop
        job = laptop.start("search", f"{SUBMIT} --", SMALL)
        while job.poll() is None:
            self._look()
            if self.seen.trainers and "status" not in laptop.said:
                laptop.run("status", f"{SUBMIT} status")
            time.sleep(1)
        laptop.said["search"] = laptop.log("search")
        if job.returncode:
            raise SystemExit(f"the search ended with {job.returncode}:\n{laptop.said['search']}")
        laptop.run("list", f"{SUBMIT} list")
        self._ended("search")

    def _look(self) -> None:
        """Which machines run what."""
        titles: dict[str, list[str]] = {}
        for one in processes():
            with suppress(OSError):  # it may have ended
                titles.setdefault(network_of(one.pid), []).append(one.title)
        for machine in self.machines.alive:
            here = titles.get(self.machines.network(machine), [])
            if any(title.startswith("ray::ImplicitFunc") for title in here):
                self.seen.trainers.add(machine.private)
            # Its beginning: the head's SSH to a worker has the whole command in its own title.
            if any(title.startswith("python -m tune_bisenet.spot ") for title in here):
                self.seen.watchers.add(machine.private)

    # --- what it leaves ---------------------------------------------------------------------------------------------

    def _look_at_pages(self, head: Machine) -> None:
        wanted = {f"{SEARCH}/{trial}" for trial in TRIALS}

        def shows_all() -> bool:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{TENSORBOARD}/data/runs", timeout=10) as answer:
                self.seen.runs = json.load(answer)
            return wanted <= set(self.seen.runs)

        wait(shows_all, 400, "TensorBoard does not show the trials")
        ports = (DASHBOARD, TENSORBOARD, OPTUNA)
        self.seen.heard_on_head = sorted(end for end in self.machines.listening(head) if end[1] in ports)
        self.seen.open_to_all = [port for port in ports if answers(head.public, port)]

    def _fetch(self) -> None:
        """What is known when the cluster has gone."""
        seen, everyone = self.seen, list(self.machines.all)
        seen.markets = [call.get("InstanceMarketOptions.MarketType") for call in self.aws.named("RunInstances")[1:]]
        seen.workers = [machine.private for machine in everyone if machine.private != seen.head]
        seen.homes = {machine.private: machine.home for machine in everyone}
        seen.made = {machine.private: machine.read("made") for machine in everyone}
        seen.watchers_said = {machine.private: machine.read("spot.log") for machine in everyone}
        for trial in TRIALS:
            results = [json.loads(line) for line in self._lines(f"/{trial}/result.json")]
            seen.trained_on[trial] = sorted({result["node_ip"] for result in results})
        board = csv.DictReader(self._lines(f"/{SEARCH}/leaderboard.csv"))
        seen.statuses = {row["trial"]: row["status"] for row in board}
        self.laptop.run("report", "python -m tune_bisenet.report")
        seen.reported = sorted(path.name for path in (self.laptop.home / "results" / SEARCH).iterdir())

    def _lines(self, end: str) -> list[str]:
        """Of the search's files in the bucket whose names end like that."""
        s3 = self.aws.client("s3")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"searches/{SEARCH}/")
        names = [found["Key"] for page in pages for found in page.get("Contents", []) if found["Key"].endswith(end)]
        files = [s3.get_object(Bucket=BUCKET, Key=name)["Body"].read().decode() for name in names]
        return [line for file in files for line in file.splitlines()]


# --- what has to be there before ------------------------------------------------------------------------------------


def main(folder: Path) -> Seen:
    deadline = threading.Timer(SECONDS, lambda: os._exit(1))
    deadline.daemon = True
    deadline.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # of the mock AWS: a line for each request
    home = become_laptop(folder)
    with mock_aws_server(GATEWAY) as aws, metadata_service() as cloud:
        machines = Machines(aws, folder / "machines", image(aws))
        laptop = Laptop(home, aws.environment, BUCKET=BUCKET, ID=SEARCH)
        laptop.file.write_text(cluster_file(aws))
        fill_bucket(aws, folder)
        way = Way(laptop, aws, machines)
        try:
            with machines.follow_moto():
                way.go()
        except BaseException:
            sys.stderr.write(laptop.told() + "".join(machine.told() for machine in machines.all))
            raise
        way.seen.metadata_asked = sorted(set(cloud.asked))
    return way.seen


def cluster_file(aws: MockAws) -> str:
    """gpu.yaml, filled in; only patience is another."""
    has, text = account(aws), filled_text("gpu.yaml")
    for placeholder, name in ((AMI, "image"), (SUBNET, "subnet"), (GROUP, "group")):
        text = text.replace(placeholder, has[name])
    assert "idle_timeout_minutes: 5" in text
    return text.replace("idle_timeout_minutes: 5", "idle_timeout_minutes: 0.2")


def image(aws: MockAws) -> dict[str, str]:
    """The files in a new machine's home: what an image and an instance profile have to give, and a `make` of ours."""
    given = "".join(f"export {name}={value}\n" for name, value in aws.environment.items())
    paths = 'export PATH="$HOME/bin:$PATH" PYTHONPATH="$HOME/tune_bisenet" RAY_USAGE_STATS_ENABLED=0\n'
    python = f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 "$@"\n'
    return {".profile": paths + given, "bin/make": MAKE, "bin/python3": python}


def fill_bucket(aws: MockAws, folder: Path) -> None:
    frames, s3 = folder / "frames", aws.client("s3")
    write_frames(frames)
    s3.create_bucket(Bucket=BUCKET)
    for path in frames.rglob("*.png"):
        s3.put_object(Bucket=BUCKET, Key=f"cityscapes/{path.relative_to(frames)}", Body=path.read_bytes())


@contextmanager
def metadata_service() -> Iterator[Cloud]:
    """Where EC2 has it."""
    with Cloud((METADATA, 80)) as cloud:
        threading.Thread(target=cloud.serve_forever, daemon=True).start()
        yield cloud
        cloud.shutdown()


if __name__ == "__main__":
    words, sys.stdout = sys.stdout, sys.stderr
    words.write(json.dumps(asdict(main(Path(sys.argv[1]))), default=sorted) + "\n")
