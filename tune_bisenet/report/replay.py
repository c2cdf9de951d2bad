"""What other stopping rules, or other settings of them, would have done to a search, from its logs alone.

A replay runs the search's trials again on as many slots: every epoch takes the seconds it took, and the stopper that a
search uses gets each in turn. A stopped trial frees its slot. Nothing is trained, and beyond the end of a trial's log
nothing is known: a trial that a rule would have continued is cut short there. Neither Ray nor torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from tune_bisenet.records import Epoch, best_of
from tune_bisenet.report.read import ReportedTrial, SearchRecord
from tune_bisenet.report.tables import Marked, Table
from tune_bisenet.rungs import RULES, AshaRule, MedianRule, Stopper, StoppingRule, protected_rows
from tune_bisenet.text import counted

FIRST_SHARES: Final = (0.2, 0.4, 0.6)
REDUCTION_FACTORS: Final = (2, 3, 4)
TRIED_RULES: Final[tuple[StoppingRule | None, ...]] = (
    None,
    *(AshaRule(first_share=share, reduction_factor=factor) for factor in REDUCTION_FACTORS for share in FIRST_SHARES),
    *(MedianRule(first_share=share) for share in FIRST_SHARES),
)
"""Those that a search can be run with are among them."""
MOST_NAMED: Final = 3
"""The number of rules named in the text, where several save the same."""


@dataclass(frozen=True, kw_only=True)
class ReplayedRule:
    """A search under one rule."""

    rule: StoppingRule | None
    stopped: tuple[str, ...]
    """Trials that are compared and stopped; those that diverge end under every rule."""
    cut_short: tuple[str, ...]
    """Trials that would have continued where their log ends."""
    epochs_share_saved: float
    """The share of the epochs in the log, 0 to 1."""
    hours_saved: float
    """Device hours of the epochs in the log that are not trained."""
    keeps_winner: bool
    best_miou: float
    """The highest that any trial reaches until it ends."""


def replay(search: SearchRecord) -> list[ReplayedRule]:
    """Replay a search under every rule; nothing until a trial has completed: there is nothing to compare with."""
    trials = _trials(search)
    if all(record.ended_at or record.epochs[-1].diverged for record in trials.values()):
        return []
    winner, train_images = _winner(trials), search.manifest.data.train_images
    known = [epoch for record in trials.values() for epoch in record.epochs]
    replayed = []
    for rule in TRIED_RULES:
        stopper = Stopper(
            rule=rule,
            iterations_per_epoch=lambda run: train_images // run.batch_size,
            protected=protected_rows(search.rows),
        )
        trained = simulate(trials, stopper, slots=_slots(search))
        untrained = [epoch for name, record in trials.items() for epoch in record.epochs[trained[name] :]]
        ended = {name: record.epochs[trained[name] - 1] for name, record in trials.items()}
        stopped = [name for name in trials if name in stopper.stops and not ended[name].diverged]
        replayed.append(
            ReplayedRule(
                rule=rule,
                stopped=tuple(stopped),
                cut_short=tuple(
                    name for name, record in trials.items() if name not in stopper.stops and _ended_early(record)
                ),
                epochs_share_saved=len(untrained) / len(known),
                hours_saved=_hours(untrained, search),
                keeps_winner=winner not in stopped,
                best_miou=max(_best_miou(record.epochs[: trained[name]]) for name, record in trials.items()),
            )
        )
    return replayed


def _trials(search: SearchRecord) -> dict[str, ReportedTrial]:
    return {name: record for name, record in search.trials.items() if record.epochs}


def _winner(trials: Mapping[str, ReportedTrial]) -> str:
    return max(trials, key=lambda name: _best_miou(trials[name].epochs))


def _best_miou(epochs: Sequence[Epoch]) -> float:
    """Return the highest mIoU in percent; below everything measured if all epochs diverged."""
    best = best_of(epochs)
    return best.miou if best else -math.inf


def _slots(search: SearchRecord) -> int:
    return max(search.manifest.sessions[-1].trials_at_once, 1)


def simulate(trials: Mapping[str, ReportedTrial], stopper: Stopper, *, slots: int) -> dict[str, int]:
    """Return how many of its logged epochs each trial trains if `stopper` gets each when it ends.

    Trials, which have an epoch at least, start in their order on `slots` slots; one that is stopped or whose log ends
    frees its slot at once. Of epochs that end at the same moment, that of the trial started first comes first.
    """
    waiting = iter(range(len(trials)))
    names, records = list(trials), list(trials.values())
    running: list[tuple[float, int, int]] = []  # when its current epoch ends, start order, epochs trained by then
    trained = dict.fromkeys(names, 0)

    def start_next(now: float) -> None:
        order = next(waiting, None)
        if order is not None:
            heappush(running, (now + records[order].epochs[0].seconds, order, 1))

    for _ in range(slots):
        start_next(0.0)
    while running:
        now, order, count = heappop(running)
        name, record = names[order], records[order]
        epoch = record.epochs[count - 1]
        trained[name] = count
        reason = stopper.decide(record.run, name, epoch=epoch.epoch, miou=epoch.miou, diverged=epoch.diverged)
        if reason or count == len(record.epochs):
            start_next(now)
        else:
            heappush(running, (now + record.epochs[count].seconds, order, count + 1))
    return trained


def _ended_early(record: ReportedTrial) -> bool:
    return record.ended_at is not None and not record.epochs[-1].diverged


def _hours(epochs: Iterable[Epoch], search: SearchRecord) -> float:
    """Return device hours."""
    devices, _ = search.devices_per_trial
    return math.fsum(epoch.seconds for epoch in epochs) * devices / 3600


def replay_table(search: SearchRecord) -> Table:
    """Return a line for each rule. Marked: what the search was run with."""
    replayed = replay(search)
    if not replayed:
        return Table(text="No trial has completed yet, so there is nothing to replay.")
    trials, scheduler = _trials(search), search.manifest.config.scheduler
    winner_miou = _best_miou(trials[_winner(trials)].epochs)
    lines = []
    for outcome in replayed:
        rule = outcome.rule
        name = str(rule).split(" ")[0] if rule else "fifo"
        lines.append(
            {
                "rule": Marked(name) if rule == RULES[scheduler] else name,
                "grace": f"{rule.first_share:g}" if rule else "",
                "factor": str(rule.reduction_factor) if isinstance(rule, AshaRule) else "",
                "stops": str(len(outcome.stopped)),
                "epochs saved": f"{outcome.epochs_share_saved:.0%}",
                "hours saved": f"{outcome.hours_saved:,.2f}",
                "winner": "kept" if outcome.keeps_winner else "stopped",
                "best mIoU": f"{outcome.best_miou:.2f}",
                "loss": f"{winner_miou - outcome.best_miou:.2f}",
                "cut short": str(len(outcome.cut_short)),
            }
        )
    numbers = [title for title in lines[0] if title not in ("rule", "winner")]
    return Table(text=" ".join(_sentences(search, replayed)), lines=lines, numbers=numbers)


def _sentences(search: SearchRecord, replayed: Sequence[ReplayedRule]) -> list[str]:
    trials = _trials(search)
    winner = _winner(trials)
    epochs = [epoch for record in trials.values() for epoch in record.epochs]
    _, unit = search.devices_per_trial
    num_early = sum(map(_ended_early, trials.values()))
    early = (
        f"{num_early} of {len(trials)} trials ended early in this log: where a rule would have continued them they "
        "count as cut short, and savings beyond the log are not known. A search run with --scheduler fifo answers best."
    )
    return [
        f"What each rule would have done to this search, from its log alone: {counted(len(trials), 'trial')}, "
        f"{_slots(search)} at once, {counted(len(epochs), 'epoch')}, {_hours(epochs, search):,.2f} {unit}.",
        f"The winner is {winner} with {_best_miou(trials[winner].epochs):.2f} % mIoU; the loss is in points below "
        "that.",
        _advice(replayed),
        "Grace is the share of its epochs that a trial has before it is judged; with factor 3, about one in three "
        "continues from each rung. Marked: what the search was run with.",
        *([early] if num_early else []),
    ]


def _advice(replayed: Sequence[ReplayedRule]) -> str:
    keeping = [outcome for outcome in replayed if outcome.keeps_winner and outcome.hours_saved > 0]
    most = max((outcome.hours_saved for outcome in keeping), default=0.0)
    best = [outcome for outcome in keeping if outcome.hours_saved == most]
    if not best:
        return "No rule that keeps the winner saves anything."
    names = [str(outcome.rule) for outcome in best]
    names = names[:MOST_NAMED] + ([f"{len(names) - MOST_NAMED} more"] if names[MOST_NAMED:] else [])
    share = f"{best[0].epochs_share_saved:.0%}"
    return f"Of those that keep the winner, {' or '.join(names)} saves most: {share} of the epochs, in hindsight."
