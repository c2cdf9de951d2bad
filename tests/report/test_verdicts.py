"""Verdicts of a whole table: what it costs to know, what sets rows apart, how likely expectations are shown."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from expecting import R01, ROWS, claim, gain_claim, gaining, row, trial, trials
from scipy import stats
from statsmodels.stats.power import TTestPower

from benchmarks.verdicts import ALL_CLAIMS, CLAIMS, NAMES, NOISES, draw_cell, false_statements, judge_searches
from search_spaces.runs10 import SPACE
from tune_bisenet.config import SGD, AdamW, Augment, Expect, Run
from tune_bisenet.report.claims import Claim, SampleSize, confounded_rows, differences
from tune_bisenet.report.power import Power, expected_trials, judge_at_looks, powers
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import strictness
from tune_bisenet.report.verdicts import ASSUMED_SD, Judgement, NoiseSummary, judge
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs

DATA = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))


def seeds_needed(found: Claim) -> SampleSize:
    assert found.sample_size
    return found.sample_size


def test_seeds_needed_would_show_the_gain_against_the_promise_less_the_margin() -> None:
    # Two rows: a paired t test. The middle, 0.75, is 0.45 above 0.3, and further than the mean measured.
    needed = seeds_needed(gain_claim(0.5, 1, [0.0, 0.5, 1.0]))
    spread = 0.5 / math.sqrt(2)
    assert needed.spread == pytest.approx(spread)
    alpha = 2 * strictness(20).gain_error
    total = math.ceil(TTestPower().solve_power(effect_size=0.45 / 0.5, alpha=alpha, power=0.8))
    assert (needed.seeds, needed.is_assumed, needed.is_capped) == (total - 3, False, False)


def test_a_larger_table_needs_more_seeds_for_the_same_claim() -> None:
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(9)]
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    few, many = (seeds_needed(claim(judge([*gaining(0.5, 1), *more], measured))).seeds for more in ([], others))
    assert few < many


def test_seeds_of_the_row_and_of_its_reference_are_paid() -> None:
    # Two epochs of 36 s are 0.02 h; a row and its reference at a quarter of a GPU each: 0.01 h a seed.
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    judgement = judge(gaining(0.5, 1), measured, devices_per_trial=0.25)
    needed = seeds_needed(claim(judgement))
    assert judgement.hours_per_seed == pytest.approx({"r01": 0.005, "x": 0.005})
    assert needed.hours == pytest.approx(needed.seeds * 0.01)


def test_one_seed_plans_with_an_assumed_spread() -> None:
    needed = seeds_needed(gain_claim(3, 3, [5.0]))
    assert (needed.spread, needed.is_assumed) == (ASSUMED_SD, True)
    assert 1 < needed.seeds < 20


def test_more_than_a_hundred_seeds_are_not_counted() -> None:
    needed = seeds_needed(gain_claim(0.1, 0.1, [-3, 0, 3]))
    assert (needed.seeds, needed.is_capped) == (100, True)


def test_the_next_command_runs_open_rows_and_their_references_at_new_seeds() -> None:
    rows = [
        *gaining(0.5, 1),
        row("sure", Expect(gain=(0.5, 1), over="r01")),
        row("hopeless", Expect(gain=(0.01, 0.01), over="r01", margin=0.0)),
    ]
    measured = [
        *trials("r01", [55, 56, 57]),
        *trials("x", [55.3, 56.75, 58.2]),
        *trials("sure", [65, 66.01, 67]),
        *trials("hopeless", [55.1, 56.02, 56.97]),
    ]
    judgement = judge(rows, measured)
    more = judgement.more_seeds
    assert claim(judgement, "sure").verdict == "exceeded"
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


def test_the_ten_rows_make_twelve_claims() -> None:
    kinds = [(claim.run, claim.kind) for claim in judge(SPACE.runs, []).claims]
    assert kinds[:3] == [("r01", "miou"), ("r02", "miou"), ("r02", "sooner")]
    assert [run for run, kind in kinds if kind == "sooner"] == ["r02", "r09"]
    assert len(kinds) == 12


@pytest.mark.slow
@pytest.mark.parametrize("where", ["low", "middle", "top", "equal"])
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("noise", [noise for noise in NOISES if noise != "r01 x 4, skewed"])
def test_no_more_than_a_twentieth_of_searches_say_anything_false(where: str, num_seeds: int, noise: str) -> None:
    searches = draw_cell(1000, num_seeds, (1.0, 0.5, where), noise)
    (verdicts,), _ = judge_searches(searches, [num_seeds])
    is_false = false_statements(ALL_CLAIMS, verdicts, searches.truths).any(1)
    # Fails where a rate of 5 % is itself improbable; the seed is fixed, so never by chance.
    assert stats.binomtest(int(is_false.sum()), 1000).proportion_ci(0.99).low < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("where", ["low", "middle", "top", "equal"])
@pytest.mark.parametrize("decides", [False, True])
def test_no_more_than_a_twentieth_of_searches_say_anything_false_at_any_look(where: str, decides: bool) -> None:
    looks = (3, 5, 8)
    searches = draw_cell(400, looks[-1], (0.5, 0.0, where), "alike")
    families = Counter(claim.kind for claim in CLAIMS)
    by_look, num_trials = judge_at_looks(searches.measured, CLAIMS, NAMES, looks, families=families, decides=decides)
    true = searches.truths[: len(CLAIMS)]
    is_false = np.any([false_statements(CLAIMS, verdicts, true).any(1) for verdicts in by_look], axis=0)
    assert stats.binomtest(int(is_false.sum()), 400).proportion_ci(0.99).low < 0.05
    assert bool(num_trials.mean() < 8 * len(NAMES)) == decides


def at_looks(gains: Sequence[float], looks: Sequence[int]) -> Judgement:
    """Judge a row that gained this over r01 beside one that gained far more than it promised, at planned looks."""
    bars = [55 + seed for seed in range(len(gains))]
    own = [bar + gain for bar, gain in zip(bars, gains, strict=True)]
    sure = [bar + 9 + seed / 100 for seed, bar in enumerate(bars)]
    rows = [*gaining(0.5, 1), row("sure", Expect(gain=(0.5, 1), over="r01"))]
    measured = [*trials("r01", bars), *trials("x", own), *trials("sure", sure)]
    return judge(rows, sorted(measured, key=lambda trial: trial.run.seed), looks=looks)


def test_what_a_look_decides_stands_whatever_comes_after_it() -> None:
    judgement = at_looks([5.0, 5.01, 5.02, -90.0, -91.0], (3, 5))
    assert (claim(judgement).verdict, len(claim(judgement).pairs)) == ("exceeded", 3)
    assert at_looks([5.0, 5.01, 5.02, -90.0, -91.0], ()).looks == ()
    assert claim(at_looks([5.0, 5.01, 5.02, -90.0, -91.0], ())).verdict == "open"


def test_what_a_look_leaves_open_is_judged_at_the_next() -> None:
    gains = [-1.0, 0.0, 1.0, -20.0, -20.1, -20.2, -20.3, -20.4]
    assert claim(at_looks(gains[:3], (3, 8))).verdict == "open"
    assert claim(at_looks([-9.0, -9.1, -9.2, *gains[3:]], (3, 8))).reason == "no gain"
    assert len(claim(at_looks(gains, (3, 8))).pairs) == 8


def test_seeds_between_two_looks_wait_for_the_next() -> None:
    judgement = at_looks([-1.0, 0.0, 1.0, 50.0], (3, 5))
    assert (judgement.looked_at, len(judgement.seeds), len(claim(judgement).pairs)) == (3, 4, 3)
    assert at_looks([-1.0, 0.0], (3, 5)).looked_at == 0
    assert claim(at_looks([-1.0, 0.0], (3, 5))).pairs == ()
    assert at_looks([-1.0, 0.0, 1.0, 50.0, 2.0, 3.0], (3, 5)).looked_at == 6


def test_the_next_look_is_for_open_rows_and_what_they_are_compared_with() -> None:
    more = at_looks([-1.0, 0.0, 1.0], (3, 5)).more_seeds
    assert more
    assert (more.runs, more.seeds) == (("r01", "x"), (3, 4))
    assert at_looks([-1.0, 0.0, 1.0, 0.5, -0.5], (3, 5)).more_seeds is None, "there is no look after the last"
    assert at_looks([9.0, 9.01, 9.02], (3, 5)).more_seeds is None, "all is decided"


def test_looks_share_the_error() -> None:
    widths = []
    for looks in ((3,), (3, 5), (3, 5, 8, 12)):
        low, high = claim(at_looks([-1.0, 0.0, 1.0], looks)).interval or (0, 0)
        widths.append(high - low)
    assert widths == sorted(set(widths))


def test_what_deciding_takes_lies_between_the_first_look_and_all_seeds() -> None:
    expected = expected_trials(SPACE.runs, (3, 5, 8), proxy=False)
    assert expected
    assert expected.most == 80
    assert 30 < expected.if_kept <= 80
    assert 30 < expected.if_equal <= 80
    assert expected_trials([R01], (3, 5), proxy=False) is None


EXPECTING = [run for run in SPACE.runs if run.expect and not run.expect.sooner_than]
"""Eight rows of the table: two that expect a level, and six that expect a gain over r01."""


def powers_of(rows: list[Run], num_seeds: int, *, proxy: bool = False) -> dict[str, Power]:
    seeds = {row.name: range(num_seeds) for row in rows}
    return {power.claim.run: power for power in powers(rows, seeds, proxy=proxy)}


def searched(rng: np.random.Generator, num_seeds: int) -> list[ReportedTrial]:
    """Trials of a search in which every expectation holds at its middle."""
    return [
        trial(run.name, seed, [sum(run.expect.miou or (112 + sum(run.expect.gain or ()), 0)) / 2 + rng.normal()])
        for run in EXPECTING
        if run.expect
        for seed in range(num_seeds)
    ]


def test_power_follows_the_noise_and_what_seeds_share_hides_no_gain() -> None:
    rows = [row("r01", Expect(miou=(55, 57))), row("x", Expect(gain=(1, 1), over="r01"))]
    seeds = {of.name: range(5) for of in rows}

    def shares(sd: float, within_sd: float) -> list[float]:
        noise = NoiseSummary(sd=sd, within_sd=within_sd, num_rows=10)
        return [power.share or 0.0 for power in powers(rows, seeds, proxy=False, noise=noise)]

    quiet, shared, loud = shares(0.25, 0.25), shares(0.25, 1.0), shares(1.0, 1.0)
    assert quiet[0] > shared[0] + 0.2, "a level has all of the noise"
    assert quiet[1] == pytest.approx(shared[1], abs=1e-9)
    assert shared[1] > loud[1] + 0.2
    few, many = (
        expected_trials(rows, (3, 5, 8), proxy=False, noise=NoiseSummary(sd=sd, within_sd=sd, num_rows=10))
        for sd in (0.1, 1.0)
    )
    assert few is not None
    assert many is not None
    assert few.if_kept < many.if_kept - 3


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_powers_are_how_often_the_verdicts_show_what_is_true(num_seeds: int) -> None:
    rng = np.random.default_rng(num_seeds)
    number = 400
    judgements = [judge(EXPECTING, searched(rng, num_seeds)) for _ in range(number)]
    for name, power in powers_of(EXPECTING, num_seeds).items():
        shown = [c.verdict in ("kept", "exceeded", "gained") for j in judgements for c in j.claims if c.run == name]
        assert power.share is not None
        error = math.sqrt(power.share * (1 - power.share) / number) + 0.01
        assert sum(shown) / number == pytest.approx(power.share, abs=4 * error), name


def test_power_is_that_of_the_planned_looks_that_are_reached() -> None:
    rows, looks = gaining(2, 3), (3, 5, 8)
    two, five, seven, eight = (
        powers(rows, {of.name: range(number) for of in rows}, proxy=False, looks=looks)[0].share or 0.0
        for number in (2, 5, 7, 8)
    )
    assert two == 0
    assert seven == pytest.approx(five, abs=0.03), "the sixth and seventh seed wait for the eighth"
    assert eight > seven + 0.1


def test_one_seed_shows_nothing_and_more_show_more() -> None:
    shares = [powers_of(EXPECTING, number)["r06"].share for number in (1, 2, 4, 8, 16)]
    assert shares[0] == 0
    assert shares == sorted(shares, key=lambda share: share or 0)
    assert shares[-1] == pytest.approx(0.9, abs=0.1)


def test_the_seeds_for_a_power_reach_it() -> None:
    needed = powers_of(EXPECTING, 1)["r06"].seeds_for_80
    assert needed is not None
    below, at = (powers_of(EXPECTING, number)["r06"].share or 0 for number in (needed - 1, needed))
    assert below < 0.8 <= at
    assert powers_of(EXPECTING, 1)["r07"].seeds_for_80 is None, "+0.4 at a spread of 1 takes over a hundred seeds"


def test_an_expectation_without_a_number_has_no_power() -> None:
    found = powers(SPACE.runs, {run.name: (0, 1, 2) for run in SPACE.runs}, proxy=False)
    sooner = [power for power in found if power.claim.kind == "sooner"]
    assert [power.claim.run for power in sooner] == ["r02", "r09"]
    assert all(power.share is None and power.seeds_for_80 is None for power in sooner)


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
    assert found[0].share == pytest.approx(0, abs=0.02), "hardly anything is shown among so many claims"
    assert found[-1].share is None
