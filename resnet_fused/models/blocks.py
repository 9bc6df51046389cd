"""The building blocks of the networks in this package, in plain PyTorch.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2015 (https://arxiv.org/abs/1512.03385).
Attribute names and their order are torchvision's, so that state dicts are interchangeable.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ShortcutOption = Literal["A", "B", "C"]


def positive(name: str, value: object) -> int:
    """Demand a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _check_block(
    in_channels: int, planes: int, stride: int, downsample: object = None, **widths: int
) -> None:
    numbers = {"in_channels": in_channels, "planes": planes, "stride": stride, **widths}
    for name, value in numbers.items():
        positive(name, value)
    if downsample is not None and not isinstance(downsample, nn.Module):
        raise TypeError(f"downsample must be a module or None, got {type(downsample).__name__}")


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False
    )


def conv1x1(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A of the paper: y = x[:, :, ::s, ::s] with zero channels appended; no parameters.

    ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / s), ceil(W / s)]``
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        positive("stride", stride)
        if positive("out_channels", out_channels) < positive("in_channels", in_channels):
            raise ValueError(
                f"out_channels must be at least in_channels ({in_channels}), got {out_channels}"
            )
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


def make_shortcut(
    in_channels: int, out_channels: int, *, stride: int, option: ShortcutOption
) -> nn.Module | None:
    """The shortcut of one block, None for the identity (section 4.1 of the paper).

    A pads with zeros where the shape changes, B projects (1x1 conv and BN) where the shape
    changes, C projects always.
    """
    changes = stride != 1 or in_channels != out_channels
    if option == "A" and changes:
        return ZeroPadShortcut(in_channels, out_channels, stride=stride)
    if option == "C" or (option == "B" and changes):
        return nn.Sequential(
            conv1x1(in_channels, out_channels, stride=stride), nn.BatchNorm2d(out_channels)
        )
    return None


class BasicBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions 3x3."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        _check_block(in_channels, planes, stride, downsample)
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock has groups=1 and base_width=64 only, got {groups} and {base_width}"
            )
        self.conv1 = conv3x3(in_channels, planes, stride=stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3, 1x1.

    The stride sits on the 3x3 convolution, as in torchvision ("v1.5"); the paper had it on the
    first 1x1.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        _check_block(
            in_channels, planes, stride, downsample, groups=groups, base_width=base_width
        )  # fmt: skip
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride=stride, groups=groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class PlainBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x)))))): the paper's block without a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int = 1) -> None:
        super().__init__()
        _check_block(in_channels, planes, stride)
        self.conv1 = conv3x3(in_channels, planes, stride=stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


def init_weights(model: nn.Module) -> None:
    """Initialise as torchvision: convolutions by Kaiming (fan_out, relu), BN to the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
