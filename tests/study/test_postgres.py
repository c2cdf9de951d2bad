"""A study in a real PostgreSQL: drivers killed, the server stopped and started again, the password kept secret.

`make test-postgres` installs Debian's server where there is none.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from helpers.light_search import (
    Search,
    assert_kills_change_nothing,
    assert_whole,
    close_connections,
    database_at,
    earlier_trials,
    make_place,
    results,
    trials_in,
)
from helpers.processes import free_port
from optuna.storages import RDBStorage

from tune_bisenet.options import InputError
from tune_bisenet.storage import RETRY_VARIABLE, Storage, StorageError
from tune_bisenet.study.study import DATABASE_ERRORS, is_outage

PROGRAMS = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]

pytestmark = [
    pytest.mark.skipif(not PROGRAMS, reason="there is no PostgreSQL server here: make test-postgres installs one"),
    pytest.mark.timeout(2700),
]

PASSWORD = "s3cr@t:w/rd?%#& +ü"
"""Every character that has a meaning in an address."""

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


@dataclass(frozen=True)
class Server:
    """A server of its own, with one superuser who needs a password even from this machine."""

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

    def add_database(self, name: str) -> dict[str, str]:
        """Return its address without and with the password."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return {"url": f"postgresql://me@127.0.0.1:{self.port}/{name}", "secret": self.url(name)}

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
        log = self.folder / "log"
        assert ran.returncode == 0, f"{program} failed: {log.read_text(errors='replace') if log.exists() else 'no log'}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    for place in make_place():
        place.chmod(0o755)
        server = Server(place / "server", free_port())
        server.make()
        server.start()
        yield server
        server.stop()


def search_in(place: Path, name: str, database: Mapping[str, str], *, limit: int = 8) -> Search:
    folder = Storage.at(str(place / name))
    url, secret = database.get("url"), database.get("secret")
    return Search(folder=folder, limit=limit, known=earlier_trials(11), url=url, secret=secret)


def test_a_study_in_postgresql_is_the_one_that_a_file_would_hold(server: Server, place: Path) -> None:
    in_database = search_in(place, "database", server.add_database("same"))
    in_database.run()
    in_file = search_in(place, "file", {})
    in_file.run()
    assert results(trials_in(in_database)) == results(trials_in(in_file))
    assert_whole(in_database, trials_in(in_database))
    assert not (place / "database" / "study.db").exists()


def test_drivers_killed_at_any_moment_change_no_result(server: Server, place: Path) -> None:
    undisturbed = search_in(place, "undisturbed", {}, limit=12)
    undisturbed.run()

    def search_of(seed: int) -> Search:
        return search_in(place, f"killed{seed}", server.add_database(f"killed{seed}"), limit=12)

    assert_kills_change_nothing(search_of, undisturbed=undisturbed, mean_seconds=0.2)


class OnWarning(logging.Handler):
    """Calls `act` when a warning names the study's database."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        if "study's database cannot" in record.getMessage():
            self._act()


@pytest.mark.parametrize("epoch", [2, 3, 6, 9])
def test_a_search_goes_through_an_outage_of_its_database(server: Server, place: Path, epoch: int) -> None:
    """The server stops after that epoch of three trials at once, and starts again when the search says so."""
    epochs = iter(range(1, 1000))
    search = replace(search_in(place, f"away{epoch}", server.add_database(f"away{epoch}")), at_once=3)
    handler = OnWarning(server.start)
    logging.getLogger("tune_bisenet").addHandler(handler)
    try:
        replace(search, between=lambda: server.stop() if next(epochs) == epoch else None).run()
    finally:
        logging.getLogger("tune_bisenet").removeHandler(handler)
    assert next(epochs) > epoch
    assert_whole(search, trials_in(search))


def test_a_search_ends_if_its_database_stays_away_and_is_resumed(
    server: Server, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRY_VARIABLE, "0.5")
    epochs = iter(range(1, 1000))
    search = replace(search_in(place, "gone", server.add_database("gone")), at_once=3)
    with pytest.raises(StorageError, match="study's database"):
        replace(search, between=lambda: server.stop() if next(epochs) == 8 else None).run()
    server.start()
    search.run()
    assert_whole(search, trials_in(search))


def test_a_wrong_password_is_refused_and_neither_is_shown(server: Server) -> None:
    database = server.add_database("guarded")
    database_at(database["url"], secret=database["secret"]).check("light", is_new=True)
    for secret in (server.url("guarded", password="gu@ssed/w0rd"), None):
        with pytest.raises(InputError) as refused:
            database_at(database["url"], secret=secret).check("light", is_new=True)
        message = str(refused.value)
        assert all(word in message for word in (database["url"], "password", "$TUNE_BISENET_STUDY"))
        assert not any(piece in message for piece in ("gu@ssed", "w0rd", "gu%40", "s3cr"))


def test_only_what_a_retry_may_mend_is_an_outage(server: Server) -> None:
    server.add_database("there")
    for address, is_away in (
        (server.url("there", password="gu@ssed"), False),
        (server.url("elsewhere"), False),
        ("postgresql+psycopg://me@127.0.0.1:1/there", True),
    ):
        with pytest.raises(DATABASE_ERRORS) as failed:
            RDBStorage(address)
        assert is_outage(failed.value) == is_away
