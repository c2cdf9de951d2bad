"""Fresh seeds: the best sampled run, the best row and the baseline, by seeds that none of them was chosen by."""

from collections.abc import Sequence
from dataclasses import replace

from light_space import row

from tune_bisenet.config import Run
from tune_bisenet.records import Known, Origin, Status, TrialSpec, TrialState
from tune_bisenet.study.confirm import fresh_runs

Trial = tuple[TrialSpec, TrialState]


def trial(
    name: str, miou: float | None, *, origin: Origin = "sampled", status: Status = "finished", seed: int = 0
) -> Trial:
    run = row(name, 0.01).model_copy(update={"seed": seed})
    one = TrialSpec(trial=name, run=run, origin=origin, number=None, params={}, distributions={})
    return one, TrialState(trial=name, run=name, seed=seed, num_epochs=3, status=status, best_miou=miou)


def known(one: Trial) -> Known:
    return Known(suggested=one[0], standing=one[1], epochs=(), source=f"/earlier/{one[0].trial}")


def fresh(
    trials: Sequence[Trial], *, earlier: Sequence[Trial] = (), baseline: str | None = "r01", count: int = 2
) -> list[tuple[str, int]]:
    rows: dict[str, Run] = {name: row(name, 0.01) for name in ("r01", "r02")}
    runs = fresh_runs(
        {one.trial: one for one, _standing in trials},
        [standing for _one, standing in trials],
        [known(one) for one in earlier],
        rows=rows,
        baseline=baseline,
        count=count,
    )
    return [(run.name, run.seed) for run in runs]


R01 = trial("r01", 50.0, origin="row")
R02 = trial("r02", 52.0, origin="row")
T02 = trial("t02", 55.0)
T03 = trial("t03", 54.0)


def test_the_best_sampled_run_the_baseline_and_the_best_row_get_the_same_fresh_seeds() -> None:
    assert fresh([R01, R02, T02, T03]) == [("t02", 1), ("r01", 1), ("r02", 1), ("t02", 2), ("r01", 2), ("r02", 2)]


def test_a_baseline_that_is_the_best_row_is_trained_once_a_seed() -> None:
    assert fresh([trial("r01", 53.0, origin="row"), R02, T02], count=1) == [("t02", 1), ("r01", 1)]


def test_a_seed_that_anything_was_chosen_by_is_no_fresh_one() -> None:
    trials = [replace_seed(one, 4) for one in (R01, T02)]
    assert fresh(trials, count=1) == [("t02", 5), ("r01", 5)]
    assert fresh(trials, earlier=[replace_seed(R02, 9)], count=1)[0] == ("t02", 10)


def replace_seed(one: Trial, seed: int) -> Trial:
    return replace(one[0], run=one[0].run.model_copy(update={"seed": seed})), replace(one[1], seed=seed)


def test_fresh_seeds_do_not_count_when_the_best_is_chosen_again() -> None:
    confirmed = trial("t03-s1", 60.0, origin="confirm", seed=1)
    assert fresh([R01, R02, T02, T03, confirmed]) == fresh([R01, R02, T02, T03])


def test_what_was_stopped_or_failed_is_not_the_best() -> None:
    trials = [R01, T03, trial("t04", 70.0, status="stopped"), trial("t05", None, status="failed")]
    assert fresh(trials, count=1) == [("t03", 1), ("r01", 1)]


def test_without_a_sampled_run_that_was_trained_to_its_end_there_is_nothing_to_confirm() -> None:
    assert fresh([R01, R02]) == []
    assert fresh([R01, trial("t04", 70.0, status="diverged")]) == []


def test_without_a_baseline_or_rows_the_best_is_trained_alone() -> None:
    assert fresh([T02, T03], baseline=None, count=1) == [("t02", 1)]


def test_the_best_may_be_of_the_earlier_search() -> None:
    assert fresh([R01, T03], earlier=[T02], count=1) == [("t02", 1), ("r01", 1)]
