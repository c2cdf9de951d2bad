"""Where a study is stored: a file of the search's own, a copy in object storage, or a database of the user's."""

import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pyarrow.fs
import pytest
from helpers.light_search import close_connections, database_at
from helpers.object_store import object_store
from optuna.distributions import FloatDistribution

from tune_bisenet.options import STUDY_VARIABLE, InputError, parse_options
from tune_bisenet.records import STUDY
from tune_bisenet.search.prepare import survey_search
from tune_bisenet.storage import Storage
from tune_bisenet.study.study import is_outage, study_database

_closed = pytest.fixture(autouse=True)(close_connections)

ADDRESS = "postgresql+psycopg://me@nosuch.invalid/studies"


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    (tmp_path / "search").mkdir()
    return Storage.at(str(tmp_path / "search"))


@pytest.fixture
def bucket(tmp_path: Path) -> Storage:
    (tmp_path / "bucket" / "search").mkdir(parents=True)
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    return Storage(filesystem, "bucket/search", "s3://bucket/search")


def error_of(address: str, secret: str | None = None) -> str:
    """Return what a user reads who gives this --study and this $TUNE_BISENET_STUDY to a new search."""
    with pytest.raises(InputError) as refused:
        database_at(address, secret=secret).check("search", is_new=True)
    return str(refused.value)


def test_on_a_disk_it_is_a_file_that_is_made_when_the_search_starts(folder: Storage, tmp_path: Path) -> None:
    database = study_database(folder, address=None, secret=None, cache_dir=tmp_path / "cache")
    database.check("search", is_new=True)
    assert not folder.exists(STUDY)
    optuna.create_study(storage=database.open(), study_name="search")
    database.snapshot()
    assert database.is_own
    assert [path.name for path in (tmp_path / "search").iterdir()] == [STUDY]
    assert optuna.load_study(study_name="search", storage=f"sqlite:///{folder.path}/{STUDY}").trials == []


@pytest.mark.parametrize("name", ["what?now", "50%", "{x}", "two #words"])
def test_the_file_of_a_search_may_lie_in_any_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    database = study_database(Storage.at(str(tmp_path / name)), address=None, secret=None, cache_dir=tmp_path / "cache")
    optuna.create_study(storage=database.open(), study_name="search")
    assert optuna.load_study(study_name="search", storage=database.shown).trials == [], "as a dashboard opens it"
    assert [path.name for path in tmp_path.rglob("*")] == [name, STUDY]


def test_in_object_storage_the_copy_counts_and_not_the_file_on_this_machine(bucket: Storage, tmp_path: Path) -> None:
    database = study_database(bucket, address=None, secret=None, cache_dir=tmp_path / "cache")
    study = optuna.create_study(storage=database.open(), study_name="search")
    study.tell(study.ask(), 1.0)
    assert not bucket.exists(STUDY)
    database.snapshot()
    study.tell(study.ask(), 2.0)  # after the copy: another machine resumes without it
    elsewhere = study_database(bucket, address=None, secret=None, cache_dir=tmp_path / "elsewhere")
    copied = optuna.load_study(study_name="search", storage=elsewhere.open())
    assert [trial.value for trial in copied.trials] == [1.0]
    copied.tell(copied.ask(), 3.0)
    elsewhere.snapshot()
    back = optuna.load_study(study_name="search", storage=database.open())
    assert [trial.value for trial in back.trials] == [1.0, 3.0]
    assert study_database(bucket / "two", address=None, secret=None, cache_dir=tmp_path / "cache").file != database.file


def test_a_copy_that_fails_is_logged_and_made_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with object_store() as store:
        folder = Storage.at(store.uri("search"))
        database = study_database(folder, address=None, secret=None, cache_dir=tmp_path / "cache")
        optuna.create_study(storage=database.open(), study_name="search")
        store.go_away()
        database.snapshot()
        assert "s3://bucket/search" in caplog.text
        store.come_back()
        assert folder.read(STUDY) is None
        database.snapshot()
        assert (folder.read(STUDY) or b"").startswith(b"SQLite")


