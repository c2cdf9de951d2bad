"""How likely a promise is to be confirmed: as often as the verdicts themselves confirm it."""

import math

import numpy as np
import pytest
from rows import plain_epoch
from scipy import stats

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect, Run
from tune_bisenet.report.cost import ASSUMED_SD
from tune_bisenet.report.power import Power, powers
from tune_bisenet.report.statistics import ALPHA, holm, seeds_for_power
from tune_bisenet.report.verdicts import Measured, judge

NUM_EPOCHS = 1
ROWS = [run for run in SPACE.runs if run.expect and not run.expect.sooner_than]
"""Seven rows of the table: r01, which promises a level, and six that promise a gain over it."""


def of(rows: list[Run], num_seeds: int, *, proxy: bool = False) -> dict[str, Power]:
    seeds = {row.name: range(num_seeds) for row in rows}
    return {power.run: power for power in powers(rows, seeds, proxy=proxy)}


def promising(expect: Expect) -> list[Run]:
    bar, row = ROWS[:2]
    return [bar.model_copy(update={"expect": None}), row.model_copy(update={"expect": expect})]


def searched(rng: np.random.Generator, num_seeds: int) -> list[Measured]:
    """Trials of a search in which every promise holds at its middle."""
    sd = ASSUMED_SD / math.sqrt(2)
    shared = rng.normal(0, sd, num_seeds)
    return [
        Measured(
            trial=f"{row.name}-{seed}",
            run=row.name,
            seed=seed,
            status="finished",
            num_epochs=1,
            epochs=[plain_epoch(1, 56.0 + sum(row.expect.gain or (0, 0)) / 2 + shared[seed] + rng.normal(0, sd))],
        )
        for row in ROWS
        if row.expect
        for seed in range(num_seeds)
    ]


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_promises_are_confirmed_as_often_as_the_verdicts_confirm_them(num_seeds: int) -> None:
    rng = np.random.default_rng(num_seeds)
    number = 400
    judgements = [judge(ROWS, searched(rng, num_seeds)) for _ in range(number)]
    for name, power in of(ROWS, num_seeds).items():
        confirmed = [claim.verdict == "confirmed" for j in judgements for claim in j.claims if claim.run == name]
        assert power.share is not None
        error = math.sqrt(power.share * (1 - power.share) / number) + 0.01
        assert sum(confirmed) / number == pytest.approx(power.share, abs=4 * error), name


def test_a_single_promise_has_the_power_of_the_t_test() -> None:
    """From the noncentral t distribution; the interval reaches the promise all but always."""
    for gain, num_seeds in ((0.5, 5), (1.0, 3), (0.4, 20)):
        freedom, shift = num_seeds - 1, gain / ASSUMED_SD * math.sqrt(num_seeds)
        exact = 1 - stats.nct.cdf(stats.t.ppf(1 - ALPHA / 2, freedom), freedom, shift)
        found = of(promising(Expect(gain=(gain, gain), over="r01")), num_seeds)["r04"]
        # A gain that is found too small for its promise is refuted, not confirmed: at most 2.5 % of the searches.
        assert found.share == pytest.approx(exact, abs=0.025 + 3 * math.sqrt(0.25 / 2000))
        assert found.share <= exact + 3 * math.sqrt(0.25 / 2000)


def test_the_seeds_it_takes_are_those_of_the_report() -> None:
    found = of(promising(Expect(gain=(0.5, 0.5), over="r01")), 1)["r04"]
    exact = seeds_for_power(effect=0.5, sd=ASSUMED_SD, alpha=ALPHA, most=100)
    assert found.seeds_for_80 is not None
    assert exact is not None
    assert abs(found.seeds_for_80 - exact) <= 1


def test_one_seed_confirms_nothing_and_more_confirm_more() -> None:
    shares = [of(ROWS, number)["r06"].share for number in (1, 2, 4, 8, 16)]
    assert shares[0] == 0
    assert shares == sorted(shares, key=float)
    assert shares[-1] > 0.99


def test_a_promise_that_cannot_be_found_with_a_hundred_seeds_says_so() -> None:
    found = of(promising(Expect(gain=(0.01, 0.01), over="r01")), 3)["r04"]
    assert found.seeds_for_80 is None
    assert found.share is not None
    assert found.share < 0.05


def test_what_is_promised_without_a_number_has_no_power_but_counts_in_the_family() -> None:
    found = powers(SPACE.runs, {run.name: (0, 1, 2) for run in SPACE.runs}, proxy=False)
    sooner = [power for power in found if power.kind == "sooner"]
    assert [power.run for power in sooner] == ["r02", "r03", "r09"]
    assert all(power.share is None and power.seeds_for_80 is None for power in sooner)
    alone = powers(ROWS, {run.name: (0, 1, 2) for run in ROWS}, proxy=False)
    gains = {power.run: power.share for power in found if power.kind == "gain"}
    assert all(gains[power.run] <= power.share for power in alone if power.kind == "gain" and power.share is not None)


def test_on_a_proxy_a_level_is_not_judged() -> None:
    assert "r01" in of(ROWS, 3)
    assert "r01" not in of(ROWS, 3, proxy=True)


def test_only_seeds_of_both_rows_count() -> None:
    rows = promising(Expect(gain=(1, 2), over="r01"))
    (power,) = powers(rows, {"r01": (0, 1), "r04": (1, 2, 3)}, proxy=False)
    assert power.seeds == 1
    assert power.share == 0
    (lonely,) = powers(rows[1:], {"r04": (0, 1, 2)}, proxy=False)
    assert lonely.seeds == 0


def test_a_table_of_a_thousand_rows_is_judged_in_seconds() -> None:
    bar, gain = ROWS[:2]
    rows = [bar, *(gain.model_copy(update={"name": f"x{number}"}) for number in range(1000))]
    found = powers(rows, {row.name: (0, 1, 2) for row in rows}, proxy=True)
    assert len(found) == 1000
    assert found[0].share == 0, "nothing survives Holm's correction over so many claims and so few seeds"
    assert found[-1].share is None


def test_rows_without_promises_have_no_powers() -> None:
    assert powers([row.model_copy(update={"expect": None}) for row in ROWS], {}, proxy=False) == []


def test_holm_in_bulk_is_holm_one_by_one() -> None:
    from tune_bisenet.report.power import _holm

    p = np.random.default_rng(0).uniform(size=(50, 6))
    for line, adjusted in zip(p, _holm(p, family=8), strict=True):
        expected = holm([*line.tolist(), None, None])[:6]
        assert np.minimum(adjusted, 1).tolist() == pytest.approx(expected)
