"""What other stopping rules would have done to a search: the simulated time, the rules, and what a log cannot tell."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import CONFIG, SESSION
from searches import epochs, row, write_search, write_trial

from tune_bisenet.config import Expect, Run, WarmupPoly
from tune_bisenet.records import Epoch, TrialSpec, TrialState
from tune_bisenet.report.read import ReportedTrial, SearchRecord, read_search
from tune_bisenet.report.replay import TRIED_RULES, ReplayedRule, replay, replay_table, simulate
from tune_bisenet.report.tables import Marked
from tune_bisenet.rungs import RULES, AshaRule, MedianRule, Stopper, StoppingRule

ONE_AT_A_TIME = SESSION | {"trials_at_once": 1}


def run_of(name: str, num_epochs: int = 5, **changes: object) -> Run:
    return row(name, 0, num_epochs=num_epochs, schedule=WarmupPoly(warmup_iterations=0, power=0.9), **changes)


def history(mious: Sequence[float], seconds: float = 36.0, *, diverges: bool = False) -> list[Epoch]:
    """One epoch for each mIoU; at the last the loss may be no number."""
    ended = [
        replace(epochs(0)[0], epoch=number, miou=miou, train_seconds=seconds, val_seconds=0.0)
        for number, miou in enumerate(mious, start=1)
    ]
    return [*ended[:-1], replace(ended[-1], loss=math.nan)] if diverges else ended


def record(name: str, log: Sequence[Epoch], num_epochs: int) -> ReportedTrial:
    run = run_of(name, num_epochs)
    return ReportedTrial(spec=TrialSpec(trial=name, run=run), state=TrialState.of_run(name, run), epochs=log)


def search_of(
    folder: Path, logs: Mapping[str, list[Epoch]], runs: Sequence[Run] | None = None, **manifest: Any
) -> SearchRecord:
    """A search of these trials, five epochs each, one at a time on half a GPU."""
    rows = {run.name: run for run in runs or [run_of(name) for name in logs]}
    storage = write_search(folder, trials=rows, **({"sessions": [ONE_AT_A_TIME]} | manifest))
    for name, log in logs.items():
        write_trial(storage, name, log, spec=TrialSpec(trial=name, run=rows[name]))
    return read_search(storage)


def outcome_of(search: SearchRecord, rule: StoppingRule | None) -> ReplayedRule:
    (outcome,) = [outcome for outcome in replay(search) if outcome.rule == rule]
    return outcome


FLAT = {"a": 50.0, "b": 40.0, "c": 60.0, "d": 45.0, "e": 30.0}
LOGS = {name: history([miou] * 5) for name, miou in FLAT.items()}


@dataclass(kw_only=True)
class Listener(Stopper):
    """A stopper that notes what it is given and stops one trial after its first epoch."""

    unwanted: str = ""
    heard: list[str] = field(default_factory=list)

    def decide(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> str:
        self.heard.append(f"{trial}{epoch}")
        return "unwanted" if trial == self.unwanted else ""


@pytest.mark.parametrize(
    ("slots", "unwanted", "heard"),
    [
        (1, "", "a1 a2 a3 b1 b2 c1"),
        (2, "", "a1 b1 a2 a3 b2 c1"),  # a3 and b2 both end after 30 seconds
        (3, "", "c1 a1 b1 a2 a3 b2"),
        (9, "", "c1 a1 b1 a2 a3 b2"),
        (2, "a", "a1 b1 c1 b2"),  # its slot is free after 10 seconds
    ],
)
def test_epochs_come_when_they_end_and_a_freed_slot_is_taken_at_once(slots: int, unwanted: str, heard: str) -> None:
    times = {"a": (3, 10.0), "b": (2, 15.0), "c": (1, 5.0)}
    trials = {name: record(name, history([1.0] * count, seconds), 3) for name, (count, seconds) in times.items()}
    stopper = Listener(rule=None, iterations_per_epoch=ten, unwanted=unwanted)
    trained = simulate(trials, stopper, slots=slots)
    assert stopper.heard == heard.split()
    assert trained == {name: heard.count(name) for name in trials}


def ten(_run: Run) -> int:
    """Iterations per epoch."""
    return 10


def random_log(chance: random.Random) -> tuple[dict[str, ReportedTrial], int]:
    """Trials that completed unless they diverged, with seconds that are whole, so that many ends coincide."""
    num_epochs = chance.choice([5, 10])
    trials = {}
    for number in range(chance.randint(1, 12)):
        diverges = chance.random() < 0.1
        count = chance.randint(1, num_epochs) if diverges else num_epochs
        log = history([chance.uniform(0, 60) for _ in range(count)], chance.randint(1, 4), diverges=diverges)
        trials[f"x{number}"] = record(f"x{number}", log, num_epochs)
    return trials, chance.randint(1, 5)


def live(trials: Mapping[str, ReportedTrial], stopper: Stopper, slots: int) -> dict[str, int]:
    """Run a search second by second; return the epochs of each trial."""
    waiting, running, trained, second = list(trials), dict[str, float](), dict.fromkeys(trials, 0), 0
    while waiting or running:
        while waiting and len(running) < slots:
            running[waiting[0]] = second + trials[waiting[0]].epochs[0].seconds
            waiting.pop(0)
        second += 1
        for name in [name for name, ends in running.items() if ends == second]:
            epoch = trials[name].epochs[trained[name]]
            trained[name] += 1
            run = trials[name].run
            reason = stopper.decide(run, name, epoch=epoch.epoch, miou=epoch.miou, diverged=epoch.diverged)
            if reason or trained[name] == len(trials[name].epochs):
                del running[name]
            else:
                running[name] += epoch.seconds
    return trained


RULES_TO_CHECK = [None, AshaRule(), AshaRule(first_share=0.2, reduction_factor=3), MedianRule(first_share=0.1)]


@pytest.mark.parametrize("rule", RULES_TO_CHECK, ids=str)
def test_a_replay_stops_exactly_those_that_the_search_itself_would_have_stopped(rule: StoppingRule | None) -> None:
    chance = random.Random(11)
    num_stopped = 0
    for _ in range(100):
        trials, slots = random_log(chance)
        replayed, searched = (
            Stopper(rule=rule, iterations_per_epoch=ten, protected=frozenset({"x0"})) for _ in range(2)
        )
        assert simulate(trials, replayed, slots=slots) == live(trials, searched, slots)
        assert replayed == searched
        num_stopped += len(replayed.stops)
    assert num_stopped


@pytest.mark.parametrize("rule", RULES_TO_CHECK, ids=str)
def test_replaying_what_a_rule_has_left_with_the_same_rule_changes_nothing(rule: StoppingRule | None) -> None:
    chance = random.Random(12)
    for _ in range(50):
        trials, slots = random_log(chance)
        before, after = (Stopper(rule=rule, iterations_per_epoch=ten) for _ in range(2))
        trained = simulate(trials, before, slots=slots)
        left = {name: replace(one, epochs=one.epochs[: trained[name]]) for name, one in trials.items()}
        assert simulate(left, after, slots=slots) == trained
        assert after == before


@pytest.mark.parametrize(
    ("rule", "stopped", "epochs_saved"),
    [
        (None, (), 0),
        (AshaRule(first_share=0.4), ("d", "e"), 6),  # 45 and 30 after epoch 2, below 50 and 47.5
        (AshaRule(first_share=0.6), ("d", "e"), 4),
        (AshaRule(first_share=0.2, reduction_factor=4), ("d", "e"), 8),  # after epoch 1, below 55 and 52.5
        (MedianRule(first_share=0.2), ("d", "e"), 8),  # below 50 and 47.5
        (MedianRule(first_share=0.6), ("d", "e"), 4),
    ],
    ids=str,
)
def test_a_rule_saves_the_epochs_after_those_it_stops(
    tmp_path: Path, rule: StoppingRule | None, stopped: tuple[str, ...], epochs_saved: int
) -> None:
    assert outcome_of(search_of(tmp_path, LOGS), rule) == ReplayedRule(
        rule=rule,
        stopped=stopped,
        cut_short=(),
        epochs_share_saved=epochs_saved / 25,
        hours_saved=epochs_saved * 36 * 0.5 / 3600,
        keeps_winner=True,
        best_miou=60.0,
    )


def test_every_rule_is_tried_once_and_those_of_the_command_line_among_them() -> None:
    assert len(TRIED_RULES) == len(set(TRIED_RULES))
    assert set(RULES.values()) <= set(TRIED_RULES)


def test_a_late_winner_that_is_stopped_costs_what_it_was_ahead(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([10.0, 20.0, 30.0, 70.0, 90.0])})
    seen = outcome_of(search, AshaRule())
    early = outcome_of(search_of(tmp_path / "early", LOGS | {"e": history([90.0] + [20.0] * 4)}), AshaRule())
    assert (seen.keeps_winner, seen.best_miou) == (False, 60.0)
    assert (early.keeps_winner, early.best_miou) == (False, 90.0), "it is stopped after its best epoch"
    assert outcome_of(search, None).best_miou == 90.0
    rows = [tuple(line.values()) for line in replay_table(search).lines]
    assert ("asha", "0.4", "2", "2", "24%", "0.03", "stopped", "60.00", "30.00", "0") in rows
    assert ("fifo", "", "", "0", "0%", "0.00", "kept", "90.00", "0.00", "0") in rows


def test_rows_that_others_are_measured_against_are_protected_as_in_the_search(tmp_path: Path) -> None:
    runs = [run_of("a", expect=Expect(gain=(0, 1), over="e")), *map(run_of, "bcde")]
    assert outcome_of(search_of(tmp_path, LOGS, runs), AshaRule()).stopped == ("d",)


def test_rungs_wait_for_the_warmup_of_the_searchs_own_epochs(tmp_path: Path) -> None:
    slow = [run_of(name).model_copy(update={"schedule": WarmupPoly(warmup_iterations=21, power=0.9)}) for name in LOGS]
    search = search_of(tmp_path, LOGS, slow)  # 40 images in batches of 4: over in epoch 3
    assert outcome_of(search, AshaRule()).epochs_share_saved == 2 / 25  # after epoch 4 instead of 2
    assert outcome_of(search, MedianRule()).epochs_share_saved == 4 / 25  # after epoch 3


def test_a_diverged_trial_is_neither_stopped_nor_cut_short_by_a_rule(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([30.0, 30.0], diverges=True)})
    assert all("e" not in outcome.cut_short for outcome in replay(search))
    assert outcome_of(search, AshaRule()).stopped == ("d",)


def test_a_trial_that_diverged_at_once_wins_under_no_rule(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([99.0], diverges=True)})
    assert {outcome.best_miou for outcome in replay(search)} == {60.0}
    assert "The winner is c with 60.00 %" in replay_table(search).text


def test_a_trial_that_was_stopped_early_is_cut_short_where_a_rule_continues_it(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([30.0, 30.0])})
    assert outcome_of(search, None).cut_short == ("e",)
    assert outcome_of(search, AshaRule(first_share=0.6)).cut_short == ("e",)
    own = outcome_of(search, AshaRule())
    assert (own.cut_short, own.stopped, own.epochs_share_saved) == ((), ("d", "e"), 3 / 22)
    assert "1 of 5 trials ended early" in replay_table(search).text


def test_as_many_trials_run_at_once_as_in_the_last_session(tmp_path: Path) -> None:
    logs = LOGS | {"e": history([30.0] * 5, seconds=1.0)}
    five = SESSION | {"trials_at_once": 5}
    alone, together = search_of(tmp_path / "1", logs), search_of(tmp_path / "5", logs, sessions=[ONE_AT_A_TIME, five])
    assert outcome_of(alone, AshaRule()).stopped == ("d", "e")
    assert outcome_of(together, AshaRule()).stopped == ()  # e is first, and d meets 45, the median of 30, 50, 40, 60


@pytest.mark.parametrize(
    ("scheduler", "marked"), [("asha", "asha 0.4 2"), ("median", "median 0.4 "), ("fifo", "fifo  ")]
)
def test_what_the_search_was_run_with_is_marked(tmp_path: Path, scheduler: str, marked: str) -> None:
    search = search_of(tmp_path, LOGS, config=CONFIG | {"scheduler": scheduler})
    lines = [line for line in replay_table(search).lines if isinstance(line["rule"], Marked)]
    assert [" ".join([line["rule"], line["grace"], line["factor"]]) for line in lines] == [marked]


@pytest.mark.parametrize(
    "logs",
    [
        {},
        {"a": []},
        {"a": [], "b": history([1.0] * 4)},
        {"a": history([1.0], diverges=True)},
        {"a": history([1.0] * 5, diverges=True)},
    ],
)
def test_until_a_trial_has_completed_there_is_nothing_to_replay(tmp_path: Path, logs: dict[str, list[Epoch]]) -> None:
    search = search_of(tmp_path, logs)
    assert replay(search) == []
    assert "nothing to replay" in replay_table(search).text
