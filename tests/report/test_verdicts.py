"""Verdicts of a whole table: what it costs to know, what sets rows apart, how likely expectations are confirmed."""

import math
import shlex

import numpy as np
import pytest
from expecting import R01, ROWS, claim, gain_claim, gaining, row, trial, trials
from scipy import stats
from statsmodels.stats.power import TTestPower

from benchmarks.false_positives import judge_searches, num_false
from search_spaces.runs10 import SPACE
from tune_bisenet.config import SGD, AdamW, Augment, Expect, Run
from tune_bisenet.report.claims import ASSUMED_SD, Claim, SampleSize, confounded_rows, differences
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import ALPHA, holm, seeds_for_power
from tune_bisenet.report.verdicts import (
    Power,
    holm_in_bulk,
    judge,
    powers,
)
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs

DATA = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))


def seeds_needed(found: Claim) -> SampleSize:
    assert found.sample_size
    return found.sample_size


@pytest.mark.parametrize(
    ("gains", "effect_size"),
    [
        ([0.0, 0.5, 1.0], 0.75 / 0.5),  # the middle of what is expected, at the sd measured
        ([1.0, 2.0, 6.0], 3 / math.sqrt(7)),  # the mean measured, which is more
    ],
)
def test_seeds_needed_agree_with_statsmodels(gains: list[float], effect_size: float) -> None:
    total = math.ceil(TTestPower().solve_power(effect_size=effect_size, alpha=0.05, power=0.8))
    needed = seeds_needed(gain_claim(0.5, 1, gains))
    assert (needed.seeds, needed.is_assumed, needed.is_capped) == (total - 3, False, False)


def test_seeds_needed_count_holms_correction() -> None:
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(9)]
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    total = math.ceil(TTestPower().solve_power(effect_size=0.75 / 0.5, alpha=0.05 / 10, power=0.8))
    assert seeds_needed(claim(judge([*gaining(0.5, 1), *others], measured))).seeds == total - 3


def test_seeds_of_the_row_and_of_its_reference_are_paid() -> None:
    # Two epochs of 36 s are 0.02 h; a row and its reference at a quarter of a GPU each: 0.01 h a seed.
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    judgement = judge(gaining(0.5, 1), measured, devices_per_trial=0.25)
    needed = seeds_needed(claim(judgement))
    assert judgement.hours_per_seed == pytest.approx({"r01": 0.005, "x": 0.005})
    assert needed.hours == pytest.approx(needed.seeds * 0.01)


def test_one_seed_plans_with_an_assumed_spread() -> None:
    # 0.5 / 0.5 at alpha 0.05 needs 10 pairs; one is there.
    needed = seeds_needed(gain_claim(0.5, 0.5, [3.0]))
    assert (needed.seeds, needed.spread, needed.is_assumed) == (9, 0.5, True)


def test_more_than_a_hundred_seeds_are_not_counted() -> None:
    needed = seeds_needed(gain_claim(0.1, 0.1, [-3, 0, 3]))
    assert (needed.seeds, needed.is_capped) == (100, True)


def test_the_next_command_runs_undecided_rows_and_their_references_at_new_seeds() -> None:
    rows = [
        *gaining(0.5, 1),
        row("sure", Expect(gain=(0.5, 1), over="r01")),
        row("hopeless", Expect(gain=(0.01, 0.01), over="r01")),
    ]
    measured = [
        *trials("r01", [55, 56, 57]),
        *trials("x", [55.3, 56.75, 58.2]),
        *trials("sure", [55.79, 56.8, 57.81]),
        *trials("hopeless", [52, 56, 60]),
    ]
    judgement = judge(rows, measured)
    more = judgement.more_seeds
    assert claim(judgement, "sure").verdict == "confirmed"
    assert more
    assert more.runs == ("r01", "x")
    assert more.seeds == tuple(range(3, 3 + seeds_needed(claim(judgement)).seeds))
    assert more.hours == pytest.approx(len(more.seeds) * 0.04)
    command = judgement.next_command(space="my space", name="n", storage="s3://b")
    assert command
    assert shlex.split(command) == [
        *("python", "-m", "tune_bisenet.run", "--space", "my space", "--name", "n", "--add"),
        *("--runs", "r01,x", "--seeds", ",".join(map(str, more.seeds)), "--storage", "s3://b"),
    ]


