"""Optimizer steps against updates written out by hand, and rates against numbers computed apart from the code."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tune_bisenet.config import SGD, AdamW, Run, WarmupPoly
from tune_bisenet.training import optim
from tune_bisenet.training.model import BiSeNet
from tune_bisenet.training.optim import lr_at


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def set_gradients(network: nn.Module, *, seed: int = 0, norm: float | None = None) -> list[Tensor]:
    """Set random gradients, of this L2 norm all together if one is given; return copies."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    scale = 1.0 if norm is None else norm / norm_of(network)
    for gradient in gradients_of(network):
        gradient.mul_(scale)
    return [gradient.clone() for gradient in gradients_of(network)]


def gradients_of(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def weights_of(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().double().clone() for parameter in network.parameters()]


def norm_of(network: nn.Module) -> float:
    """Return the L2 norm over all gradients at once, in float64."""
    return torch.cat([gradient.double().flatten() for gradient in gradients_of(network)]).norm().item()


def assert_weights_are(network: nn.Module, expected: list[Tensor]) -> None:
    for found, weight in zip(weights_of(network), expected, strict=True):
        assert torch.allclose(found, weight, rtol=1e-5, atol=1e-6)


# --- updates ----------------------------------------------------------------------------------------------------


def test_sgd_updates_with_the_momentum_and_weight_decay_of_the_run(tiny_run: Run) -> None:
    run = tiny_run.model_copy(update={"optimizer": SGD(lr=0.1, momentum=0.8, weight_decay=0.03)})
    network = small_network()
    optimizer = optim.build_optimizer(run, network, fused=False)
    expected = weights_of(network)
    velocities = [torch.zeros_like(weight) for weight in expected]
    for step in range(3):
        gradients = [gradient.double() for gradient in set_gradients(network, seed=step)]
        optimizer.step()
        for weight, velocity, gradient in zip(expected, velocities, gradients, strict=True):
            velocity.mul_(0.8).add_(gradient + 0.03 * weight)
            weight.sub_(0.1 * velocity)
    assert_weights_are(network, expected)


def test_adamw_updates_with_the_decoupled_weight_decay_of_the_run(tiny_run: Run) -> None:
    run = tiny_run.model_copy(update={"optimizer": AdamW(lr=0.01, weight_decay=0.3)})
    network = small_network()
    optimizer = optim.build_optimizer(run, network, fused=False)
    expected = weights_of(network)
    means, squares = ([torch.zeros_like(weight) for weight in expected] for _ in range(2))
    for step in range(1, 4):
        gradients = [gradient.double() for gradient in set_gradients(network, seed=step)]
        optimizer.step()
        for weight, mean, square, gradient in zip(expected, means, squares, gradients, strict=True):
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            unbiased, spread = mean / (1 - 0.9**step), (square / (1 - 0.999**step)).sqrt()
            weight.sub_(0.01 * 0.3 * weight + 0.01 * unbiased / (spread + 1e-8))
    assert_weights_are(network, expected)


@pytest.mark.parametrize("decay_norms_and_biases", [True, False])
@pytest.mark.parametrize(
    "config", [SGD(lr=0.1, momentum=0.9, weight_decay=0.5), AdamW(lr=0.1, weight_decay=0.5)], ids=["sgd", "adamw"]
)
def test_a_fused_optimizer_as_on_a_gpu_trains_alike_and_continues_from_and_to_any_other(
    tiny_run: Run, config: SGD | AdamW, decay_norms_and_biases: bool
) -> None:
    """Weights after four steps, the optimizer saved and loaded after two, each time fused or not."""
    run = tiny_run.model_copy(update={"optimizer": config, "decay_norms_and_biases": decay_norms_and_biases})
    ends: dict[tuple[bool, bool], list[Tensor]] = {}
    states: dict[bool, dict[str, Any]] = {}
    for first in (False, True):
        for second in (False, True):
            network = small_network()
            optimizer = optim.build_optimizer(run, network, fused=first)
            for step in range(4):
                if step == 2:
                    states[first] = optimizer.state_dict()
                    optimizer = optim.build_optimizer(run, network, fused=second)
                    optimizer.load_state_dict(states[first])
                set_gradients(network, seed=step)
                optim.set_rate(optimizer, 0.1 / (step + 1))
                optimizer.step()
            ends[first, second] = weights_of(network)
    for end in ends.values():
        for found, expected in zip(end, ends[False, False], strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    plain, fused = (states[key] for key in (False, True))
    for group, expected in zip(fused["param_groups"], plain["param_groups"], strict=True):
        assert group == expected | {"lr": pytest.approx(expected["lr"], rel=1e-6)}
        assert type(group["lr"]) is float
    for index, values in plain["state"].items():
        for key, value in values.items():
            assert torch.allclose(fused["state"][index][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_norms_and_biases", [True, False])
def test_every_parameter_of_bisenet_is_trained_once(tiny_run: Run, decay_norms_and_biases: bool) -> None:
    network = BiSeNet()
    optimizer = optim.build_optimizer(
        tiny_run.model_copy(update={"decay_norms_and_biases": decay_norms_and_biases}), network, fused=False
    )
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in network.parameters())


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.1, momentum=0.9, weight_decay=0.5), AdamW(lr=0.1, weight_decay=0.5)], ids=["sgd", "adamw"]
)
def test_norms_and_biases_can_be_spared_weight_decay(tiny_run: Run, optimizer: SGD | AdamW) -> None:
    run = tiny_run.model_copy(update={"optimizer": optimizer, "decay_norms_and_biases": False})
    network = small_network()
    before = weights_of(network)
    stepper = optim.build_optimizer(run, network, fused=False)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()  # without a gradient only decay moves a weight: by lr * decay
    (group,) = optim.build_optimizer(tiny_run, network, fused=False).param_groups
    assert group["weight_decay"] == 1e-4, "as declared all decay alike"
    names = [name for name, _ in network.named_parameters()]
    for name, old, new in zip(names, before, weights_of(network), strict=True):
        factor = 0.95 if name in ("0.weight", "3.weight") else 1.0
        assert torch.allclose(new, factor * old, rtol=1e-6), name


