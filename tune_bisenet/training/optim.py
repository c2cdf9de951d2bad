"""The optimizer of a run, its rate as a function of the iteration, and gradient clipping."""

from collections.abc import Iterable
from typing import assert_never

import torch
from torch import Tensor, nn

from tune_bisenet.config import SGD, AdamW, Run, WarmupPoly


def lr_at(schedule: WarmupPoly, base_lr: float, iteration: int, total_iterations: int) -> float:
    """Return the rate of iteration 0 .. total_iterations - 1; 0 after that.

    Linear from `start_lr` to `base_lr` over the warm-up, then `base_lr * (1 - progress) ** power`,
    with `progress` counted from the end of the warm-up, so the two meet at `base_lr`.
    """
    warmup = schedule.warmup_iterations
    if iteration < warmup:
        return schedule.start_lr + (base_lr - schedule.start_lr) * iteration / warmup
    remaining = (total_iterations - iteration) / max(total_iterations - warmup, 1)
    # A negative base to a fractional power is a complex number in Python: past its end the rate stays 0.
    return base_lr * float(max(remaining, 0.0) ** schedule.power)


def build_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """Return the run's optimizer over all parameters of `model`, at the run's base rate."""
    groups = parameter_groups(model, decay_norms_and_biases=run.decay_norms_and_biases)
    config = run.optimizer
    match config:
        case SGD():
            return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        case AdamW():
            return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)
        case _:
            assert_never(config)


def parameter_groups(model: nn.Module, *, decay_norms_and_biases: bool) -> list[dict[str, object]]:
    """Return one group, or two, the second of which (parameters of at most one dimension) has no weight decay."""
    parameters = list(model.parameters())
    if decay_norms_and_biases:
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to an L2 norm of `max_norm` if theirs is larger; return the norm before that."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