@pytest.mark.parametrize("proxy", [False, True])
def test_of_the_ten_rows_only_r09_differs_from_r01_in_more_than_one_setting(proxy: bool) -> None:
    rows = resolve_runs(SPACE.runs, RowOverrides(seeds=(0, 1), num_epochs=50, proxy=proxy), DATA)
    confounded = confounded_rows({row.name: row for row in rows})
    assert [name for name, settings in confounded.items() if settings] == ["r09"]
    assert confounded["r09"].startswith("optimizer kind sgd → adamw, optimizer lr 0.01 → 0.001")


def test_differences_are_leaf_by_leaf_without_name_seed_and_expectation() -> None:
    changed = R01.model_copy(update={"name": "y", "seed": 3, "expect": Expect(miou=(1, 2))})
    assert differences(changed, R01) == {}
    optimizer = SGD(lr=0.01, momentum=0.8, weight_decay=1e-4)
    changed = changed.model_copy(update={"optimizer": optimizer, "augment": Augment(flip=0.0)})
    assert differences(changed, R01) == {"optimizer momentum": "0.9 → 0.8", "augment flip": "0.5 → 0"}
    assert differences(ROWS["r05"], R01) == {"loss lovasz_after": "none → 35"}


def test_a_setting_that_comes_with_its_kind_does_not_confound() -> None:
    adamw = R01.model_copy(update={"name": "x", "optimizer": AdamW(lr=0.01, weight_decay=1e-4)})
    assert differences(adamw, R01).keys() == {"optimizer kind", "optimizer momentum"}
    adamw = adamw.model_copy(update={"expect": Expect(gain=(0, 1), over="r01")})
    assert confounded_rows({"r01": R01, "x": adamw})["x"] == ""


def test_the_ten_rows_make_thirteen_claims_nine_on_a_proxy() -> None:
    kinds = [(claim.run, claim.kind) for claim in judge(SPACE.runs, []).claims]
    assert kinds[:3] == [("r01", "miou"), ("r02", "miou"), ("r02", "sooner")]
    assert judge(SPACE.runs, []).family == len(kinds) == 13
    assert judge(SPACE.runs, [], proxy=True).family == 9


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_ten_equal_rows_are_falsely_confirmed_in_no_more_than_a_twentieth_of_searches(num_seeds: int) -> None:
    judgements = judge_searches(2000, num_seeds, proxy=False, gains={})
    # At a true rate of 5 % the upper end of a 95 % interval would lie above 5 % almost always.
    assert stats.binomtest(num_false(judgements), 2000).proportion_ci(0.95).high < 0.05


EXPECTING = [run for run in SPACE.runs if run.expect and not run.expect.sooner_than]
"""Seven rows of the table: r01, which expects a level, and six that expect a gain over it."""


def powers_of(rows: list[Run], num_seeds: int, *, proxy: bool = False) -> dict[str, Power]:
    seeds = {row.name: range(num_seeds) for row in rows}
    return {power.claim.run: power for power in powers(rows, seeds, proxy=proxy)}


def searched(rng: np.random.Generator, num_seeds: int) -> list[ReportedTrial]:
    """Trials of a search in which every expectation holds at its middle."""
    sd = ASSUMED_SD / math.sqrt(2)
    shared = rng.normal(0, sd, num_seeds)
    return [
        trial(run.name, seed, [56.0 + sum(run.expect.gain or (0, 0)) / 2 + shared[seed] + rng.normal(0, sd)])
        for run in EXPECTING
        if run.expect
        for seed in range(num_seeds)
    ]


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_powers_are_how_often_the_verdicts_confirm(num_seeds: int) -> None:
    rng = np.random.default_rng(num_seeds)
    number = 400
    judgements = [judge(EXPECTING, searched(rng, num_seeds)) for _ in range(number)]
    for name, power in powers_of(EXPECTING, num_seeds).items():
        confirmed = [claim.verdict == "confirmed" for j in judgements for claim in j.claims if claim.run == name]
        assert power.share is not None
        error = math.sqrt(power.share * (1 - power.share) / number) + 0.01
        assert sum(confirmed) / number == pytest.approx(power.share, abs=4 * error), name


