"""TensorBoard and optuna-dashboard over object storage (moto's S3): copies keep up, and both servers show them."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import optuna
import pytest
from files import ROOT
from heads import free_port
from mock_aws import MockAws, mock_aws_server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tune_bisenet.pages import copy_pages
from tune_bisenet.storage import Storage

pytestmark = pytest.mark.cluster

BUCKET = "bucket"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockAws]:
    with mock_aws_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.client("s3").create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture
def storage(aws: MockAws) -> Storage:
    address = aws.url.removeprefix("http://")
    return Storage.at(f"s3://{BUCKET}/searches?endpoint_override={address}&scheme=http&region=us-east-1")


NAME = "events.out.tfevents.1.host"


def events(num_steps: int) -> bytes:
    """An event file with a scalar for each step."""
    content = BytesIO()
    records = RecordWriter(content)
    records.write(event_pb2.Event(file_version="brain.Event:2").SerializeToString())
    for step in range(num_steps):
        value = summary_pb2.Summary.Value(tag="miou", simple_value=step / 10)
        event = event_pb2.Event(step=step, wall_time=float(step), summary=summary_pb2.Summary(value=[value]))
        records.write(event.SerializeToString())
    return content.getvalue()


def study_file(path: Path, num_trials: int) -> bytes:
    """An Optuna study in SQLite."""
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name="wide", load_if_exists=True)
    study.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=num_trials)
    study._storage.remove_session()  # type: ignore[attr-defined]
    return path.read_bytes()


def test_event_files_are_continued_and_studies_renewed_in_place(storage: Storage, tmp_path: Path) -> None:
    content = events(8)
    local = tmp_path / "local"
    assert copy_pages(storage, local) == []
    (storage / "wide").write(f"r01/{NAME}", content[: len(content) // 2])
    (storage / "wide").write("r01/last.pt", b"weights")
    copy_pages(storage, local)
    copy = local / "wide" / "r01" / NAME
    assert copy.read_bytes() == content[: len(content) // 2]
    inode = copy.stat().st_ino
    time.sleep(1.1)  # an object's time is kept in seconds
    (storage / "wide").write(f"r01/{NAME}", content)
    copy_pages(storage, local)
    assert copy.read_bytes() == content
    assert copy.stat().st_ino == inode, "TensorBoard keeps the file open"
    assert not (local / "wide" / "r01" / "last.pt").exists(), "checkpoints are not fetched"
    shown = EventAccumulator(str(copy.parent))
    shown.Reload()
    assert [event.step for event in shown.Scalars("miou")] == list(range(8))

    (storage / "wide").write("study.db", study_file(tmp_path / "study.db", 1))
    (study,) = copy_pages(storage, local)
    with closing(sqlite3.connect(study)) as reader:
        assert reader.execute("select count(*) from trials").fetchone() == (1,)
        time.sleep(1.1)
        (storage / "wide").write("study.db", study_file(tmp_path / "study.db", 2))
        copy_pages(storage, local)
        assert reader.execute("select count(*) from trials").fetchone() == (3,), "a dashboard that is open sees it"


def test_the_table_of_hyper_parameters_is_never_a_mixture_of_two(storage: Storage, tmp_path: Path) -> None:
    name = "events.out.tfevents.0000000000.experiment"
    (storage / "wide").write(name, b"three rows")
    copy_pages(storage, tmp_path)
    time.sleep(1.1)
    (storage / "wide").write(name, b"now there are four rows")
    copy_pages(storage, tmp_path)
    assert (tmp_path / "wide" / name).read_bytes() == b"now there are four rows"


def test_storage_on_a_disk_of_this_machine_is_shown_as_it_is(tmp_path: Path) -> None:
    study = tmp_path / "wide" / "study.db"
    study.parent.mkdir()
    study.touch()
    assert copy_pages(Storage.at(str(tmp_path)), tmp_path) == [study]


def get(url: str, seconds: float = 250) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except (URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_servers_show_what_is_on_storage_to_this_machine_alone(storage: Storage, tmp_path: Path) -> None:
    (storage / "wide").write(f"r01/{NAME}", events(3))
    (storage / "wide").write("study.db", study_file(tmp_path / "study.db", 2))
    ports = free_port(), free_port()
    words = [
        "--storage",
        storage.uri,
        "--local",
        tmp_path / "local",
        "--tensorboard-port",
        ports[0],
        "--optuna-port",
        ports[1],
    ]
    pages = subprocess.Popen(
        [sys.executable, "-m", "tune_bisenet.pages", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 250
        while "wide/r01" not in (runs := get(f"http://127.0.0.1:{ports[0]}/data/runs")):
            assert time.monotonic() < deadline, runs
            time.sleep(1)
        (study,) = get(f"http://127.0.0.1:{ports[1]}/api/studies")["study_summaries"]
        assert study["study_name"] == "wide"
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        addresses = {address for _, address, _, state, *_ in sockets if state == "0A"}  # those that listen
        assert {f"0100007F:{port:04X}" for port in ports} <= addresses
        assert not {f"00000000:{port:04X}" for port in ports} & addresses
        os.kill(pages.pid, signal.SIGTERM)
        assert pages.wait(timeout=250) == 143
        for port in ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, "a server outlived its pages"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pages.pid, signal.SIGKILL)
        pages.wait()
