"""The optimizer of a run, its rate as a function of the iteration, and gradient clipping."""

from collections.abc import Iterable
from typing import Any, Final, assert_never

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


def build_optimizer(run: Run, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """Return the run's optimizer over all parameters of `model`, at the run's base rate.

    If it is `fused`, a step is one kernel for many weights, and the rate and AdamW's number of steps are tensors on the
    device, so that nothing waits for it. Its state is saved as that of any other, and any other's can be loaded.
    """
    groups = parameter_groups(model, decay_norms_and_biases=run.decay_norms_and_biases)
    config = run.optimizer
    optimizer: torch.optim.Optimizer
    match config:
        case SGD():
            optimizer = torch.optim.SGD(
                groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused or None
            )
        case AdamW():
            optimizer = torch.optim.AdamW(
                groups, config.lr, weight_decay=config.weight_decay, fused=fused or None, capturable=fused
            )
        case _:
            assert_never(config)
    if fused:
        lr = torch.tensor(config.lr, device=next(model.parameters()).device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.register_state_dict_post_hook(_plain_state)
        optimizer.register_load_state_dict_pre_hook(_fused_state)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all parameter groups, since a run has one. Does not wait for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


_PLAIN: Final = {"fused": None, "capturable": False}
"""What a state says of an optimizer that is not fused."""


def _plain_state(_optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a fused optimizer as one that is not fused has it: rates are floats, steps on the CPU."""
    groups = [
        group | {key: value for key, value in _PLAIN.items() if key in group} | {"lr": float(group["lr"])}
        for group in state["param_groups"]
    ]
    buffers = {
        index: {key: value.cpu() if key == "step" else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {"state": buffers, "param_groups": groups}


def _fused_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state for this fused optimizer; torch then moves its tensors to the device."""
    groups = [
        saved | {key: own[key] for key in _PLAIN if key in own} | {"lr": torch.full_like(own["lr"], saved["lr"])}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return state | {"param_groups": groups}


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