def test_a_single_claim_has_the_power_of_the_t_test() -> None:
    """From the noncentral t distribution; the interval reaches what is expected all but always."""
    for gain, num_seeds in ((0.5, 5), (1.0, 3), (0.4, 20)):
        freedom, shift = num_seeds - 1, gain / ASSUMED_SD * math.sqrt(num_seeds)
        exact = 1 - stats.nct.cdf(stats.t.ppf(1 - ALPHA / 2, freedom), freedom, shift)
        found = powers_of(gaining(gain, gain), num_seeds)["x"]
        # A gain that is found too small for its expectation is refuted: at most 2.5 % of the searches.
        assert found.share == pytest.approx(exact, abs=0.025 + 3 * math.sqrt(0.25 / 2000))
        assert found.share <= exact + 3 * math.sqrt(0.25 / 2000)


def test_the_seeds_for_a_power_are_those_of_the_report() -> None:
    found = powers_of(gaining(0.5, 0.5), 1)["x"]
    exact = seeds_for_power(effect=0.5, sd=ASSUMED_SD, alpha=ALPHA, most=100)
    assert found.seeds_for_80 is not None
    assert exact is not None
    assert abs(found.seeds_for_80 - exact) <= 1
    hopeless = powers_of(gaining(0.01, 0.01), 3)["x"]
    assert hopeless.seeds_for_80 is None
    assert hopeless.share == pytest.approx(0, abs=0.05)


def test_one_seed_confirms_nothing_and_more_confirm_more() -> None:
    shares = [powers_of(EXPECTING, number)["r06"].share for number in (1, 2, 4, 8, 16)]
    assert shares[0] == 0
    assert shares == sorted(shares, key=lambda share: share or 0)
    assert shares[-1] == pytest.approx(1, abs=0.01)


def test_an_expectation_without_a_number_has_no_power_but_counts_in_the_family() -> None:
    found = powers(SPACE.runs, {run.name: (0, 1, 2) for run in SPACE.runs}, proxy=False)
    sooner = [power for power in found if power.claim.kind == "sooner"]
    assert [power.claim.run for power in sooner] == ["r02", "r03", "r09"]
    assert all(power.share is None and power.seeds_for_80 is None for power in sooner)
    alone = powers_of(EXPECTING, 3)
    gains = {power.claim.run: power.share or 0 for power in found if power.claim.kind == "gain"}
    assert all(gains[name] <= (power.share or 0) for name, power in alone.items() if power.claim.kind == "gain")


def test_on_a_proxy_a_level_has_no_power() -> None:
    assert "r01" in powers_of(EXPECTING, 3)
    assert "r01" not in powers_of(EXPECTING, 3, proxy=True)
    assert powers([row.model_copy(update={"expect": None}) for row in EXPECTING], {}, proxy=False) == []


def test_only_seeds_of_both_rows_count() -> None:
    rows = gaining(1, 2)
    (power,) = powers(rows, {"r01": (0, 1), "x": (1, 2, 3)}, proxy=False)
    assert (power.seeds, power.share) == (1, 0)
    (lonely,) = powers(rows[1:], {"x": (0, 1, 2)}, proxy=False)
    assert lonely.seeds == 0


def test_a_table_of_a_thousand_rows_is_judged_in_seconds() -> None:
    rows = [R01, *(row(f"x{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(1000))]
    found = powers(rows, {row.name: (0, 1, 2) for row in rows}, proxy=True)
    assert len(found) == 1000
    assert found[0].share == 0, "nothing survives Holm's correction over so many claims and so few seeds"
    assert found[-1].share is None


def test_holm_in_bulk_is_holm_one_by_one() -> None:
    p = np.random.default_rng(0).uniform(size=(50, 6))
    for line, adjusted in zip(p, holm_in_bulk(p, family=8), strict=True):
        expected = holm([*line.tolist(), None, None])[:6]
        assert np.minimum(adjusted, 1).tolist() == pytest.approx(expected)
