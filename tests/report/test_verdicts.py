"""Verdicts of a whole table: what it costs to know, what sets rows apart, and how often equal rows are confirmed."""

import json
import math
import shlex

import pytest
from promising import R01, ROWS, claim, gain_claim, gaining, row, trial, trials
from scipy import stats
from statsmodels.stats.power import TTestPower

from benchmarks.false_positives import num_false, searches
from search_spaces.runs10 import BATCHNORM, SPACE
from tune_bisenet.config import SGD, AdamW, Augment, Expect
from tune_bisenet.report.verdicts import differences, judge, more_seeds, next_command
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs

DATA = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))


# --- what it would cost to know -------------------------------------------------------------------------------------


def test_seeds_needed_agree_with_statsmodels_for_the_middle_of_the_promise() -> None:
    # Differences of sd 0.5, the promise's middle at 0.75, one claim in the table.
    found = gain_claim(0.5, 1, [0.0, 0.5, 1.0])
    total = math.ceil(TTestPower().solve_power(effect_size=0.75 / 0.5, alpha=0.05, power=0.8))
    assert found.spread == pytest.approx(0.5)
    assert (found.seeds_needed, found.spread_assumed) == (total - 3, False)


def test_seeds_needed_look_for_what_is_measured_where_that_is_more_than_was_promised() -> None:
    # Differences 1, 2, 6: mean 3, sd sqrt(7); the promise's middle is 0.75.
    found = gain_claim(0.5, 1, [1.0, 2.0, 6.0])
    total = math.ceil(TTestPower().solve_power(effect_size=3 / math.sqrt(7), alpha=0.05, power=0.8))
    assert found.verdict == "undecided"
    assert found.seeds_needed == total - 3


def test_seeds_needed_count_holms_correction() -> None:
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(9)]
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    total = math.ceil(TTestPower().solve_power(effect_size=0.75 / 0.5, alpha=0.05 / 10, power=0.8))
    assert claim(judge([*gaining(0.5, 1), *others], measured)).seeds_needed == total - 3


def test_seeds_of_the_row_and_of_its_reference_are_paid() -> None:
    # Two epochs of 36 s are 0.02 h; a row and its reference at a quarter of a GPU each: 0.01 h a seed.
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    judgement = judge(gaining(0.5, 1), measured, devices_per_trial=0.25)
    found = claim(judgement)
    assert judgement.hours_per_seed == pytest.approx({"r01": 0.005, "x": 0.005})
    assert found.seeds_needed is not None
    assert found.cost_hours == pytest.approx(found.seeds_needed * 0.01)
    assert f"{found.seeds_needed} more seeds ({found.cost_hours:.3g} GPU-hours) would decide it" in found.words


def test_a_trial_stopped_early_is_costed_to_its_end() -> None:
    judgement = judge([R01], [trial("r01", 0, [50.0], status="stopped", of=50)])
    assert judgement.hours_per_seed == pytest.approx({"r01": 0.5})


def test_one_seed_plans_with_an_assumed_spread_and_says_so() -> None:
    # 0.5 / 0.5 at alpha 0.05 needs 10 pairs; one is there.
    found = gain_claim(0.5, 0.5, [3.0])
    assert (found.seeds_needed, found.spread, found.spread_assumed) == (9, 0.5, True)
    assert "spread of 0.5 points assumed" in found.flags
    assert "if seeds spread by 0.5 points" in found.words


def test_more_than_a_hundred_seeds_are_not_counted() -> None:
    found = gain_claim(0.1, 0.1, [-3, 0, 3])
    assert (found.seeds_needed, found.seeds_capped) == (100, True)
    assert "more than 100 more seeds would decide it" in found.words


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
    found, more = claim(judgement), more_seeds(judgement)
    assert claim(judgement, "sure").verdict == "confirmed"
    assert more is not None
    assert more.runs == ("r01", "x")
    assert more.seeds == tuple(range(3, 3 + (found.seeds_needed or 0)))
    assert more.hours == pytest.approx(len(more.seeds) * 0.04)
    command = next_command(judgement, space="my space", name="n")
    seeds = ",".join(map(str, more.seeds))
    assert command is not None
    assert shlex.split(command) == [
        *("python", "-m", "tune_bisenet.run", "--space", "my space", "--name", "n", "--add"),
        *("--runs", "r01,x", "--seeds", seeds),
    ]


