"""A driver of a sampled search killed anywhere: what the next one makes of it equals a search that nothing happened to.

`tests/light_search.py` is the search: everything that remembers is real, only training is arithmetic.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from light_search import Search, assert_whole, earlier_trials, results, trials_in
from sqlalchemy import Engine, event

from tune_bisenet.storage import Storage

PLACE = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Memory: what is safe on it is safe from a process that dies, and thousands of commits take no time."""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where there is such."""
    place = tmp_path_factory.mktemp("kills")
    in_memory = Path(PLACE) / f"tb-{place.parent.name}-{place.name}" if PLACE else place
    in_memory.mkdir(exist_ok=True)
    yield in_memory
    shutil.rmtree(in_memory)


# --- at every place -------------------------------------------------------------------------------------------------


class Watched(Storage):
    """A folder that says before each change of a file that there is about to be one."""

    before_change: ClassVar[Callable[[], None]]

    def make(self) -> None:
        self.before_change()
        super().make()

    def _put(self, name: str, content: bytes) -> None:
        type(self).before_change()
        super()._put(name, content)

    def move(self, source: str, target: str) -> None:
        type(self).before_change()
        super().move(source, target)


@contextmanager
def before_each_change(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` before each change on disk: of a file, by a statement outside a transaction, by a commit."""
    changed: set[int] = set()

    def before_statement(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        kind = statement.split(maxsplit=1)[0].upper()
        if kind == "CREATE":
            look()
        elif kind not in ("SELECT", "PRAGMA"):
            changed.add(id(connection))

    def before_commit(connection: Any) -> None:
        if id(connection) in changed:
            changed.discard(id(connection))
            look()

    Watched.before_change = staticmethod(look)
    event.listen(Engine, "before_cursor_execute", before_statement)
    event.listen(Engine, "commit", before_commit)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", before_statement)
        event.remove(Engine, "commit", before_commit)


def states_of_disk(search: Search, into: Path) -> list[Path]:
    """Run the search; copies of its folder as a driver would have left it that was killed before any of its changes."""
    states: list[Path] = []

    def keep() -> None:
        states.append(into / str(len(states)))
        if Path(search.folder.path).exists():
            shutil.copytree(search.folder.path, states[-1])

    with before_each_change(keep):
        replace(search, folder=Watched(search.folder.filesystem, search.folder.path, search.folder.uri)).run()
    return states


@pytest.mark.slow
def test_a_driver_killed_before_any_change_on_disk_changes_no_result(place: Path) -> None:
    search = Search(folder=Storage.at(str(place / "undisturbed")), limit=4, known=earlier_trials(11))
    states = states_of_disk(search, place / "states")
    undisturbed = results(trials_in(search))
    assert_whole(search, trials_in(search))
    assert len(states) > 150
    assert {name[0] for name in undisturbed} == {"e", "a", "b", "t"}
    for state in states:
        resumed = replace(search, folder=Storage.at(str(state)))
        resumed.run()
        trials = trials_in(resumed)
        assert results(trials) == undisturbed, f"killed before change {state.name}"
        assert_whole(resumed, trials)
        shutil.rmtree(state)
