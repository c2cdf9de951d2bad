"""Between a trial as its folder has it and the same in Optuna's words: names, states, values. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, assert_never

from optuna.distributions import json_to_distribution
from optuna.trial import FrozenTrial, Trial, create_trial
from optuna.trial import TrialState as OptunaState

from tune_bisenet.config import Objective
from tune_bisenet.records import Epoch, Status, TrialSpec, TrialState


def name_of(trial: FrozenTrial | Trial) -> str:
    """A trial's name in the search: that of its row, or its number in the study."""
    return str(trial.user_attrs.get("trial") or f"t{trial.number:04d}")


def told(trial: FrozenTrial) -> Status | None:
    """How the study was told that a trial ended; None if it has not."""
    if not trial.state.is_finished():
        return None
    status: Status = trial.user_attrs.get("status", "failed" if trial.state is OptunaState.FAIL else "finished")
    return status


def state_of(standing: TrialState, objectives: Sequence[Objective]) -> OptunaState:
    """A trial stopped early is pruned: its mIoU then is no final one. Optuna prunes only where there is one goal."""
    match standing.status:
        case "finished":
            return OptunaState.COMPLETE
        case "stopped" | "diverged":
            return OptunaState.PRUNED if len(objectives) == 1 else OptunaState.FAIL
        case "failed":
            return OptunaState.FAIL
        case "waiting" | "running":
            return OptunaState.WAITING
        case _:
            assert_never(standing.status)


def values_of(state: OptunaState, standing: TrialState, objectives: Sequence[Objective]) -> list[float] | None:
    """Of a complete trial its best mIoU, and latency if asked; of a pruned one its last mIoU, as Optuna gives it."""
    if state is OptunaState.PRUNED:
        return None if standing.last_miou is None else [standing.last_miou]
    if state is not OptunaState.COMPLETE:
        return None
    measured: dict[Objective, float | None] = {"miou": standing.best_miou, "latency": standing.latency_ms}
    values = [value for objective in objectives if (value := measured[objective]) is not None]
    assert len(values) == len(objectives), f"{standing.trial} finished without {' and '.join(objectives)}"
    return values


def frozen_trial(
    suggested: TrialSpec,
    standing: TrialState,
    epochs: Iterable[Epoch],
    objectives: Sequence[Objective],
    *,
    about: Mapping[str, Any],
) -> FrozenTrial:
    """A trial as it stands, here or in an earlier search; `about` is what a person is told beside what it trains."""
    state = state_of(standing, objectives)
    row = {"row": suggested.run.name} if suggested.origin == "row" else {}
    return create_trial(
        state=state,
        values=values_of(state, standing, objectives),
        params=dict(suggested.params),
        distributions={name: json_to_distribution(text) for name, text in suggested.distributions.items()},
        intermediate_values={epoch.epoch: epoch.miou for epoch in epochs},
        user_attrs={"trial": suggested.trial, "seed": suggested.run.seed, **row, **about},
    )