def damage(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    match kind:
        case "garbage":
            content[:] = b"no database" * 1000
        case "cut in half":
            del content[len(content) // 2 :]
        case "empty":
            content.clear()
        case "a flipped bit in a page":
            content[2 * 4096] ^= 1
        case "a flipped bit in a distribution":
            content[content.index(b"FloatDistribution")] ^= 1
        case "of a newer Optuna":
            with closing(sqlite3.connect(file)) as connection, connection:
                connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
            return
    file.write_bytes(content)


def test_a_copy_of_a_damaged_file_is_left_for_later(
    bucket: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = study_database(bucket, address=None, secret=None, cache_dir=tmp_path / "cache")
    optuna.create_study(storage=database.open(), study_name="search")
    assert database.file
    damage(database.file, "garbage")
    database.snapshot()
    assert "not copied" in caplog.text
    assert not bucket.exists(STUDY)


@pytest.mark.parametrize(
    "kind",
    [
        "garbage",
        "cut in half",
        "empty",
        "a flipped bit in a page",
        "a flipped bit in a distribution",
        "of a newer Optuna",
    ],
)
def test_a_damaged_file_is_put_aside_and_that_is_told(
    folder: Storage, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = study_database(folder, address=None, secret=None, cache_dir=tmp_path)
    study = optuna.create_study(storage=database.open(), study_name="search")
    study.tell(study.ask({"lr": FloatDistribution(0.0, 1.0)}), 1.0)
    database.prepare()
    assert caplog.text == "", "a sound file stays"
    file = tmp_path / "search" / STUDY
    damage(file, kind)
    damaged = file.read_bytes()
    file.with_name(f"{STUDY}-journal").write_bytes(b"of the damaged file")
    database.prepare()
    assert not file.exists()
    aside = [path for path in file.parent.iterdir() if not path.name.endswith("-journal")]
    assert all(path.name.startswith(f"{STUDY}.damaged-") for path in file.parent.iterdir() if path in aside)
    assert [path.read_bytes() for path in aside] == [damaged]
    assert str(file) in caplog.text
    assert aside[0].name in caplog.text
    optuna.create_study(storage=database.open(), study_name="search")


def test_a_file_that_cannot_be_written_is_refused_and_not_put_aside(folder: Storage, tmp_path: Path) -> None:
    file = tmp_path / "search" / STUDY
    optuna.create_study(storage=f"sqlite:///{file}", study_name="search")
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        with pytest.raises(sqlite3.OperationalError) as refused:
            connection.execute("CREATE TABLE t (x)")
        assert not is_outage(refused.value)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=r"study\.db.*writable"):
        study_database(folder, address=None, secret=None, cache_dir=tmp_path).prepare()


def test_a_journal_of_an_earlier_session_never_meets_the_copy_from_object_storage(
    bucket: Storage, tmp_path: Path
) -> None:
    database = study_database(bucket, address=None, secret=None, cache_dir=tmp_path / "cache")
    optuna.create_study(storage=database.open(), study_name="search")
    database.snapshot()
    assert database.file
    journal = database.file.with_name(f"{database.file.name}-journal")
    journal.write_bytes(b"of a transaction that was killed")
    database.prepare()
    assert not journal.exists()


def test_a_study_of_that_name_is_never_taken_over_by_a_new_search(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/mine.db"
    database_at(url).check("search", is_new=True)
    optuna.create_study(storage=url, study_name="search")
    assert all(word in error_of(url) for word in (url, "--name"))
    database_at(url).check("search", is_new=False)
    database_at(url).check("another", is_new=True)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://me:%40s3cret@nosuch.invalid/studies",
        "postgresql+psycopg://me:p:s3cret@nosuch.invalid/studies",
        "postgresql+psycopg://me@nosuch.invalid/studies?password=s3cret",
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_shown(address: str) -> None:
    message = error_of(address)
    assert ADDRESS in message
    assert "$TUNE_BISENET_STUDY" in message
    assert "s3cret" not in message


def test_the_variable_alone_names_the_database_of_a_new_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STUDY_VARIABLE, "postgresql://me:p%40ss@host/studies")
    options, mistyped = parse_options({"space": "around10", "data": "streets", "storage": str(tmp_path)})
    search = survey_search(options, mistyped, default_name="search")
    assert search.study
    assert search.study.database.url.password == "p@ss"
    assert search.config.study == search.study.database.shown == "postgresql://me@host/studies"


def test_the_password_comes_from_the_variable_that_holds_the_same_address() -> None:
    secret = ADDRESS.replace("me@", "me:p%40ss@")
    database = database_at(ADDRESS, secret=secret)
    assert database.url.password == "p@ss"
    assert database.shown == ADDRESS
    assert "p%40ss" not in repr(database)
    for other in (ADDRESS.replace("nosuch", "other"), ADDRESS.replace("me@", "you@")):
        assert database_at(other, secret=secret).url.password is None


@pytest.mark.parametrize("character", "@/#?: %")
def test_an_odd_password_is_used_or_refused_but_no_piece_of_it_is_ever_shown(character: str) -> None:
    for password in (f"p{character}s3cret", f"s3cret{character}", f"p{character}s3{character}cret"):
        for scheme in ("postgresql+psycopg", "postgresql+psycopg2"):  # the second driver is not installed
            bare = f"{scheme}://me@nosuch.invalid/studies"
            message = error_of(bare, secret=f"{scheme}://me:{password}@nosuch.invalid/studies")
            assert not any(piece in message for piece in ("s3", "cret"))
            assert bare in message or "%40 for @" in message


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("studies", "--study"),
        ("oracle9://me@host/studies", "oracle9"),
        ("postgresql+psycopg2://me@host/studies", "psycopg2"),
        ("postgresql+psycopg://me:s3cret", "--study"),
        ("postgresql+psycopg://me@127.0.0.1:1/studies", "Connection refused"),
        ("sqlite:////nosuch/folder/mine.db", "unable to open database file"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, word: str) -> None:
    message = error_of(url)
    assert word in message
    assert "s3cret" not in message


def test_tables_of_another_version_of_optuna_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    optuna.create_study(storage=url, study_name="search")
    with closing(sqlite3.connect(tmp_path / "old.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.execute("UPDATE version_info SET library_version = '2.6.0'")
        database.commit()
    assert "optuna storage upgrade" in error_of(url)
