"""The paper's two families of networks, for ImageNet and CIFAR, with and without shortcuts.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2015 (https://arxiv.org/abs/1512.03385).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import (
    BasicBlock,
    Bottleneck,
    PlainBlock,
    ShortcutOption,
    conv3x3,
    init_weights,
    make_shortcut,
    positive,
)

Block = type[BasicBlock] | type[Bottleneck] | type[PlainBlock]
_BLOCKS = (BasicBlock, Bottleneck, PlainBlock)


def _stage(
    block: Block,
    in_channels: int,
    planes: int,
    *,
    blocks: int,
    stride: int,
    shortcut: ShortcutOption,
    groups: int = 1,
    base_width: int = 64,
) -> nn.Sequential:
    """`blocks` blocks in a row, the first of which has the stride."""
    layers: list[nn.Module] = []
    for i in range(blocks):
        step = stride if i == 0 else 1
        if issubclass(block, PlainBlock):
            layers.append(block(in_channels, planes, stride=step))
        else:
            out_channels = planes * block.expansion
            downsample = make_shortcut(in_channels, out_channels, stride=step, option=shortcut)
            layers.append(
                block(
                    in_channels,
                    planes,
                    stride=step,
                    downsample=downsample,
                    groups=groups,
                    base_width=base_width,
                )
            )
        in_channels = planes * block.expansion
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """A network for large images (the paper's table 1): ``[N, 3, H, W] -> [N, num_classes]``.

    Its state dict has the keys, shapes and order of torchvision's ResNet.

    Args:
        block: the kind of block; :class:`PlainBlock` gives the paper's plain network.
        layers: how many blocks each of the four stages has.
        groups: groups of the 3x3 convolution of a bottleneck (ResNeXt,
            https://arxiv.org/abs/1611.05431).
        width_per_group: 64 is ResNet, more is Wide ResNet (https://arxiv.org/abs/1605.07146).

    Raises:
        TypeError: for a block of another kind.
        ValueError: for a number that is not a positive integer, or not exactly four stages.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        positive("num_classes", num_classes)
        if not isinstance(block, type) or not issubclass(block, _BLOCKS):
            raise TypeError(f"block must be a kind of block of this package, got {block!r}")
        if not isinstance(layers, Sequence) or len(layers) != 4:
            raise ValueError(f"layers must have four numbers, one a stage, got {layers!r}")
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for i, blocks in enumerate(layers):
            stage = _stage(
                block,
                channels,
                64 * 2**i,
                blocks=positive("layers", blocks),
                stride=1 if i == 0 else 2,
                shortcut="B",
                groups=groups,
                base_width=width_per_group,
            )
            self.add_module(f"layer{i + 1}", stage)
            channels = 64 * 2**i * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(nn.Module):
    """A network for 32x32 images, section 4.2 of the paper: ``[N, 3, H, W] -> [N, num_classes]``.

    One 3x3 convolution, then three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64
    channels.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56 and 110 in the paper.
        shortcut: "A" zero padding, "B" projection where the shape changes, "C" projection
            everywhere; None: no shortcuts (the plain network).

    Raises:
        ValueError: for a depth that is not 6 n + 2, an unknown shortcut, or a bad `num_classes`.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, depth: int, *, num_classes: int = 10, shortcut: ShortcutOption | None = "A"
    ) -> None:
        super().__init__()
        positive("num_classes", num_classes)
        if positive("depth", depth) < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1 (20, 32, 44, ...), got {depth}")
        if shortcut not in ("A", "B", "C", None):
            raise ValueError(f"shortcut must be 'A', 'B' or 'C', got {shortcut!r}")
        block: Block = PlainBlock if shortcut is None else BasicBlock
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        channels = 16
        for i in range(3):
            stage = _stage(
                block,
                channels,
                16 * 2**i,
                blocks=(depth - 2) // 6,
                stride=1 if i == 0 else 2,
                shortcut=shortcut or "A",
            )
            self.add_module(f"layer{i + 1}", stage)
            channels = 16 * 2**i
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
