"""Where a search's study is kept: any database that Optuna can use, or an SQLite file in the search's own folder.

SQLite needs a disk. Of a search in object storage this machine keeps the file, and a copy of it lies in the folder.
"""

import logging
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from optuna.storages import BaseStorage

from tune_bisenet.config import fingerprint
from tune_bisenet.records import STUDY
from tune_bisenet.storage import HIDDEN, Storage, is_ambiguous, one_line, redact
from tune_bisenet.study.study import DATABASE_ERRORS, exists, open_storage

log = logging.getLogger(__name__)


class StudyError(ValueError):
    """A study's database cannot be used."""


@dataclass(frozen=True, kw_only=True)
class StudyPlace:
    """A study's database. `url` holds its password; `shown` does not."""

    url: str
    folder: Storage
    is_own: bool
    """Whether it is a file of the search's own."""
    file: Path | None
    """This machine's file of a study whose copy lies in object storage."""

    @property
    def shown(self) -> str:
        """How a person is told of it."""
        return redact(self.url)

    def check(self, name: str, *, is_new: bool) -> None:
        """ValueError if a database of the user's does not answer, or has a study of that name that is not ours.

        A file of the search's own is not touched: it is made when the search is.
        """
        if self.is_own:
            return
        if is_ambiguous(self.url):
            raise StudyError(
                "--study: write the characters @ / ? # and blanks in a password percent-encoded, as in %40 for @."
            )
        with self._explained():
            is_there = exists(open_storage(self.url), name)
        if is_new and is_there:
            raise StudyError(
                f"--study {self.shown}: there is a study {name} already. Take another --name, or another database."
            )

    def open(self) -> BaseStorage:
        """Optuna's storage there. In object storage it begins with the copy, which may be older than the trials."""
        if self.file is not None:
            content = self.folder.read(STUDY)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.unlink(missing_ok=True)
            if content is not None:
                self.file.write_bytes(content)
        with self._explained():
            return open_storage(self.url)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # its text may hold a piece of a password
            raise StudyError(f"the study in {self.shown} cannot be used: its port is no number.") from None
        except (*DATABASE_ERRORS, RuntimeError) as error:  # RuntimeError for tables of another version of Optuna
            if self.is_own:
                remedy = f"Remove the file {STUDY}: it is made anew from the folders of the trials."
            else:
                remedy = "The address is SQLAlchemy's, as in postgresql://user:password@host/database."
            raise StudyError(f"the study in {self.shown} cannot be used: {one_line(error)}. {remedy}") from None

    def snapshot(self) -> None:
        """Bring the copy in object storage up to date. One that fails costs nothing: the next has all of it."""
        if self.file is None:
            return
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / STUDY
            with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            try:
                self.folder.hurried().write(STUDY, copy.read_bytes())
            except OSError as error:
                log.warning("the study is not copied to %s before the next trial ends: %s", self.folder.uri, error)


def study_place(folder: Storage, *, url: str | None, cache_dir: Path) -> StudyPlace:
    """The place at `url`, or the file in `folder`. `url` may not have its password hidden."""
    assert url is None or HIDDEN not in url, "a password was hidden before it was used"
    if url is not None:
        return StudyPlace(url=url, folder=folder, is_own=False, file=None)
    if folder.local_path is not None:
        return StudyPlace(url=f"sqlite:///{folder.local_path / STUDY}", folder=folder, is_own=True, file=None)
    file = cache_dir / "studies" / f"{fingerprint(folder.uri)}.db"
    return StudyPlace(url=f"sqlite:///{file}", folder=folder, is_own=True, file=file)
