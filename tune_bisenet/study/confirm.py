"""Fresh seeds for the best: the best of many looks better than it is, so it is trained anew before it is believed.

Three runs are trained with the same seeds, by none of which they were chosen: the best that the sampler found, the best
declared row, and the row that others are measured against.
"""

from collections.abc import Iterable, Mapping, Sequence

from tune_bisenet.config import Run
from tune_bisenet.records import Known, TrialSpec, TrialState


def fresh_runs(
    suggested: Mapping[str, TrialSpec],
    standings: Sequence[TrialState],
    known: Sequence[Known],
    *,
    rows: Mapping[str, Run],
    baseline: str | None,
    count: int,
) -> list[Run]:
    """The runs to train, seed by seed; none as long as no sampled trial has been trained to its end."""
    own = [(suggested[standing.trial], standing) for standing in standings if standing.trial in suggested]
    chosen_from = [(one, standing) for one, standing in own if one.origin != "confirm"]
    chosen_from += [(one.suggested, one.standing) for one in known]
    best = _best(one for one in chosen_from if one[0].origin == "sampled")
    if best is None:
        return []
    best_row = _best(one for one in chosen_from if one[0].origin == "row")
    compared = [
        best,
        *([rows[baseline]] if baseline is not None and baseline in rows else []),
        *([best_row] if best_row else []),
    ]
    different = list({run.name: run for run in compared}.values())
    first = 1 + max(one.run.seed for one, _standing in chosen_from)
    return [run.model_copy(update={"seed": seed}) for seed in range(first, first + count) for run in different]


def _best(trials: Iterable[tuple[TrialSpec, TrialState]]) -> Run | None:
    """The run of the highest mIoU among those trained to their end; None if none was."""
    finished = [
        (standing.best_miou, one.run)
        for one, standing in trials
        if standing.status == "finished" and standing.best_miou is not None
    ]
    return max(finished, key=lambda pair: pair[0])[1] if finished else None
