"""The learning rate as a pure function of the iteration. One iteration is one micro-batch through the network."""

from tune_bisenet.config import WarmupPoly


def lr_at(schedule: WarmupPoly, base_lr: float, iteration: int, total_iterations: int) -> float:
    """The rate of iteration 0 .. total_iterations - 1; 0 from there on.

    Linear from `start_lr` to `base_lr` over the warm-up, then `base_lr * (1 - progress) ** power`,
    with `progress` counted from the end of the warm-up, so the two meet at `base_lr`.
    """
    warmup = schedule.warmup_iterations
    if iteration < warmup:
        return schedule.start_lr + (base_lr - schedule.start_lr) * iteration / warmup
    remaining = (total_iterations - iteration) / max(total_iterations - warmup, 1)
    # A negative base to a fractional power is a complex number in Python: past its end the rate stays 0.
    return base_lr * float(max(remaining, 0.0) ** schedule.power)
