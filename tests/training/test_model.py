"""BiSeNet V1 as the paper and the public implementations have it, parameter for parameter."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.training.model import BiSeNet, upsample


def seeded_network(seed: int) -> BiSeNet:
    torch.manual_seed(seed)
    return BiSeNet()


@pytest.fixture(scope="module")
def network() -> BiSeNet:
    return seeded_network(0)


def num_parameters(module: nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_the_network_has_the_published_number_of_parameters(network: BiSeNet) -> None:
    assert num_parameters(network) == 13_425_721
    assert num_parameters(BiSeNet(auxiliary_heads=False)) == 13_275_539


def test_every_block_has_the_published_number_of_parameters(network: BiSeNet) -> None:
    context = network.context
    found = {
        "spatial path": num_parameters(network.spatial),
        "resnet": num_parameters(context.resnet),
        "global context": num_parameters(context.global_context),
        "ARM32": num_parameters(context.refine32),
        "ARM16": num_parameters(context.refine16),
        "merge16": num_parameters(context.merge16),
        "merge8": num_parameters(context.merge8),
        "FFM": num_parameters(network.fusion),
        "main head": num_parameters(network.head),
        "aux8": num_parameters(network.aux8),
        "aux16": num_parameters(network.aux16),
    }
    assert found == {
        "spatial path": 91_968,
        "resnet": 11_176_512,
        "global context": 65_792,
        "ARM32": 606_720,
        "ARM16": 311_808,
        "merge16": 147_712,
        "merge8": 147_712,
        "FFM": 132_096,
        "main head": 595_219,
        "aux8": 75_091,
        "aux16": 75_091,
    }
    assert sum(found.values()) == num_parameters(network)


@pytest.mark.parametrize("head_width", [1, 64, 256, 300])
def test_a_channel_of_the_main_heads_hidden_layer_costs_2325_parameters(head_width: int) -> None:
    network = BiSeNet(head_width=head_width, auxiliary_heads=False)
    assert num_parameters(network) == 13_275_539 + 2_325 * (head_width - 256)
    assert network.eval()(images(1, 32, 64)).main.shape == (1, len(CITYSCAPES), 4, 8)


def test_there_are_36_batchnorm_layers_and_only_the_classifiers_have_biases_beside_them(network: BiSeNet) -> None:
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 36
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    biased = [name for name, module in convolutions.items() if module.bias is not None]
    assert biased == ["head.1", "aux8.1", "aux16.1"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (128, 64)])
def test_scores_leave_at_an_eighth_and_a_sixteenth(network: BiSeNet, height: int, width: int, training: bool) -> None:
    logits = network.train(training)(images(2, height, width))
    assert logits.main.shape == (2, len(CITYSCAPES), height // 8, width // 8)
    assert [tuple(aux.shape) for aux in logits.aux] == [
        (2, len(CITYSCAPES), height // 8, width // 8),
        (2, len(CITYSCAPES), height // 16, width // 16),
    ]


def test_without_auxiliary_heads_the_main_scores_are_the_same(network: BiSeNet) -> None:
    alone = BiSeNet(auxiliary_heads=False)
    alone.load_state_dict({key: value for key, value in network.state_dict().items() if not key.startswith("aux")})
    found, expected = alone.eval()(images(1, 64, 64)), network.eval()(images(1, 64, 64))
    assert found.aux == ()
    assert torch.equal(found.main, expected.main)


def test_a_size_off_the_grid_is_refused(network: BiSeNet) -> None:
    with pytest.raises(ValueError, match="image size 64x100 is not a multiple of 32"):
        network(torch.zeros(1, 3, 64, 100))


def without_gradient(network: BiSeNet) -> set[str]:
    """Return the parts of the network with a parameter that no gradient reaches."""
    parameters = network.named_parameters()
    return {name.split(".")[0] for name, value in parameters if value.grad is None or not value.grad.any()}


def test_gradients_reach_every_parameter_from_the_three_heads(network: BiSeNet) -> None:
    network.train().zero_grad()
    logits = network(images(2, 64, 64))
    logits.main.square().mean().backward(retain_graph=True)
    assert without_gradient(network) == {"aux8", "aux16"}, "the main head trains everything else"
    sum(head.square().mean() for head in logits.aux).backward()
    assert without_gradient(network) == set()


def test_the_context_path_sees_the_whole_image(network: BiSeNet) -> None:
    """Global context lets every pixel answer to every other one; the spatial path alone would not."""
    given = images(1, 64, 512).requires_grad_()
    network.eval()(given).main[..., 0, 0].sum().backward()
    assert given.grad is not None
    assert given.grad[..., -1].any()


def test_one_seed_draws_the_same_weights() -> None:
    first, second, other = (seeded_network(seed) for seed in (3, 3, 4))
    assert all(torch.equal(left, right) for left, right in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head[1].weight, other.head[1].weight)


def test_a_backbone_computes_in_the_network_what_it_computes_alone() -> None:
    network, alone = BiSeNet().eval(), resnet18(weights=None).eval()
    network.context.resnet.load_state_dict(alone.state_dict(), strict=False)  # without the classifier
    seen: list[Tensor] = []
    network.context.resnet.layer4.register_forward_hook(lambda _module, _given, features: seen.append(features))
    given = images(1, 64, 64)
    network(given)
    by_torchvision = alone.fc(seen[0].mean((2, 3)))
    assert torch.allclose(by_torchvision, alone(given), atol=1e-5)


def test_upsampling_is_bilinear_between_pixel_centres_and_contiguous_whatever_the_layout() -> None:
    strided = torch.randn(2, len(CITYSCAPES), 4, 8).contiguous(memory_format=torch.channels_last)
    full_size = upsample(strided, (32, 64))
    assert full_size.is_contiguous()
    assert full_size.shape == (2, len(CITYSCAPES), 32, 64)
    assert torch.equal(full_size, upsample(strided.contiguous(), (32, 64)))
    assert upsample(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
