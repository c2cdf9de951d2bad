"""The neighbourhood of the ten planned runs: every row is one point of it, and what lies between them can be drawn.

Epochs and iterations are those of the rows' own scale, 50 epochs; a proxy shrinks what is drawn as it shrinks the rows.
"""

from optuna.trial import BaseTrial as Trial

from search_spaces.runs10 import SPACE as RUNS10
from tune_bisenet.config import OHEM, SGD, AdamW, Augment, CrossEntropy, Loss, Optimizer, Param, Run, WarmupPoly
from tune_bisenet.config import WeightedCrossEntropy as WeightedCE
from tune_bisenet.spaces import Sampled


def sample(trial: Trial) -> Run:
    """Draw one run."""
    clips = trial.suggest_categorical("clip_gradients", [False, True])
    return Run(
        name="drawn",
        optimizer=sample_optimizer(trial),
        schedule=WarmupPoly(
            warmup_iterations=trial.suggest_int("warmup_iterations", 500, 3000),
            power=trial.suggest_float("poly_power", 0.5, 2.0),
        ),
        loss=sample_loss(trial),
        accumulation=trial.suggest_categorical("accumulation", [1, 2, 4]),
        max_grad_norm=trial.suggest_float("max_grad_norm", 0.1, 10.0, log=True) if clips else None,
        augment=augment(trial.suggest_float("augment_strength", 0.0, 1.5)),
        decay_norms_and_biases=trial.suggest_categorical("decay_norms_and_biases", [False, True]),
    )


def sample_optimizer(trial: Trial) -> Optimizer:
    """Each optimizer has a rate and a weight decay of its own: what suits one means nothing to the other."""
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        return SGD(
            lr=trial.suggest_float("sgd_lr", 1e-3, 1e-1, log=True),
            momentum=trial.suggest_float("sgd_momentum", 0.8, 0.98),
            weight_decay=trial.suggest_float("sgd_weight_decay", 1e-5, 1e-2, log=True),
        )
    return AdamW(
        lr=trial.suggest_float("adamw_lr", 1e-4, 1e-2, log=True),
        weight_decay=trial.suggest_float("adamw_weight_decay", 1e-5, 1e-1, log=True),
    )


def sample_loss(trial: Trial) -> Loss:
    """Cross-entropy from plain (exponent 0) to class-weighted (1), or over hard pixels; perhaps Lovász towards the end."""
    aux_weight = trial.suggest_float("aux_weight", 0.0, 1.5)
    switches = trial.suggest_categorical("switch_to_lovasz", [False, True])
    lovasz_after = trial.suggest_int("lovasz_after", 20, 47) if switches else None
    if trial.suggest_categorical("loss", ["ce", "ohem"]) == "ohem":
        threshold = trial.suggest_float("ohem_threshold", 0.5, 0.9)
        return OHEM(aux_weight=aux_weight, threshold=threshold, lovasz_after=lovasz_after)
    exponent = trial.suggest_float("class_weight_exponent", 0.0, 1.0)
    if exponent == 0:
        return CrossEntropy(aux_weight=aux_weight, lovasz_after=lovasz_after)
    return WeightedCE(aux_weight=aux_weight, exponent=exponent, lovasz_after=lovasz_after)


def augment(strength: float) -> Augment:
    """No scaling and no jitter at 0, the rows' own augmentation at 1; flips are always drawn."""
    return Augment(min_scale=0.75**strength, max_scale=2.0**strength, jitter=0.4 * strength)


def point(row: Run) -> dict[str, Param]:
    """The values by which `sample` draws `row`."""
    return {
        **_optimizer_point(row.optimizer),
        **_loss_point(row.loss),
        **({} if row.max_grad_norm is None else {"max_grad_norm": row.max_grad_norm}),
        "clip_gradients": row.max_grad_norm is not None,
        "warmup_iterations": row.schedule.warmup_iterations,
        "poly_power": row.schedule.power,
        "accumulation": row.accumulation,
        "augment_strength": row.augment.jitter / 0.4,
        "decay_norms_and_biases": row.decay_norms_and_biases,
    }


def _optimizer_point(optimizer: Optimizer) -> dict[str, Param]:
    kind = optimizer.kind
    return {"optimizer": kind} | {f"{kind}_{name}": value for name, value in optimizer if name != "kind"}


def _loss_point(loss: Loss) -> dict[str, Param]:
    switch = {} if loss.lovasz_after is None else {"lovasz_after": loss.lovasz_after}
    common = {"aux_weight": loss.aux_weight, "switch_to_lovasz": loss.lovasz_after is not None, **switch}
    if isinstance(loss, OHEM):
        return {"loss": "ohem", "ohem_threshold": loss.threshold, **common}
    return {"loss": "ce", "class_weight_exponent": loss.exponent if isinstance(loss, WeightedCE) else 0.0, **common}


SPACE = Sampled("Around the ten planned runs", sample, around=RUNS10, point=point)
