"""What a run says of its optimizer is what the optimizer does, checked against updates written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from tune_bisenet.config import SGD, AdamW, Run
from tune_bisenet.training import optim
from tune_bisenet.training.model import BiSeNet


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def set_gradients(network: nn.Module, seed: int) -> list[Tensor]:
    """Random gradients, also returned in float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [parameter.grad.double() for parameter in network.parameters() if parameter.grad is not None]


def weights_of(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().double().clone() for parameter in network.parameters()]


def norm_of(network: nn.Module) -> float:
    """The L2 norm over all gradients at once, in float64."""
    gradients = [parameter.grad.double().flatten() for parameter in network.parameters() if parameter.grad is not None]
    return torch.cat(gradients).norm().item()


# --- updates ----------------------------------------------------------------------------------------------------


def test_sgd_updates_with_the_momentum_and_weight_decay_of_the_run(tiny_run: Run) -> None:
    run = tiny_run.model_copy(update={"optimizer": SGD(lr=0.1, momentum=0.8, weight_decay=0.03)})
    network = small_network()
    optimizer = optim.build(run, network)
    expected = weights_of(network)
    velocities = [torch.zeros_like(weight) for weight in expected]
    for step in range(3):
        gradients = set_gradients(network, seed=step)
        optimizer.step()
        for weight, velocity, gradient in zip(expected, velocities, gradients, strict=True):
            velocity.mul_(0.8).add_(gradient + 0.03 * weight)
            weight.sub_(0.1 * velocity)
    for found, weight in zip(weights_of(network), expected, strict=True):
        assert torch.allclose(found, weight, rtol=1e-5, atol=1e-6)


def test_adamw_updates_with_the_decoupled_weight_decay_of_the_run(tiny_run: Run) -> None:
    run = tiny_run.model_copy(update={"optimizer": AdamW(lr=0.01, weight_decay=0.3)})
    network = small_network()
    optimizer = optim.build(run, network)
    expected = weights_of(network)
    means, squares = ([torch.zeros_like(weight) for weight in expected] for _ in range(2))
    for step in range(1, 4):
        gradients = set_gradients(network, seed=step)
        optimizer.step()
        for weight, mean, square, gradient in zip(expected, means, squares, gradients, strict=True):
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            unbiased, spread = mean / (1 - 0.9**step), (square / (1 - 0.999**step)).sqrt()
            weight.sub_(0.01 * 0.3 * weight + 0.01 * unbiased / (spread + 1e-8))
    for found, weight in zip(weights_of(network), expected, strict=True):
        assert torch.allclose(found, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_norms_and_biases", [True, False])
def test_every_parameter_of_bisenet_is_trained_once(tiny_run: Run, decay_norms_and_biases: bool) -> None:
    network = BiSeNet()
    optimizer = optim.build(tiny_run.model_copy(update={"decay_norms_and_biases": decay_norms_and_biases}), network)
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in network.parameters())


def test_as_declared_all_parameters_decay_alike(tiny_run: Run) -> None:
    (group,) = optim.build(tiny_run, small_network()).param_groups
    assert group["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.1, momentum=0.9, weight_decay=0.5), AdamW(lr=0.1, weight_decay=0.5)], ids=["sgd", "adamw"]
)
def test_norms_and_biases_can_be_spared_weight_decay(tiny_run: Run, optimizer: SGD | AdamW) -> None:
    run = tiny_run.model_copy(update={"optimizer": optimizer, "decay_norms_and_biases": False})
    network = small_network()
    before = weights_of(network)
    stepper = optim.build(run, network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()  # without a gradient only decay moves a weight: by lr * decay
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


@pytest.mark.parametrize("decay_norms_and_biases", [True, False])
def test_there_is_one_rate_for_all_groups(tiny_run: Run, decay_norms_and_biases: bool) -> None:
    run = tiny_run.model_copy(update={"decay_norms_and_biases": decay_norms_and_biases})
    optimizer = optim.build(run, small_network())
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    optim.set_lr(optimizer, 0.007)
    assert {group["lr"] for group in optimizer.param_groups} == {0.007}


# --- clipping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.01, 3.0, 1e4])
def test_a_larger_gradient_is_scaled_down_to_the_largest_norm_allowed(factor: float) -> None:
    network = small_network()
    set_gradients(network, seed=0)
    scale_gradients(network, factor / norm_of(network))
    before = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    returned = optim.clip_gradients(network.parameters(), 1.0)
    assert returned.item() == pytest.approx(factor, rel=1e-5)
    assert norm_of(network) == pytest.approx(1.0, abs=1e-5)
    for old, parameter in zip(before, network.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, old / factor, rtol=1e-4)


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_smaller_gradient_is_left_as_it_is(max_grad_norm: float | None) -> None:
    network = small_network()
    set_gradients(network, seed=0)
    scale_gradients(network, 0.9 / norm_of(network))
    before = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    assert optim.clip_gradients(network.parameters(), max_grad_norm).item() == pytest.approx(0.9, rel=1e-5)
    for old, parameter in zip(before, network.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, old)


def test_without_a_limit_a_large_gradient_is_measured_and_left_as_it_is() -> None:
    network = small_network()
    set_gradients(network, seed=0)
    norm = norm_of(network)
    assert optim.clip_gradients(network.parameters(), None).item() == pytest.approx(norm, rel=1e-5)
    assert norm_of(network) == norm


def test_parameters_without_a_gradient_have_no_part_in_the_norm() -> None:
    network = small_network()
    set_gradients(network, seed=0)
    network[3].weight.grad = None
    norm = norm_of(network)
    assert optim.clip_gradients(network.parameters(), 1.0).item() == pytest.approx(norm, rel=1e-5)


def scale_gradients(network: nn.Module, factor: float) -> None:
    for parameter in network.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(factor)