def test_in_bisenet_only_convolutions_decay_when_norms_and_biases_are_spared() -> None:
    network = BiSeNet()
    decaying, spared = optim.parameter_groups(network, decay_norms_and_biases=False)
    convolutions = [id(module.weight) for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert sorted(id(parameter) for parameter in decaying["params"]) == sorted(convolutions)  # type: ignore[attr-defined]
    assert len(spared["params"]) == 2 * 36 + 3  # type: ignore[arg-type]  # the norms, and the biases of three classifiers


# --- clipping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.01, 3.0, 1e4])
def test_a_larger_gradient_is_scaled_down_to_the_largest_norm_allowed(factor: float) -> None:
    network = small_network()
    before = set_gradients(network, norm=factor)
    assert optim.clip_gradients(network.parameters(), 1.0).item() == pytest.approx(factor, rel=1e-5)
    assert norm_of(network) == pytest.approx(1.0, abs=1e-5)
    for old, new in zip(before, gradients_of(network), strict=True):
        assert torch.allclose(new, old / factor, rtol=1e-4)


@pytest.mark.parametrize(("norm", "max_grad_norm"), [(0.9, 1.0), (0.9, None), (30.0, None)])
def test_a_smaller_gradient_or_one_without_a_limit_is_measured_and_left_as_it_is(
    norm: float, max_grad_norm: float | None
) -> None:
    network = small_network()
    before = set_gradients(network, norm=norm)
    assert optim.clip_gradients(network.parameters(), max_grad_norm).item() == pytest.approx(norm, rel=1e-5)
    for old, new in zip(before, gradients_of(network), strict=True):
        assert torch.equal(new, old)


def test_parameters_without_a_gradient_have_no_part_in_the_norm() -> None:
    network = small_network()
    set_gradients(network)
    network[3].weight.grad = None
    norm = norm_of(network)
    assert optim.clip_gradients(network.parameters(), 1.0).item() == pytest.approx(norm, rel=1e-5)


# --- the rate ---------------------------------------------------------------------------------------------------

TOTAL = 37_150  # 50 epochs of 743 iterations: Cityscapes at batch 4
TABLE = WarmupPoly(warmup_iterations=1100, power=0.9)


ITERATIONS = (0, 1, 550, 1099, 1100, 18_575, 26_005, 37_149)
RATES = {
    0.01: (1e-6, 1.009e-5, 0.0050005, 0.00999091, 0.01, 0.0055058097, 0.0034766208, 7.921e-7),
    0.015: (1e-6, 1.46355e-5, 0.0075005, 0.0149863645, 0.015, 0.0082587146, 0.0052149312, 1.1882e-6),
    0.001: (1e-6, 1.9082e-6, 0.0005005, 0.0009990918, 0.001, 0.000550581, 0.0003476621, 7.92e-8),
}


@pytest.mark.parametrize("base_lr", RATES)
def test_the_rates_are_those_of_the_oracle_table(base_lr: float) -> None:
    rates = [lr_at(TABLE, base_lr, iteration, TOTAL) for iteration in ITERATIONS]
    assert rates == pytest.approx(RATES[base_lr], abs=1e-9, rel=0)
    assert rates == pytest.approx(RATES[base_lr], rel=2e-4)  # 1e-9 alone says little of a rate of 8e-8


def test_the_two_parts_meet_at_the_base_rate() -> None:
    before, joint, after = (lr_at(TABLE, 0.01, iteration, TOTAL) for iteration in (1099, 1100, 1101))
    assert joint == 0.01
    assert joint - before == pytest.approx((0.01 - 1e-6) / 1100, rel=1e-6)
    assert joint - after == pytest.approx(0.01 * 0.9 / (TOTAL - 1100), rel=1e-4)


@pytest.mark.parametrize("warmup_iterations", [0, 1, 1100, 2500])
def test_the_rate_rises_over_the_warmup_and_falls_ever_after(warmup_iterations: int) -> None:
    schedule = WarmupPoly(warmup_iterations=warmup_iterations, power=0.9)
    rates = [lr_at(schedule, 0.01, iteration, TOTAL) for iteration in range(TOTAL + 1)]
    rising, falling = rates[: warmup_iterations + 1], rates[warmup_iterations:]
    assert all(left < right for left, right in pairwise(rising))
    assert all(left > right for left, right in pairwise(falling))
    assert max(rates) == 0.01


@pytest.mark.parametrize("iteration", [TOTAL, TOTAL + 1, 10 * TOTAL])
def test_past_its_end_the_rate_is_a_real_zero(iteration: int) -> None:
    rate = lr_at(TABLE, 0.01, iteration, TOTAL)
    assert isinstance(rate, float)
    assert rate == 0.0


def test_a_run_that_is_all_warmup_has_a_rate_everywhere() -> None:
    schedule = WarmupPoly(warmup_iterations=4, power=0.9)
    rates = [lr_at(schedule, 0.01, iteration, 4) for iteration in range(8)]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
    assert rates[4:] == [0.0] * 4


def test_the_power_bends_the_decay() -> None:
    straight = WarmupPoly(warmup_iterations=0, power=1.0)
    assert [lr_at(straight, 1.0, iteration, 4) for iteration in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    square = WarmupPoly(warmup_iterations=0, power=2.0)
    assert lr_at(square, 1.0, 2, 4) == 0.25


def test_the_first_rate_is_a_field_of_the_schedule() -> None:
    assert lr_at(WarmupPoly(warmup_iterations=10, power=0.9, start_lr=0.002), 0.01, 0, 100) == 0.002
