"""TensorBoard and optuna-dashboard over object storage (moto's S3): copies keep up, and both servers show them."""

import json
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import optuna
import pytest
from helpers.object_store import object_store
from helpers.processes import LoggedProcess, free_port
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tune_bisenet.cluster.daemons import copy_dashboards
from tune_bisenet.storage import Storage

pytestmark = pytest.mark.cluster

EVENTS = "r01/events.out.tfevents.1.host"


@pytest.fixture
def storage() -> Iterator[Storage]:
    with object_store() as store:
        yield Storage.at(store.uri("searches"))


def events(num_steps: int) -> bytes:
    """Return an event file with a scalar for each step."""
    content = BytesIO()
    records = RecordWriter(content)
    records.write(event_pb2.Event(file_version="brain.Event:2").SerializeToString())
    for step in range(num_steps):
        value = summary_pb2.Summary.Value(tag="miou", simple_value=step / 10)
        event = event_pb2.Event(step=step, wall_time=float(step), summary=summary_pb2.Summary(value=[value]))
        records.write(event.SerializeToString())
    return content.getvalue()


def study_file(path: Path, num_trials: int) -> bytes:
    """Add trials to an Optuna study in SQLite. Return the file."""
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name="wide", load_if_exists=True)
    study.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=num_trials)
    study._storage.remove_session()  # type: ignore[attr-defined]
    return path.read_bytes()


def test_event_files_are_appended_to_and_studies_renewed_in_place(storage: Storage, tmp_path: Path) -> None:
    content, search, folder = events(8), storage / "wide", tmp_path / "local"
    assert copy_dashboards(storage, folder) == []
    search.write(EVENTS, content[: len(content) // 2])
    search.write("r01/last.pt", b"weights")
    copy_dashboards(storage, folder)
    copy = folder / "wide" / EVENTS
    assert copy.read_bytes() == content[: len(content) // 2]
    inode = copy.stat().st_ino
    search.write(EVENTS, content)
    copy_dashboards(storage, folder)
    assert copy.read_bytes() == content
    assert copy.stat().st_ino == inode, "TensorBoard keeps the file open"
    assert not (folder / "wide" / "r01" / "last.pt").exists(), "checkpoints are not fetched"

    search.write("study.db", study_file(tmp_path / "study.db", 1))
    (study,) = copy_dashboards(storage, folder)
    with closing(sqlite3.connect(study)) as reader:
        assert reader.execute("select count(*) from trials").fetchone() == (1,)
        newer = study_file(tmp_path / "study.db", 2)

        def is_shown() -> bool:  # an object's time is kept in seconds
            search.write("study.db", newer)
            copy_dashboards(storage, folder)
            return bool(reader.execute("select count(*) from trials").fetchone() == (3,))

        while not is_shown():  # by a dashboard that has the file open
            time.sleep(0.2)


def test_the_table_of_hyper_parameters_is_never_a_mixture_of_two(storage: Storage, tmp_path: Path) -> None:
    name = "events.out.tfevents.0000000000.experiment"
    for content in (b"three rows", b"now there are four rows"):
        (storage / "wide").write(name, content)
        copy_dashboards(storage, tmp_path)
    assert (tmp_path / "wide" / name).read_bytes() == b"now there are four rows"


def test_storage_on_a_disk_of_this_machine_is_shown_as_it_is(tmp_path: Path) -> None:
    study = tmp_path / "wide" / "study.db"
    study.parent.mkdir()
    study.touch()
    assert copy_dashboards(Storage.at(str(tmp_path)), tmp_path) == [study]


def fetched(port: int, page: str) -> Any:
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10) as answer:
        return json.load(answer)
    return {}


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_both_servers_show_what_is_on_storage_to_this_machine_alone(storage: Storage, tmp_path: Path) -> None:
    (storage / "wide").write(EVENTS, events(3))
    (storage / "wide").write("study.db", study_file(tmp_path / "study.db", 2))
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "tune_bisenet.cluster.daemons", "dashboards", "--storage", storage.uri]
    command += ["--local", str(tmp_path / "local")]
    command += ["--tensorboard-port", str(ports[0]), "--optuna-port", str(ports[1])]
    with LoggedProcess(command, log=tmp_path / "daemon.log", env=dict(os.environ)) as daemon:
        daemon.until(lambda: "wide/r01" in fetched(ports[0], "data/runs"))
        daemon.until(lambda: bool(fetched(ports[1], "api/studies")))
        (study,) = fetched(ports[1], "api/studies")["study_summaries"]
        assert study["study_name"] == "wide"
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = {address for _, address, _, state, *_ in sockets if state == "0A"}
        assert {f"0100007F:{port:04X}" for port in ports} <= listening
        assert not {f"00000000:{port:04X}" for port in ports} & listening
        os.kill(daemon.process.pid, signal.SIGTERM)
        assert daemon.end() == 143
        for port in ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, "a server outlived its daemon"
