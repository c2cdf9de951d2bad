"""A driver of a sampled search killed anywhere: what the next one makes of it equals a search that nothing happened to.

`helpers/light_search.py` is the search: everything that remembers is real, only training is arithmetic.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs
import pytest
from helpers.light_search import (
    Search,
    assert_kills_change_nothing,
    assert_whole,
    close_connections,
    earlier_trials,
    make_place,
    results,
    trials_in,
)
from optuna.trial import TrialState as OptunaState
from sqlalchemy import Engine, event

from tune_bisenet.config import Sampler
from tune_bisenet.storage import Storage

pytestmark = pytest.mark.timeout(2700)

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


class Watched(pyarrow.fs.LocalFileSystem):  # type: ignore[misc]
    """A file system that calls `before_change` before each change."""

    before_change: ClassVar[Callable[[], None]]

    def create_dir(self, *arguments: Any, **named: Any) -> Any:
        type(self).before_change()
        return super().create_dir(*arguments, **named)

    def open_output_stream(self, *arguments: Any, **named: Any) -> Any:
        type(self).before_change()
        return super().open_output_stream(*arguments, **named)

    def move(self, *arguments: Any) -> Any:
        type(self).before_change()
        return super().move(*arguments)

    def delete_file(self, *arguments: Any) -> Any:
        type(self).before_change()
        return super().delete_file(*arguments)


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

    Watched.before_change = look
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
        replace(search, folder=replace(search.folder, filesystem=Watched())).run()
    return states


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "seed", "num_known"),
    [
        ("tpe", 0, 11),  # enough for it to draw from what it knows
        ("random", 6, 1),  # its first draw makes no run
    ],
)
def test_a_driver_killed_before_any_change_on_disk_changes_no_result(
    place: Path, sampler: Sampler, seed: int, num_known: int
) -> None:
    folder = Storage.at(str(place / "undisturbed"))
    known = earlier_trials(num_known)
    # Its clock stands still: however long a write takes here, none of the next ones is left out.
    search = Search(folder=folder, limit=3, sampler=sampler, seed=seed, known=known, clock=lambda: 0.0)
    states = states_of_disk(search, place / "states")
    trials = trials_in(search)
    undisturbed = results(trials)
    assert_whole(search, trials)
    assert len(states) > 80
    assert (OptunaState.FAIL in {trial.state for trial in trials}) == (sampler == "random")
    for state in states:
        resumed = replace(search, folder=Storage.at(str(state)))
        resumed.run()
        trials = trials_in(resumed)
        assert results(trials) == undisturbed, f"killed before change {state.name}"
        assert_whole(resumed, trials)
        shutil.rmtree(state)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_drivers_killed_at_any_moment_again_and_again_change_no_result(place: Path, sampler: Sampler) -> None:
    undisturbed = Search(
        folder=Storage.at(str(place / "undisturbed")), limit=12, sampler=sampler, known=earlier_trials(4)
    )
    undisturbed.run()
    assert_kills_change_nothing(
        lambda seed: replace(undisturbed, folder=Storage.at(str(place / str(seed)))), undisturbed=undisturbed
    )


def test_of_several_trials_at_once_none_is_lost_and_none_is_trained_twice(place: Path) -> None:
    known = earlier_trials(3)
    assert_kills_change_nothing(
        lambda seed: Search(folder=Storage.at(str(place / str(seed))), limit=14, at_once=3, known=known)
    )
