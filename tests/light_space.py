"""A sampled space of which training is arithmetic: its runs end at once, with what is right to the last digit."""

import math

import optuna
from optuna.trial import BaseTrial
from rows import plain_epoch, plain_row

from tune_bisenet.config import SGD, AdamW, CrossEntropy, Expect, Objective, Run, Sampler
from tune_bisenet.records import Epoch, Known, Param, Status, TrialSpec, TrialState, best_of
from tune_bisenet.spaces import DataFacts, Grid, RowOverrides, Sampled, resolve_runs
from tune_bisenet.study import sampling
from tune_bisenet.study.study import Question

NUM_EPOCHS = 3
FACTS = DataFacts(num_train=8, num_val=3, suggested_image_size=(32, 64))
UNLUCKY = 1.1
"""An auxiliary weight above this makes no run: one draw in four."""


# --- a space --------------------------------------------------------------------------------------------------------


def row(name: str, lr: float, *, momentum: float = 0.9, expect: Expect | None = None) -> Run:
    optimizer = SGD(lr=lr, momentum=momentum, weight_decay=1e-4)
    return plain_row(name, optimizer=optimizer, warmup=1, num_epochs=NUM_EPOCHS, image_size=(32, 64), expect=expect)


ROWS = (row("a", 0.01), row("b", 0.02, expect=Expect(gain=(0, 5), over="a")))


def sample(trial: BaseTrial) -> Run:
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        drawn = row("drawn", lr, momentum=trial.suggest_float("momentum", 0.5, 0.99))
    else:
        drawn = row("drawn", lr).model_copy(update={"optimizer": AdamW(lr=lr, weight_decay=1e-4)})
    aux_weight = trial.suggest_float("aux_weight", 0.0, 1.5)
    if aux_weight > UNLUCKY:
        raise ValueError(f"an auxiliary weight of {aux_weight:g} is out of luck")
    accumulation = trial.suggest_categorical("accumulation", [1, 2, 4])
    return drawn.model_copy(update={"loss": CrossEntropy(aux_weight=aux_weight), "accumulation": accumulation})


def point(run: Run) -> dict[str, Param]:
    assert isinstance(run.optimizer, SGD)
    return {
        "lr": run.optimizer.lr,
        "optimizer": "sgd",
        "momentum": run.optimizer.momentum,
        "aux_weight": run.loss.aux_weight,
        "accumulation": run.accumulation,
    }


SPACE = Sampled("around two rows", sample, around=Grid("two rows", ROWS), point=point)


def question(
    space: Sampled = SPACE,
    *,
    sampler: Sampler = "tpe",
    seed: int = 0,
    objectives: tuple[Objective, ...] = ("miou",),
) -> Question:
    draw = sampling.draw_with(space, RowOverrides(), FACTS, objectives)
    rows = resolve_runs(space.rows, RowOverrides(seeds=(seed,)), FACTS) if space.rows else ()
    declared = {one.name: one for one in space.rows}
    points = {run.name: sampling.point_of(declared[run.name], space, draw, objectives) for run in rows}
    return Question(
        draw=draw,
        rows={run.name: (run, points[run.name]) for run in rows},
        objectives=objectives,
        sampler=sampler,
        seed=seed,
    )


# --- training, by arithmetic ----------------------------------------------------------------------------------------


def miou_after(run: Run, epoch: int) -> float:
    """In percent: it peaks at a rate of 0.02, and half of what is missing comes with each epoch."""
    best = 60 - 8 * abs(math.log10(run.optimizer.lr / 0.02)) - run.loss.aux_weight - 0.1 * run.accumulation
    return best * (1 - 0.5**epoch)


def end_of(run: Run) -> tuple[int, Status]:
    """After which epoch a run ends, and how: large rates diverge, small ones are stopped."""
    if run.optimizer.lr > 0.06:
        return 2, "diverged"
    return (2, "stopped") if run.optimizer.lr < 0.003 else (run.num_epochs, "finished")


def curve_of(run: Run) -> list[Epoch]:
    """All its epochs."""
    last, status = end_of(run)
    return [
        plain_epoch(
            number,
            miou_after(run, number),
            iterations=2 * number,
            loss=math.nan if (status, number) == ("diverged", last) else 1 / number,
            loss_main=1 / number,
            lr=run.optimizer.lr,
            iou=(miou_after(run, number),) * 19,
        )
        for number in range(1, last + 1)
    ]


def ended(one: TrialSpec) -> TrialState:
    """How the trial stands at its end."""
    last, status = end_of(one.run)
    history = curve_of(one.run)
    best = best_of(history)
    return TrialState(
        trial=one.trial,
        run=one.run.name,
        seed=one.run.seed,
        num_epochs=one.run.num_epochs,
        status=status,
        epochs=last,
        best_miou=best.miou,
        best_epoch=best.epoch,
        last_miou=history[-1].miou,
        pixel_accuracy=90.0,
        seconds=2.0 * last,
    )


def earlier_trials(count: int) -> tuple[Known, ...]:
    """Trials of another search, drawn at random: enough of them, and the sampler knows what it is after."""
    draw = question().draw
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    known: list[Known] = []
    while len(known) < count:
        trial = study.ask()
        try:
            run = draw(trial).model_copy(update={"name": f"e{trial.number}"})
        except ValueError:
            continue
        drawn = sampling.Point(run=run, params=trial.params, distributions=trial.distributions)
        one = TrialSpec(
            trial=run.name,
            run=run,
            origin="sampled",
            number=trial.number,
            params=trial.params,
            distributions=drawn.ranges,
        )
        known.append(
            Known(suggested=one, standing=ended(one), epochs=tuple(curve_of(run)), source=f"/earlier/{run.name}")
        )
    return tuple(known)
