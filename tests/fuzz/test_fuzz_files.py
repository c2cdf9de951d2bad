"""Whatever a search's files hold: the report and --resume read it, leave it out with a note, or refuse it in words."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.fuzz import damaged_json, inputs
from helpers.searches import move_into
from hypothesis import given
from hypothesis import strategies as st

from tune_bisenet.options import InputError, parse_options
from tune_bisenet.records import DamagedFileError
from tune_bisenet.report.page import Report
from tune_bisenet.report.read import read_search
from tune_bisenet.search.prepare import survey_search
from tune_bisenet.storage import Storage

FIXTURES = Path(__file__).parents[1] / "fixtures"
GRID = ("search.json", "trials.json", "r01-s0/trial.json", "r07-s1/trial.json")
SAMPLED = ("search.json", "trials.json", "known.json", "r02/trial.json", "t0005/trial.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("searches")
    shutil.copytree(FIXTURES, place / "results")
    with pytest.MonkeyPatch.context() as monkeypatch:
        move_into(place, monkeypatch)
        yield place


@st.composite
def damages(draw: st.DrawFn, search: str, names: tuple[str, ...]) -> tuple[str, bytes]:
    """Return a file of a search and what it holds now; often with a checksum that is right all the same."""
    name = draw(st.sampled_from(names))
    content = draw(damaged_json((FIXTURES / search / name).read_bytes()))
    if draw(st.booleans()):
        try:
            document = json.loads(content)
            document.pop("checksum")
            text = json.dumps(document, sort_keys=True).encode()
            document["checksum"] = hashlib.sha256(text).hexdigest()[:16]
            content = json.dumps(document).encode()
        except (ValueError, AttributeError, KeyError, TypeError):
            pass
    return name, content


@contextmanager
def holding(search: Path, damage: tuple[str, bytes]) -> Iterator[None]:
    """Let a file hold something else meanwhile."""
    name, content = damage
    path = search / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def report(search: Path, damage: tuple[str, bytes], *, writes: bool) -> None:
    """Read a damaged search, and write its page where that is wanted."""
    with holding(search, damage):
        folder = Storage.at(str(search))
        try:
            if writes:
                Report.of(folder).write(Storage.at(str(search.parent / "page")))
            else:
                read_search(folder)
        except DamagedFileError as error:
            assert damage[0] == "search.json"
            assert "search.json is damaged: " in str(error)


@inputs(60)
@given(damage=damages("grid", GRID))
def test_a_damaged_grid_is_read(place: Path, damage: tuple[str, bytes]) -> None:
    report(place / "results" / "grid", damage, writes=False)


@inputs(20)
@given(damage=damages("sampled", SAMPLED))
def test_a_damaged_sampled_search_is_read(place: Path, damage: tuple[str, bytes]) -> None:
    report(place / "results" / "sampled", damage, writes=False)


@inputs(7)
@given(damage=damages("grid", GRID))
def test_the_report_of_a_damaged_grid_is_written(place: Path, damage: tuple[str, bytes]) -> None:
    report(place / "results" / "grid", damage, writes=True)


@inputs(1)
@given(damage=damages("sampled", SAMPLED))
def test_the_report_of_a_damaged_sampled_search_is_written(place: Path, damage: tuple[str, bytes]) -> None:
    report(place / "results" / "sampled", damage, writes=True)


def check_resumable(place: Path, name: str, damage: tuple[str, bytes]) -> None:
    options, _ = parse_options({"resume": True, "name": name, "storage": str(place / "results"), "plan": True})
    with holding(place / "results" / name, damage):
        try:
            search = survey_search(options, {}, default_name="none")
        except InputError as error:
            assert error.problems
        else:
            assert search.name == name
            assert search.earlier


@inputs(113)
@given(damage=damages("grid", GRID))
def test_a_damaged_grid_is_resumed_or_refused(place: Path, damage: tuple[str, bytes]) -> None:
    check_resumable(place, "grid", damage)


@inputs(6)
@given(damage=damages("sampled", SAMPLED))
def test_a_damaged_sampled_search_is_resumed_or_refused(place: Path, damage: tuple[str, bytes]) -> None:
    check_resumable(place, "sampled", damage)
