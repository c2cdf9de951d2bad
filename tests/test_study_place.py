"""Where a study is kept: a file of the search's own, a copy in object storage, or a database of the user's."""

import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pyarrow.fs
import pytest
from light_search import close_connections
from object_store import object_store

from tune_bisenet.records import STUDY
from tune_bisenet.storage import Storage
from tune_bisenet.study.place import StudyError, StudyPlace, study_place
from tune_bisenet.study.study import exists

_closed = pytest.fixture(autouse=True)(close_connections)


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    (tmp_path / "search").mkdir()
    return Storage.at(str(tmp_path / "search"))


@pytest.fixture
def bucket(tmp_path: Path) -> Storage:
    (tmp_path / "bucket" / "search").mkdir(parents=True)
    filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    return Storage(filesystem, "bucket/search", "s3://bucket/search")


def at(url: str, folder: Storage) -> StudyPlace:
    return study_place(folder, url=url, cache_dir=Path(folder.path) / "cache")


def said_of(url: str, folder: Storage) -> str:
    with pytest.raises(StudyError) as refused:
        at(url, folder).check("search", is_new=True)
    return str(refused.value)


# --- of the search's own --------------------------------------------------------------------------------------------


def test_on_a_disk_it_is_a_file_in_the_folder_that_is_not_there_before_the_search(
    folder: Storage, tmp_path: Path
) -> None:
    place = study_place(folder, url=None, cache_dir=tmp_path / "cache")
    place.check("search", is_new=True)
    place.check("search", is_new=False)
    assert not folder.exists(STUDY)
    optuna.create_study(storage=place.open(), study_name="search")
    place.snapshot()
    assert place.is_own
    assert [path.name for path in (tmp_path / "search").iterdir()] == [STUDY]
    assert optuna.load_study(study_name="search", storage=f"sqlite:///{folder.path}/{STUDY}").trials == []


def test_in_object_storage_a_copy_lies_beside_the_trials(bucket: Storage, tmp_path: Path) -> None:
    place = study_place(bucket, url=None, cache_dir=tmp_path / "cache")
    study = optuna.create_study(storage=place.open(), study_name="search")
    study.tell(study.ask(), 1.0)
    assert not bucket.exists(STUDY)
    place.snapshot()
    study.tell(study.ask(), 2.0)  # since the copy: another machine goes on without it
    elsewhere = study_place(bucket, url=None, cache_dir=tmp_path / "elsewhere")
    copied = optuna.load_study(study_name="search", storage=elsewhere.open())
    assert [trial.value for trial in copied.trials] == [1.0]
    copied.tell(copied.ask(), 3.0)
    elsewhere.snapshot()
    back = optuna.load_study(study_name="search", storage=place.open())
    assert [trial.value for trial in back.trials] == [1.0, 3.0], "the copy is what counts, not what lay here"


def test_a_copy_that_fails_is_told_and_made_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with object_store() as store:
        folder = Storage.at(store.uri("search"))
        place = study_place(folder, url=None, cache_dir=tmp_path / "cache")
        study = optuna.create_study(storage=place.open(), study_name="search")
        study.tell(study.ask(), 1.0)
        store.go_away()
        place.snapshot()
        assert "the study is not copied to s3://bucket/search" in caplog.text
        store.come_back()
        assert folder.read(STUDY) is None
        place.snapshot()
        assert (folder.read(STUDY) or b"").startswith(b"SQLite")


def test_each_search_in_object_storage_has_a_file_of_its_own(bucket: Storage, tmp_path: Path) -> None:
    first, second = (study_place(bucket / name, url=None, cache_dir=tmp_path) for name in ("one", "two"))
    assert first.file != second.file
    assert study_place(bucket / "one", url=None, cache_dir=tmp_path) == first


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 500])
def test_a_damaged_file_is_named_with_its_remedy(folder: Storage, tmp_path: Path, content: bytes) -> None:
    folder.write(STUDY, content)
    with pytest.raises(StudyError, match=r"study\.db cannot be used: .*Remove the file study\.db: it is made anew"):
        study_place(folder, url=None, cache_dir=tmp_path).open()


# --- a database of the user's ---------------------------------------------------------------------------------------


def test_a_database_of_the_users_is_made_where_there_is_none(folder: Storage, tmp_path: Path) -> None:
    place = at(f"sqlite:///{tmp_path}/mine.db", folder)
    place.check("search", is_new=True)
    assert not place.is_own
    assert not exists(place.open(), "search")
    assert not folder.exists(STUDY)


def test_a_study_of_that_name_is_never_taken_over_by_a_new_search(folder: Storage, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/mine.db"
    optuna.create_study(storage=url, study_name="search")
    assert said_of(url, folder) == (
        f"--study {url}: there is a study search already. Take another --name, or another database."
    )
    at(url, folder).check("search", is_new=False)
    at(url, folder).check("another", is_new=True)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_database_that_does_not_answer_is_named_without_its_password(folder: Storage, is_new: bool) -> None:
    place = at("postgresql+psycopg://me:p%40ss%2Fw0rd@127.0.0.1:1/studies", folder)
    for attempt in (lambda: place.check("search", is_new=is_new), place.open):
        with pytest.raises(StudyError) as refused:
            attempt()
        said = str(refused.value)
        assert said.startswith("the study in postgresql+psycopg://me:***@127.0.0.1:1/studies cannot be used: ")
        assert "Connection refused" in said
        assert said.endswith("The address is SQLAlchemy's, as in postgresql://user:password@host/database.")
        assert not any(piece in said for piece in ("p%40ss", "p@ss", "w0rd"))


def test_a_host_that_does_not_exist_is_named_without_its_password(folder: Storage) -> None:
    said = said_of("postgresql+psycopg://me:p%40ss%2Fw0rd@nosuch.invalid/studies", folder)
    assert "nosuch.invalid" in said.partition("cannot be used")[2]
    assert "w0rd" not in said


@pytest.mark.parametrize("password", ["p@s3cret", "p/s3cret", "p#s3cret", "p?s3cret", "p s3cret"])
def test_a_password_that_can_be_read_in_two_ways_is_refused_without_a_piece_of_it(
    folder: Storage, password: str
) -> None:
    said = said_of(f"postgresql+psycopg://me:{password}@nosuch.invalid/studies", folder)
    assert "percent-encoded, as in %40 for @" in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("studies", "Could not parse SQLAlchemy URL"),
        ("oracle9://me:s3cret@host/studies", "oracle9"),
        ("postgresql+psycopg2://me:s3cret@host/studies", "psycopg2"),
        ("postgresql+psycopg://me:s3cret@host:port/studies", "its port is no number"),
        ("postgresql+psycopg://me:s3cret", "its port is no number"),
        ("sqlite:////nosuch/folder/mine.db", "unable to open database file"),
    ],
)
def test_an_address_that_is_none_is_refused(folder: Storage, url: str, words: str) -> None:
    said = said_of(url, folder)
    assert words in said
    assert "s3cret" not in said.removeprefix(f"the study in {url}")


def test_tables_of_another_version_of_optuna_are_refused(folder: Storage, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    optuna.create_study(storage=url, study_name="search")
    with closing(sqlite3.connect(tmp_path / "old.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.execute("UPDATE version_info SET library_version = '2.6.0'")
        database.commit()
    assert "optuna storage upgrade" in said_of(url, folder)
