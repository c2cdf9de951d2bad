"""BiSeNet V1 with a ResNet-18 context path (Yu et al., 2018, https://arxiv.org/abs/1808.00897).

It knows nothing of losses, labels or pretrained weights. Logits leave the network at the resolution they are computed
at (1/8 and 1/16); callers that need pixels call `upsample`.

Shapes: B images, C classes, H x W pixels, H and W multiples of 32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.config import check_image_size


class Logits(NamedTuple):
    """Scores before the softmax; `aux` is empty for a network built without auxiliary heads."""

    main: Tensor  # B x C x H/8 x W/8
    aux: tuple[Tensor, ...]  # B x C x H/8 x W/8 and B x C x H/16 x W/16


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate bilinearly (pixel centres) to `size` (H, W), contiguously: strided logits slow the loss."""
    return F.interpolate(logits.contiguous(), size=size, mode="bilinear", align_corners=False)


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; padded so that stride 1 keeps the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ChannelGate(nn.Module):
    """One weight in (0, 1) for each channel, from the mean over the image (section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        gate: Tensor = self.norm(self.conv(features.mean((2, 3), keepdim=True))).sigmoid()
        return gate


class AttentionRefinement(nn.Module):
    """ARM: convolve to 128 channels, then weigh each by its gate (figure 2b)."""

    def __init__(self, inputs: int, outputs: int = 128) -> None:
        super().__init__()
        self.conv = ConvBNReLU(inputs, outputs, 3)
        self.gate = ChannelGate(outputs)

    def forward(self, features: Tensor) -> Tensor:
        features = self.conv(features)
        refined: Tensor = features * self.gate(features)
        return refined


class SpatialPath(nn.Sequential):
    """Three strided convolutions that keep detail: 1/8, 128 channels (section 3.1)."""

    def __init__(self) -> None:
        super().__init__(
            ConvBNReLU(3, 64, 7, stride=2),
            ConvBNReLU(64, 64, 3, stride=2),
            ConvBNReLU(64, 64, 3, stride=2),
            ConvBNReLU(64, 128, 1),
        )


class ContextPath(nn.Module):
    """ResNet-18 for a wide view; its two deepest stages, refined, come back at 1/8 and 1/16 with 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = resnet18(weights=None)
        self.resnet.fc = nn.Identity()  # the classifier is not part of BiSeNet
        self.global_context = ConvBNReLU(512, 128, 1)
        self.refine32 = AttentionRefinement(512)
        self.refine16 = AttentionRefinement(256)
        self.merge16 = ConvBNReLU(128, 128, 3)
        self.merge8 = ConvBNReLU(128, 128, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        resnet = self.resnet
        features = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
        at16 = resnet.layer3(resnet.layer2(resnet.layer1(features)))
        at32 = resnet.layer4(at16)
        context = self.global_context(at32.mean((2, 3), keepdim=True))
        merged16 = self.merge16(_double(self.refine32(at32) + context))
        merged8 = self.merge8(_double(self.refine16(at16) + merged16))
        return merged8, merged16


class FeatureFusion(nn.Module):
    """FFM: join both paths and let a gate decide which channels count twice (figure 2c)."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.conv = ConvBNReLU(channels, channels, 1)
        self.gate = ChannelGate(channels)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        features = self.conv(torch.cat((spatial, context), dim=1))
        fused: Tensor = features + features * self.gate(features)
        return fused


class Head(nn.Sequential):
    """Features to class scores at the same resolution."""

    def __init__(self, inputs: int, hidden: int, num_classes: int) -> None:
        super().__init__(ConvBNReLU(inputs, hidden, 3), nn.Conv2d(hidden, num_classes, 1))


class BiSeNet(nn.Module):
    """13,425,721 parameters with both auxiliary heads, 13,275,539 without, for the 19 classes of Cityscapes.

    `head_width` counts the channels of the hidden layer of the main head; each one more or less is 2,325 parameters.
    """

    def __init__(
        self, *, num_classes: int = len(CITYSCAPES), head_width: int = 256, auxiliary_heads: bool = True
    ) -> None:
        super().__init__()
        self.spatial = SpatialPath()
        self.context = ContextPath()
        self.fusion = FeatureFusion()
        self.head = Head(256, head_width, num_classes)
        self.aux8 = Head(128, 64, num_classes) if auxiliary_heads else None
        self.aux16 = Head(128, 64, num_classes) if auxiliary_heads else None
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("context.resnet."):  # that one is initialised
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Logits:  # B x 3 x H x W, normalised
        if not torch.compiler.is_exporting():  # then sizes are unknown, and declared to be multiples of 32
            check_image_size((images.shape[2], images.shape[3]))
        context8, context16 = self.context(images)
        main = self.head(self.fusion(self.spatial(images), context8))
        if self.aux8 is None or self.aux16 is None:
            return Logits(main, ())
        return Logits(main, (self.aux8(context8), self.aux16(context16)))


def _double(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2.0, mode="nearest")
