"""A sampled search read back: its trials, what each is a point of, and what it knew; damage costs a note."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from searches import STUDY, cut, epochs, manifest, point, row, suggested, write_json, write_search, write_study

from tune_bisenet.records import EPOCHS, KNOWN, RUN, SEARCH
from tune_bisenet.report.judging import judge_search
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.samples import best_sample, floor_of, parameters, samples, shown_rows
from tune_bisenet.report.tables import files, tables
from tune_bisenet.storage import Storage


def search_of(tmp_path: Path, **options: object) -> SearchRecord:
    return read_search(write_study(tmp_path, **options))  # type: ignore[arg-type]


def test_a_grid_has_no_study(tmp_path: Path) -> None:
    search = read_search(write_search(tmp_path))
    assert search.study is None
    assert samples(search) == []
    assert shown_rows(search) == ["r01", "r02"]


def test_trials_are_learnt_from_their_folders_in_the_order_of_the_study(tmp_path: Path) -> None:
    search = search_of(tmp_path, trials=8, fresh_seeds=1)
    numbered = ["r01", "r02", "t0002", "t0003", "t0004", "t0005", "t0006", "t0007"]
    assert list(search.trials)[:8] == numbered
    assert {name[-3:] for name in list(search.trials)[8:]} == {"-s1"}
    assert search.notes == ()
    assert search.study
    assert (search.study.sampler, search.study.objectives) == ("tpe", ("miou",))
    assert search.study.suggested["t0002"].params == point(2)


def test_a_declared_row_that_has_not_begun_waits_before_the_fresh_seeds(tmp_path: Path) -> None:
    trials = {"r03": row("r03", 0).model_dump(mode="json")}
    names = list(search_of(tmp_path, trials=4, fresh_seeds=1).trials)
    folder = write_study(tmp_path, trials=4, fresh_seeds=1)
    write_json(folder, SEARCH, manifest(study=STUDY, trials=trials))
    assert list(read_search(folder).trials) == [*names[:4], "r03", *names[4:]]


def test_a_damaged_point_costs_its_trial_and_a_note(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=8)
    cut(folder / "t0004", RUN)
    search = read_search(folder)
    assert "t0004" not in search.trials
    assert [note for note in search.notes if note.startswith("t0004: run.json cannot be read")]


@pytest.mark.parametrize("change", [{"distributions": {}}, {"distributions": {"optimizer": "{}"}}, {"params": 3}])
def test_a_point_without_a_range_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write_study(tmp_path, trials=8)
    record = suggested("t0004", "sampled", number=4, params=point(4)).to_json()
    write_json(folder / "t0004", RUN, record | change)
    assert "t0004" not in read_search(folder).trials


def test_damaged_earlier_searches_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=8, known=3)
    cut(folder, KNOWN)
    search = read_search(folder)
    assert search.study
    assert search.study.known == ()
    assert [note for note in search.notes if note.startswith("known.json cannot be read")]


def test_an_older_manifest_has_neither_study_nor_limits(tmp_path: Path) -> None:
    manifest = read_search(write_search(tmp_path)).manifest
    assert (manifest.study, manifest.limits.trials, manifest.sessions[0].limit) == (None, None, None)


# --- points ---------------------------------------------------------------------------------------------------------


def test_earlier_searches_come_right_before_the_first_trial(tmp_path: Path) -> None:
    of = samples(search_of(tmp_path, trials=4, known=3))
    assert [one.number for one in of] == [0, 1, 2, 3, 4, 5, 6]
    assert [one.is_known for one in of] == [True] * 3 + [False] * 4
    assert of[0].trial == "earlier/t0000"


def test_fresh_seeds_are_no_points(tmp_path: Path) -> None:
    assert len(samples(search_of(tmp_path, trials=6, fresh_seeds=3))) == 6


def test_a_parameter_has_the_widest_range_and_all_choices(tmp_path: Path) -> None:
    found = {one.name: one for one in parameters(samples(search_of(tmp_path)))}
    assert (found["sgd_lr"].low, found["sgd_lr"].high, found["sgd_lr"].is_log) == (1e-3, 1e-1, True)
    assert found["accumulation"].choices == (1, 2, 4)
    assert found["sgd_lr"].place(0.01) == pytest.approx(-2)
    assert [words for _, words in found["sgd_lr"].ticks] == ["0.001", "0.01", "0.1"]


def test_the_best_is_one_that_went_to_its_end(tmp_path: Path) -> None:
    of = samples(search_of(tmp_path))
    best = best_sample(of)
    assert best
    assert best.miou == max(one.miou or 0 for one in of if one.is_complete)


def test_the_axis_does_not_bend_to_a_few_far_below(tmp_path: Path) -> None:
    of = samples(search_of(tmp_path, trials=8))
    mious = [50.0, 51.0, 52.0, 53.0, 50.5, 51.5, 52.5, 3.0]
    measured = [
        replace(one, standing=replace(one.standing, best_miou=miou)) for one, miou in zip(of, mious, strict=True)
    ]
    assert floor_of(measured) == pytest.approx(50.125 - 1.5 * (52.375 - 50.125))  # the quartiles
    assert floor_of(measured[:7]) == 50.0


def test_the_baseline_the_best_row_and_the_best_stand_out(tmp_path: Path) -> None:
    search = search_of(tmp_path)
    shown = shown_rows(search)
    assert "r01" in shown
    assert 5 <= len(shown) <= 7


# --- promises and tables --------------------------------------------------------------------------------------------


def test_only_declared_rows_are_judged(tmp_path: Path) -> None:
    search = search_of(tmp_path)
    assert [one.name for one in search.declared_rows] == ["r01", "r02"]
    assert {claim.run for claim in judge_search(search).claims} == {"r01", "r02"}


def test_a_row_that_was_chosen_is_judged_by_its_fresh_seeds_alone(tmp_path: Path) -> None:
    claims = {claim.run: claim for claim in judge_search(search_of(tmp_path, fresh_seeds=3)).claims}
    assert [pair.seed for pair in claims["r02"].pairs] == [1, 2, 3]
    assert [pair.seed for pair in claims["r01"].pairs] == [0, 1, 2, 3]


def test_the_table_of_parameters_has_every_trial(tmp_path: Path) -> None:
    search = search_of(tmp_path, trials=8, known=2, fresh_seeds=1, latency=True)
    lines = {line["trial"]: line for line in tables(search, judge_search(search))["params"] if not line["known_from"]}
    assert len(lines) == 11
    assert (lines["r01"]["origin"], lines["r01"]["number"], lines["r01"]["state"]) == ("row", 2, "finished")
    assert lines["r01"]["params_sgd_lr"] is None  # an AdamW
    assert lines["r01"]["params_adamw_lr"] == point(2)["adamw_lr"]
    assert lines["r01"]["latency_ms"] == pytest.approx(14.2)
    assert lines["r01-s1"]["number"] is None


def test_a_column_of_mixed_values_is_written_as_words(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=4)
    mixed = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": [1, "all", True]}})
    for number, value in enumerate([1, "all", True, 1]):
        one = suggested(f"t{number:04d}", "sampled", number=number, params={})
        record = one.to_json() | {"params": {"n": value}, "distributions": {"n": mixed}}
        (folder / one.trial).make()
        write_json(folder / one.trial, RUN, record)
    for name in ("r01", "r02"):
        (folder / name).delete(RUN)
    search = read_search(folder)
    lines = tables(search, judge_search(search))["params"]
    assert [line["params_n"] for line in lines] == ["1", "all", "True", "1"]
    assert dict(files({"params": lines}))["params.csv"].startswith(b'"trial"')


def test_what_was_changed_last_counts_learnt_trials(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=4)
    before = read_search(folder).changed
    write_json(folder / "t0003", EPOCHS, [epoch.to_json() for epoch in epochs(40)])
    assert read_search(folder).changed >= before


def test_a_folder_that_is_no_trials_is_none(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=4)
    Storage.at(f"{folder.path}/tables").make()
    assert not re.search("tables", " ".join([*read_search(folder).trials, *read_search(folder).notes]))
