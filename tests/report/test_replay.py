"""What other settings would have done to a search: the simulated time, the judges, and what a log cannot tell."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from searches import SESSION, epochs, row, write_search, write_trial

from tune_bisenet.config import Expect, Run, WarmupPoly
from tune_bisenet.records import Epoch, TrialState
from tune_bisenet.report.read import SearchRecord, TrialRecord, read_search
from tune_bisenet.report.replay import (
    POLICIES,
    Asha,
    Fifo,
    Median,
    Outcome,
    Policy,
    Replay,
    judge_of,
    replay,
    replay_view,
    simulate,
)
from tune_bisenet.rungs import GO_ON, Verdict
from tune_bisenet.storage import Storage

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


def record(name: str, log: Sequence[Epoch], num_epochs: int) -> TrialRecord:
    return TrialRecord(
        folder=Storage.at("/nowhere"),
        run=run_of(name, num_epochs),
        standing=TrialState(trial=name, run=name, seed=0, num_epochs=num_epochs),
        epochs=tuple(log),
        confusions=None,
        notes=(),
    )


def search_of(
    place: Path, logs: Mapping[str, list[Epoch]], runs: Sequence[Run] | None = None, **manifest: Any
) -> SearchRecord:
    """A search of these trials, five epochs each, one at a time on half a GPU."""
    rows = {run.name: run for run in runs or [run_of(name) for name in logs]}
    trials = {name: run.model_dump(mode="json") for name, run in rows.items()}
    folder = write_search(place, trials=trials, **({"sessions": [ONE_AT_A_TIME]} | manifest))
    for name, log in logs.items():
        write_trial(folder / name, log)
    return read_search(folder)


def replayed(search: SearchRecord) -> Replay:
    seen = replay(search)
    assert seen
    return seen


def outcome_of(search: SearchRecord, policy: Policy) -> Outcome:
    (outcome,) = [one for one in replayed(search).outcomes if one.policy == policy]
    return outcome


FLAT = {"a": 50.0, "b": 40.0, "c": 60.0, "d": 45.0, "e": 30.0}
LOGS = {name: history([miou] * 5) for name, miou in FLAT.items()}


# --- simulated time ---------------------------------------------------------------------------------------------


@dataclass
class Listener:
    """A judge that notes what it hears and stops whom it was told to after the first epoch."""

    stops: dict[str, str] = field(default_factory=dict)
    unwanted: str = ""
    heard: list[str] = field(default_factory=list)

    def judge(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> Verdict:
        self.heard.append(f"{trial}{epoch}")
        return Verdict(stop=True) if trial == self.unwanted else GO_ON

    def know(self, run: Run, trial: str, curve: Sequence[float]) -> None: ...

    def to_json(self) -> dict[str, Any]:
        return {}


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
def test_epochs_are_heard_when_they_end_and_a_freed_slot_is_taken_at_once(
    slots: int, unwanted: str, heard: str
) -> None:
    times = {"a": (3, 10.0), "b": (2, 15.0), "c": (1, 5.0)}
    trials = {name: record(name, history([1.0] * count, seconds), 3) for name, (count, seconds) in times.items()}
    judge = Listener(unwanted=unwanted)
    trained = simulate(trials, judge, slots=slots)
    assert judge.heard == heard.split()
    assert trained == {name: heard.count(name) for name in trials}


def random_log(chance: random.Random) -> tuple[dict[str, TrialRecord], int]:
    """Trials that went to their end unless they diverged, with seconds that are whole, so that many ends coincide."""
    num_epochs = chance.choice([5, 10])
    trials = {}
    for number in range(chance.randint(1, 12)):
        diverges = chance.random() < 0.1
        count = chance.randint(1, num_epochs) if diverges else num_epochs
        log = history([chance.uniform(0, 60) for _ in range(count)], chance.randint(1, 4), diverges=diverges)
        trials[f"x{number}"] = record(f"x{number}", log, num_epochs)
    return trials, chance.randint(1, 5)


def live(trials: Mapping[str, TrialRecord], policy: Policy, slots: int) -> tuple[dict[str, str], dict[str, int]]:
    """A search second by second: why each was stopped, and its epochs."""
    judge = judge_of(policy, train_images=40, spared=frozenset({"x0"}))
    waiting, running, trained, second = list(trials), dict[str, float](), dict.fromkeys(trials, 0), 0
    while waiting or running:
        while waiting and len(running) < slots:
            running[waiting[0]] = second + trials[waiting[0]].epochs[0].seconds
            waiting.pop(0)
        second += 1
        for name in [name for name, ends in running.items() if ends == second]:
            epoch = trials[name].epochs[trained[name]]
            trained[name] += 1
            verdict = judge.judge(trials[name].run, name, epoch=epoch.epoch, miou=epoch.miou, diverged=epoch.diverged)
            if verdict.stop or trained[name] == len(trials[name].epochs):
                del running[name]
            else:
                running[name] += epoch.seconds
    return judge.stops, trained


@pytest.mark.parametrize("policy", [Fifo(), Asha(), Asha(0.2, 3), Median(), Median(0.1)], ids=str)
def test_a_replay_stops_exactly_those_that_the_search_itself_would_have_stopped(policy: Policy) -> None:
    chance = random.Random(11)
    num_stopped = 0
    for _ in range(100):
        trials, slots = random_log(chance)
        judge = judge_of(policy, train_images=40, spared=frozenset({"x0"}))
        trained = simulate(trials, judge, slots=slots)
        assert (judge.stops, trained) == live(trials, policy, slots)
        num_stopped += len(judge.stops)
    assert num_stopped


@pytest.mark.parametrize("policy", [Fifo(), Asha(), Median()], ids=str)
def test_replaying_what_a_policy_has_left_with_the_same_policy_changes_nothing(policy: Policy) -> None:
    chance = random.Random(12)
    for _ in range(50):
        trials, slots = random_log(chance)
        before, after = (judge_of(policy, train_images=40, spared=frozenset()) for _ in range(2))
        trained = simulate(trials, before, slots=slots)
        left = {name: replace(one, epochs=one.epochs[: trained[name]]) for name, one in trials.items()}
        assert simulate(left, after, slots=slots) == trained
        assert after.to_json() == before.to_json()


# --- outcomes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "stopped", "epochs_saved"),
    [
        (Fifo(), (), 0),
        (Asha(0.4, 2), ("d", "e"), 6),  # 45 and 30 after epoch 2, below 50 and 47.5
        (Asha(0.6, 2), ("d", "e"), 4),
        (Asha(0.1, 4), ("d", "e"), 8),  # after epoch 1, below 55 and 52.5
        (Median(0.2), ("d", "e"), 8),  # below 50 and 47.5
        (Median(0.5), ("d", "e"), 4),
    ],
    ids=str,
)
def test_a_policy_saves_the_epochs_after_those_it_stops(
    tmp_path: Path, policy: Policy, stopped: tuple[str, ...], epochs_saved: int
) -> None:
    assert outcome_of(search_of(tmp_path, LOGS), policy) == Outcome(
        policy=policy,
        stopped=stopped,
        cut_short=(),
        epochs_share_saved=epochs_saved / 25,
        hours_saved=epochs_saved * 36 * 0.5 / 3600,
        keeps_winner=True,
        best_miou=60.0,
    )


def test_every_combination_is_tried_once_and_what_was_used_among_them() -> None:
    assert len(POLICIES) == len(set(POLICIES)) == 1 + 6 * 3 + 6
    assert {Fifo(), Asha(0.4, 2), Median(0.4)} <= set(POLICIES)


def test_a_late_winner_that_is_stopped_costs_what_it_was_ahead(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([10.0, 20.0, 30.0, 70.0, 90.0])})
    seen = outcome_of(search, Asha())
    assert (replayed(search).winner, replayed(search).winner_miou) == ("e", 90.0)
    assert (seen.keeps_winner, seen.best_miou) == (False, 60.0)
    assert outcome_of(search, Asha(0.6)).best_miou == 60.0
    assert outcome_of(search, Fifo()).best_miou == 90.0


def test_a_winner_that_is_stopped_after_its_best_epoch_costs_nothing_but_is_not_kept(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([90.0, 20.0, 20.0, 20.0, 20.0])})
    seen = outcome_of(search, Asha())
    assert (seen.keeps_winner, seen.best_miou) == (False, 90.0)


def test_rows_that_others_are_measured_against_are_spared_as_in_the_search(tmp_path: Path) -> None:
    runs = [run_of("a", expect=Expect(gain=(0, 1), over="e")), *map(run_of, "bcde")]
    assert outcome_of(search_of(tmp_path, LOGS, runs), Asha()).stopped == ("d",)


def test_rungs_wait_for_the_warmup_of_the_searchs_own_epochs(tmp_path: Path) -> None:
    slow = [run_of(name).model_copy(update={"schedule": WarmupPoly(warmup_iterations=21, power=0.9)}) for name in LOGS]
    search = search_of(tmp_path, LOGS, slow)  # 40 images in batches of 4: over in epoch 3
    assert outcome_of(search, Asha(0.4, 2)).epochs_share_saved == 2 / 25  # after epoch 4 instead of 2
    assert outcome_of(search, Median(0.4)).epochs_share_saved == 4 / 25  # after epoch 3


def test_a_diverged_trial_is_neither_stopped_nor_cut_short_by_a_policy(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([30.0, 30.0], diverges=True)})
    for outcome in replayed(search).outcomes:
        assert "e" not in outcome.cut_short
    assert outcome_of(search, Asha(0.4, 2)).stopped == ("d",)
    assert replayed(search).num_ended_early == 0


def test_a_trial_that_was_stopped_early_is_cut_short_where_a_policy_lets_it_go_on(tmp_path: Path) -> None:
    search = search_of(tmp_path, LOGS | {"e": history([30.0, 30.0])}, choices=choices("asha"))
    assert outcome_of(search, Fifo()).cut_short == ("e",)
    assert outcome_of(search, Asha(0.6, 2)).cut_short == ("e",)
    own = outcome_of(search, Asha(0.4, 2))
    assert (own.cut_short, own.stopped, own.epochs_share_saved) == ((), ("d", "e"), 3 / 22)


def test_as_many_trials_run_at_once_as_in_the_last_session(tmp_path: Path) -> None:
    logs = LOGS | {"e": history([30.0] * 5, seconds=1.0)}
    five = SESSION | {"trials_at_once": 5}
    alone, together = search_of(tmp_path / "1", logs), search_of(tmp_path / "5", logs, sessions=[ONE_AT_A_TIME, five])
    assert outcome_of(alone, Asha()).stopped == ("d", "e")
    assert outcome_of(together, Asha()).stopped == ()  # e comes first, and d meets 45, the median of 30, 50, 40 and 60


def test_without_gpus_hours_are_those_of_the_machine(tmp_path: Path) -> None:
    session = SESSION | {"trials_at_once": 4, "gpus_per_trial": 0}
    seen = replayed(search_of(tmp_path, LOGS, sessions=[session]))
    assert seen.unit == "machine-hours"
    assert seen.hours == pytest.approx(25 * 36 / 4 / 3600)


# --- in words ---------------------------------------------------------------------------------------------------


def choices(scheduler: str) -> dict[str, object]:
    return {"space": "small", "scheduler": scheduler, "precision": "fp32", "seeds": [0]}


@pytest.mark.parametrize(
    ("scheduler", "marked"),
    [("asha", ["asha 0.4 2"]), ("median", ["median 0.4 "]), ("fifo", ["fifo  "]), ("of tomorrow", [])],
)
def test_what_the_search_was_run_with_is_marked(tmp_path: Path, scheduler: str, marked: list[str]) -> None:
    view = replay_view(replay(search_of(tmp_path, LOGS, choices=choices(scheduler))))
    assert [" ".join(cell.text for cell in row[:3]) for row in view.rows if any(cell.marked for cell in row)] == marked
    assert ("Marked:" in view.words) == bool(marked)


def test_a_line_tells_all_of_an_outcome(tmp_path: Path) -> None:
    view = replay_view(replay(search_of(tmp_path, LOGS | {"e": history([10.0, 20.0, 30.0, 70.0, 90.0])})))
    lines = [[cell.text for cell in row] for row in view.rows]
    assert ["asha", "0.4", "2", "2", "24%", "0.03", "stopped", "60.00", "30.00", "0"] in lines
    assert ["fifo", "", "", "0", "0%", "0.00", "kept", "90.00", "0.00", "0"] in lines
    assert len(view.columns) == len(lines[0])


def test_the_settings_that_keep_the_winner_and_save_most_are_named(tmp_path: Path) -> None:
    words = replay_view(replay(search_of(tmp_path, LOGS))).words
    assert (
        "Of those that keep the winner, asha (grace 0.1, factor 2) or asha (grace 0.2, factor 2) or "
        "asha (grace 0.1, factor 3) or 5 more saves most: 32% of the epochs" in words
    )
    assert "fifo answers best" not in words


def test_where_nothing_is_saved_nothing_is_advised(tmp_path: Path) -> None:
    view = replay_view(replay(search_of(tmp_path, {"a": LOGS["a"]})))
    assert "Nothing that keeps the winner saves anything." in view.words


def test_a_log_with_stopped_trials_points_to_fifo(tmp_path: Path) -> None:
    words = replay_view(replay(search_of(tmp_path, LOGS | {"e": history([30.0, 30.0])}))).words
    assert "1 of 5 trials ended early in this log" in words
    assert words.endswith("A search run with --scheduler fifo answers best.")


@pytest.mark.parametrize("logs", [{"a": []}, {"a": [], "b": history([1.0] * 4)}, {"a": history([1.0], diverges=True)}])
def test_as_long_as_nothing_has_finished_there_is_nothing_to_replay(
    tmp_path: Path, logs: dict[str, list[Epoch]]
) -> None:
    view = replay_view(replay(search_of(tmp_path, logs)))
    assert view.rows == ()
    assert view.words == "No trial has gone to its last epoch yet, so there is nothing to replay."


def test_a_search_without_trials_has_nothing_to_replay(tmp_path: Path) -> None:
    assert replay(search_of(tmp_path, {})) is None
