"""The best of a study on fresh seeds: paired, and without the seed that it was chosen by."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from searches import write_study

from tune_bisenet.report.confirmed import best_words, confirmed
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.samples import samples
from tune_bisenet.report.views import View


def search_of(tmp_path: Path, **options: object) -> SearchRecord:
    return read_search(write_study(tmp_path, **options))  # type: ignore[arg-type]


def view_of(search: SearchRecord) -> View:
    (view,) = confirmed(search, samples(search))
    return view


def test_without_fresh_seeds_there_is_nothing_to_show(tmp_path: Path) -> None:
    search = search_of(tmp_path)
    assert confirmed(search, samples(search)) == []


def test_gains_are_paired_by_fresh_seed(tmp_path: Path) -> None:
    view = view_of(search_of(tmp_path, fresh_seeds=3))
    best = view.columns[1]
    assert view.columns == ("fresh seed", best, "r01", "r02", "over r01", "over r02")
    lines = [[cell.text for cell in row] for row in view.rows]
    assert lines[0] == ["1", "50.60", "50.00", "50.10", "+0.60", "+0.50"]
    assert [line[0] for line in lines] == ["1", "2", "3", "mean", "95 % interval"]
    assert lines[3][4:] == ["+0.70", "+0.60"]


def test_the_interval_is_that_of_a_paired_t_test(tmp_path: Path) -> None:
    view = view_of(search_of(tmp_path, fresh_seeds=3))
    found = stats.ttest_rel([50.6, 50.7, 50.8], [50.0, 50.0, 50.0]).confidence_interval()
    assert view.rows[-1][4].text == f"{found.low:+.2f} to {found.high:+.2f}"
    assert "so t" in view.words
    assert "is better" in view.words


def test_one_fresh_seed_has_no_interval(tmp_path: Path) -> None:
    view = view_of(search_of(tmp_path, fresh_seeds=1))
    assert "one seed, no interval" in view.words
    assert "decides nothing yet" in view.words
    assert view.rows[-1][4].text == ""


def test_a_gain_whose_interval_holds_zero_is_not_called_better(tmp_path: Path) -> None:
    view = view_of(search_of(tmp_path, fresh_seeds=2, gain_on_fresh=0.25))
    assert "so it may be either" in view.words


def test_what_the_chosen_value_lost_is_told(tmp_path: Path) -> None:
    search = search_of(tmp_path, fresh_seeds=3)
    view = view_of(search)
    chosen = next(one for one in samples(search) if one.trial == view.columns[1])
    mean, sd = 50.7, statistics.stdev([50.6, 50.7, 50.8])
    assert f"stood at {chosen.miou:.2f} %, on fresh seeds at {mean:.2f} ± {sd:.2f} %" in view.words


@pytest.mark.parametrize(
    ("status", "words"), [("running", "Not ended: r01-s3."), ("failed", "Failed, left out: r01-s3.")]
)
def test_a_fresh_seed_that_is_not_there_is_told(tmp_path: Path, status: str, words: str) -> None:
    search = search_of(tmp_path, fresh_seeds=3)
    record = search.trials["r01-s3"]
    changed = replace(record.standing, status=status)  # type: ignore[arg-type]
    broken = replace(search, trials=search.trials | {"r01-s3": replace(record, standing=changed)})
    assert words in view_of(broken).words


def test_the_best_stands_beside_the_best_declared_row(tmp_path: Path) -> None:
    of = samples(search_of(tmp_path))
    words = best_words(of, num_trials=23)
    assert "the best of 23 trials" in words
    assert "points over r0" in words
    assert "No trial has an mIoU yet." in best_words([], num_trials=0)


def test_a_declared_row_can_be_the_best(tmp_path: Path) -> None:
    of = samples(search_of(tmp_path, trials=2))
    assert "It is a declared row" in best_words(of, num_trials=2)
