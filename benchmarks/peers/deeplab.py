"""DeepLabv3+ on a dilated ResNet-101, in plain PyTorch.

Names of ResNet's parameters are torchvision's. Between encoder and decoder there are plain 3 x 3
convolutions, as with a ResNet in the paper; depthwise ones belong to its Xception.

Source: Chen et al., ECCV 2018 (DeepLabv3+), section 3; He et al., CVPR 2016 (ResNet), table 1;
Chen et al., 2017 (DeepLabv3), section 3.3 (atrous spatial pyramid pooling).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4
"""A bottleneck's output channels over its inner ones."""
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
"""By output stride."""


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """x + conv1x1(conv3x3(conv1x1(x))), each with a batch norm; the stride is the 3 x 3's."""

    def __init__(self, inputs: int, width: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class DilatedResNet(nn.Module):
    """ResNet whose last stages trade their stride for dilation.

    Args:
        depths: blocks of the four stages; (3, 4, 23, 3) is ResNet-101.
        width: channels of the stem.
        output_stride: pixels per feature at the end, 32 (no dilation), 16 or 8.
    """

    def __init__(
        self, depths: Sequence[int] = (3, 4, 23, 3), width: int = 64, output_stride: int = 16
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs, reached, dilation = width, 4, 1
        for i, depth in enumerate(depths):
            stride, before = (1 if i == 0 else 2), dilation
            if reached * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reached *= stride
            blocks = []
            for j in range(depth):
                # The first block reads what has not been dilated yet.
                first = j == 0
                blocks.append(
                    Bottleneck(
                        inputs, width << i, stride if first else 1, before if first else dilation
                    )
                )
                inputs = EXPANSION * (width << i)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to the features at stride 4 and those at the output stride."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        low = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        return low, self.layer4(self.layer3(self.layer2(low)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1 x 1, three dilated 3 x 3 and the image's mean, fused."""

    def __init__(self, inputs: int, channels: int, rates: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(inputs, channels)]
            + [conv_bn_relu(inputs, channels, 3, dilation=rate) for rate in rates]
        )
        self.image = conv_bn_relu(inputs, channels)
        self.project = conv_bn_relu((2 + len(rates)) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.image(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1))


class DeepLabV3Plus(nn.Module):
    """Encoder, ASPP, and a decoder that adds detail from stride 4.

    Args:
        n_cls: number of classes K.
        output_stride: of the encoder. 16 is the paper's balance of speed and accuracy; 8 is what
            benchmarks on ADE20K usually train, at about three times the work.
        depths, width: see DilatedResNet.
        channels: of ASPP and decoder.

    Raises:
        ValueError: another output stride than 16 or 8.
    """

    def __init__(
        self,
        n_cls: int,
        output_stride: int = 16,
        depths: Sequence[int] = (3, 4, 23, 3),
        width: int = 64,
        channels: int = 256,
    ):
        super().__init__()
        if output_stride not in ATROUS_RATES:
            raise ValueError(f"output_stride must be 16 or 8, got {output_stride}")
        low, high = EXPANSION * width, EXPANSION * (width << 3)
        self.encoder = DilatedResNet(depths, width, output_stride)
        self.aspp = ASPP(high, channels, ATROUS_RATES[output_stride])
        self.low = conv_bn_relu(low, 48)
        self.decoder = nn.Sequential(
            conv_bn_relu(channels + 48, channels, 3), conv_bn_relu(channels, channels, 3)
        )
        self.classifier = nn.Conv2d(channels, n_cls, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, K, H / 4, W / 4)."""
        low, high = self.encoder(images)
        high = F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear")
        return self.classifier(self.decoder(torch.cat((high, self.low(low)), dim=1)))
