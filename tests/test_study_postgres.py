"""A study in a real PostgreSQL: its driver killed, its server stopped and started again, its password kept to itself.

`make test-postgres` installs Debian's server where there is none.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import optuna
import psycopg
import pytest
from heads import free_port
from light_search import Search, assert_whole, close_connections, killed, make_place, results, trials_in
from light_space import curve_of, earlier_trials

from tune_bisenet.records import EPOCHS
from tune_bisenet.search import searcher
from tune_bisenet.storage import Storage
from tune_bisenet.study.place import StudyError, study_place
from tune_bisenet.study.study import exists

PROGRAMS = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]

pytestmark = [
    pytest.mark.skipif(not PROGRAMS, reason="there is no PostgreSQL server here: make test-postgres installs one"),
    pytest.mark.timeout(1200),
]

PASSWORD = "s3cr@t:w/rd?%#& +ü"
"""Every character that has a meaning in an address."""

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


@dataclass(frozen=True)
class Server:
    """A cluster of its own, with one superuser who needs a password even from this machine."""

    folder: Path
    port: int

    def make(self) -> None:
        self.folder.mkdir()
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        password = self.folder / "password"
        password.write_text(PASSWORD + "\n", encoding="utf-8")
        self._do(
            "initdb", "--auth=scram-sha-256", "--username=me", f"--pwfile={password}", "--encoding=UTF8", "--no-sync"
        )
        password.unlink()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self._do("pg_ctl", "start", "--wait", f"--log={self.folder / 'log'}", f"--options={options}")

    def stop(self) -> None:
        """At once, with all connections cut, as when its machine fails."""
        self._do("pg_ctl", "stop", "--wait", "--mode=immediate")

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://me:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def add_database(self, name: str) -> str:
        """Its address."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.url(name)

    def _do(self, program: str, *words: str) -> None:
        """As the user postgres where we are root, whom the server refuses."""
        as_postgres = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        command = [*as_postgres, str(PROGRAMS[-1] / program), *words, f"--pgdata={self.folder / 'data'}"]
        ran = subprocess.run(  # into files: a server that goes on would keep a pipe open
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=250,
        )
        assert ran.returncode == 0, f"{program} failed: {self.log}"

    @property
    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else "it has no log"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    for place in make_place():
        place.chmod(0o755)
        server = Server(place / "server", free_port())
        server.make()
        server.start()
        yield server
        server.stop()


def search_in(place: Path, name: str, url: str | None, *, limit: int = 8) -> Search:
    return Search(folder=Storage.at(str(place / name)), limit=limit, known=earlier_trials(11), url=url)


def test_a_study_in_postgresql_is_the_one_that_a_file_would_hold(server: Server, place: Path) -> None:
    in_database = search_in(place, "database", server.add_database("same"))
    in_database.run()
    in_file = search_in(place, "file", None)
    in_file.run()
    assert results(trials_in(in_database)) == results(trials_in(in_file))
    assert_whole(in_database, trials_in(in_database))
    assert not (place / "database" / "study.db").exists()


def test_drivers_killed_at_any_moment_change_no_result(server: Server, place: Path) -> None:
    undisturbed = search_in(place, "undisturbed", None, limit=12)
    undisturbed.run()
    kills = 0
    for seed in range(10):
        search = search_in(place, f"killed{seed}", server.add_database(f"killed{seed}"), limit=12)
        kills += killed(search, seed=seed, mean_seconds=0.2, max_kills=15)
        assert results(trials_in(search)) == results(trials_in(undisturbed))
        assert_whole(search, trials_in(search))
        if kills >= 15:
            return
    pytest.fail(f"{kills} drivers were killed")


@pytest.mark.parametrize(("stops_at", "starts_at"), [(4, 7), (4, 9), (2, 8), (8, 100)])
def test_trials_go_on_while_the_server_is_away_and_nothing_is_lost(
    server: Server, place: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int, starts_at: int
) -> None:
    """The server stops and starts at that epoch of all trials together, of which three run at once."""
    monkeypatch.setattr(searcher, "SECONDS_BETWEEN_TRIES", 0.0)
    epochs = iter(range(1, 1000))

    def between() -> None:
        epoch = next(epochs)
        if epoch == stops_at:
            server.stop()
        if epoch == starts_at:
            server.start()

    name = f"away{stops_at}to{starts_at}"
    search = replace(search_in(place, name, server.add_database(name)), at_once=3)
    if starts_at < 100:
        replace(search, between=between).run()
    else:
        monkeypatch.setattr(searcher, "OUTAGE_SECONDS", 0.5)
        assert "the study's database has not answered for" in replace(search, between=between).run()
        server.start()
        assert search.run() == ""
    assert_whole(search, trials_in(search))


def test_what_ends_while_the_server_is_away_is_told_at_the_latest_when_the_search_ends(
    server: Server, place: Path
) -> None:
    search = Search(folder=Storage.at(str(place / "last")), limit=1, url=server.add_database("last"))
    search.folder.make()
    book = search.book({})
    asked = search.supply(book, {})
    asked.begin()
    name, run = asked.next() or pytest.fail("there is no trial")
    server.stop()
    history = curve_of(run)
    (search.folder / name).write(EPOCHS, json.dumps([epoch.to_json() for epoch in history]).encode())
    book.heard(name, searcher.reported(history, latency_ms=None))
    asked.heard(name, epoch=3, miou=history[-1].miou)
    book.ended(name, diverged=False, stopped_by="")
    asked.ended(book[name])
    server.start()
    book.close()
    asked.close()
    first = trials_in(search)[0]
    assert (first.state.name, first.value) == ("COMPLETE", history[-1].miou)
    assert first.intermediate_values == {epoch.epoch: epoch.miou for epoch in history}


def test_a_wrong_password_is_refused_and_neither_is_shown(server: Server, place: Path) -> None:
    url = server.add_database("guarded")
    folder = Storage.at(str(place))
    study_place(folder, url=url, cache_dir=place).check("light", is_new=True)
    wrong = study_place(folder, url=server.url("guarded", password="gu@ssed/w0rd"), cache_dir=place)
    with pytest.raises(StudyError) as refused:
        wrong.check("light", is_new=True)
    said = str(refused.value)
    assert said.startswith(f"the study in postgresql://me:***@127.0.0.1:{server.port}/guarded cannot be used: ")
    assert 'password authentication failed for user "me"' in said
    assert not any(piece in said for piece in ("gu@ssed", "w0rd", "gu%40", "s3cr"))


def test_a_database_that_does_not_exist_is_named(server: Server, place: Path) -> None:
    nowhere = study_place(Storage.at(str(place)), url=server.url("nosuch"), cache_dir=place)
    with pytest.raises(StudyError, match='database "nosuch" does not exist') as refused:
        nowhere.check("light", is_new=True)
    assert "s3cr" not in str(refused.value)


def test_a_study_of_the_same_name_is_not_taken_over(server: Server, place: Path) -> None:
    there = study_place(Storage.at(str(place)), url=server.add_database("shared"), cache_dir=place)
    optuna.create_study(storage=there.open(), study_name="light")
    assert exists(there.open(), "light")
    with pytest.raises(StudyError, match="there is a study light already"):
        there.check("light", is_new=True)
    there.check("light", is_new=False)