def test_where_all_is_decided_there_is_no_next_command() -> None:
    judgement = judge(gaining(0.5, 1), trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9]))
    assert more_seeds(judgement) is None
    assert next_command(judgement, space="runs10", name="n") is None


# --- the ten rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", [False, True])
def test_of_the_ten_rows_only_r09_differs_from_r01_in_more_than_one_thing(proxy: bool) -> None:
    rows = resolve_runs(SPACE.runs, RowOverrides(seeds=(0, 1), num_epochs=50, proxy=proxy), DATA)
    flagged = {
        claim.run: claim.flags[-1] for claim in judge(rows, []).claims if "more than one" in "".join(claim.flags)
    }
    assert flagged == {
        "r09": "differs from r01 in more than one thing: optimizer kind sgd → adamw, optimizer lr 0.01 → 0.001, "
        "optimizer momentum 0.9 → none"
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("r02", "optimizer lr 0.01 → 0.015"),
        ("r03", "optimizer lr 0.01 → 0.025"),
        ("r04", "loss aux_weight 1 → 0.4"),
        ("r05", "loss lovasz_after none → 35"),
        ("r06", "accumulation 1 → 2"),
        ("r07", "max_grad_norm none → 1"),
        ("r08", "schedule warmup_iterations 1100 → 2500"),
        ("r10", "loss kind ce → weighted_ce"),
    ],
)
def test_a_row_of_the_ten_differs_from_r01_in_one_thing(name: str, words: str) -> None:
    found = [difference.words for difference in differences(ROWS[name], ROWS["r01"]) if difference.is_a_thing]
    assert found == [words]


def test_name_seed_and_expectation_are_no_difference() -> None:
    assert differences(R01.model_copy(update={"name": "y", "seed": 3, "expect": Expect(miou=(1, 2))}), R01) == ()


def test_a_setting_that_comes_with_its_kind_is_no_thing_of_its_own() -> None:
    adamw = R01.model_copy(update={"optimizer": AdamW(lr=0.01, weight_decay=1e-4)})
    assert [(found.setting, found.is_a_thing) for found in differences(adamw, R01)] == [
        ("optimizer kind", True),
        ("optimizer momentum", False),
    ]


def test_settings_within_settings_count_each() -> None:
    optimizer = SGD(lr=0.01, momentum=0.8, weight_decay=1e-4)
    changed = row("y").model_copy(update={"optimizer": optimizer, "augment": Augment(flip=0.0)})
    assert [found.setting for found in differences(changed, R01)] == ["optimizer momentum", "augment flip"]


def test_the_note_of_a_row_goes_with_its_verdict() -> None:
    notes = {claim.run: claim.note for claim in judge(SPACE.runs, []).claims}
    assert notes["r06"] == BATCHNORM
    assert notes["r04"] == ""


def test_the_ten_rows_make_thirteen_claims_nine_on_a_proxy() -> None:
    kinds = [(claim.run, claim.kind) for claim in judge(SPACE.runs, []).claims]
    assert kinds[:3] == [("r01", "miou"), ("r02", "miou"), ("r02", "sooner")]
    assert judge(SPACE.runs, []).family == len(kinds) == 13
    assert judge(SPACE.runs, [], proxy=True).family == 9


def test_a_judgement_is_strict_json() -> None:
    measured = [*trials("r01", [55, 56]), *trials("r04", [56, 57]), *trials("r02", [57, 55]), *trials("r09", [58])]
    record = judge(SPACE.runs, measured).to_json()
    assert json.loads(json.dumps(record, allow_nan=False))["claims"][0]["verdict"] == "undecided"


# --- by simulation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_ten_equal_rows_are_falsely_confirmed_in_no_more_than_a_twentieth_of_searches(num_seeds: int) -> None:
    judgements = searches(2000, num_seeds, proxy=False, gains={})
    # At a true rate of 5 % the upper end of a 95 % interval would lie above 5 % almost always.
    assert stats.binomtest(num_false(judgements), 2000).proportion_ci(0.95).high < 0.05
