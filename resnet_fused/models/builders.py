"""One function per network, with random weights; ``fused=True`` gives it already fused.

Every builder takes ``num_classes`` and ``fused``; ``resnet50(fused=True)`` is equivalent to
``resnet_fused.fuse(resnet50(), inplace=True)``. The CIFAR residual networks take ``shortcut`` as
well.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .blocks import BasicBlock, Bottleneck, PlainBlock, ShortcutOption
from .networks import CifarResNet, ResNet


def _finish(model: nn.Module, fused: bool) -> nn.Module:
    if not fused:
        return model
    from resnet_fused import fuse  # here, because resnet_fused imports this package

    return fuse(model, inplace=True)


def resnet18(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-18."""
    return _finish(ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes), fused)


def resnet34(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-34."""
    return _finish(ResNet(BasicBlock, [3, 4, 6, 3], num_classes=num_classes), fused)


def resnet50(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-50, stride on the 3x3 convolution (v1.5)."""
    return _finish(ResNet(Bottleneck, [3, 4, 6, 3], num_classes=num_classes), fused)


def resnet101(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-101."""
    return _finish(ResNet(Bottleneck, [3, 4, 23, 3], num_classes=num_classes), fused)


def resnet152(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-152."""
    return _finish(ResNet(Bottleneck, [3, 8, 36, 3], num_classes=num_classes), fused)


def resnext50_32x4d(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNeXt-50 32x4d (Xie et al. 2017, https://arxiv.org/abs/1611.05431)."""
    return _finish(
        ResNet(Bottleneck, [3, 4, 6, 3], num_classes=num_classes, groups=32, width_per_group=4),
        fused,
    )


def resnext101_32x8d(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNeXt-101 32x8d."""
    return _finish(
        ResNet(Bottleneck, [3, 4, 23, 3], num_classes=num_classes, groups=32, width_per_group=8),
        fused,
    )


def wide_resnet50_2(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """Wide ResNet-50-2 (Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146)."""
    return _finish(
        ResNet(Bottleneck, [3, 4, 6, 3], num_classes=num_classes, width_per_group=128), fused
    )


def wide_resnet101_2(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """Wide ResNet-101-2."""
    return _finish(
        ResNet(Bottleneck, [3, 4, 23, 3], num_classes=num_classes, width_per_group=128), fused
    )


def plain18(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-18 without shortcuts."""
    return _finish(ResNet(PlainBlock, [2, 2, 2, 2], num_classes=num_classes), fused)


def plain34(*, num_classes: int = 1000, fused: bool = False) -> nn.Module:
    """ResNet-34 without shortcuts."""
    return _finish(ResNet(PlainBlock, [3, 4, 6, 3], num_classes=num_classes), fused)


def _residual_cifar(
    depth: int, num_classes: int, shortcut: ShortcutOption, fused: bool
) -> nn.Module:
    if shortcut not in ("A", "B", "C"):
        raise ValueError(f"shortcut must be 'A', 'B' or 'C', got {shortcut!r}")
    return _finish(CifarResNet(depth, num_classes=num_classes, shortcut=shortcut), fused)


def resnet20(
    *, num_classes: int = 10, shortcut: ShortcutOption = "A", fused: bool = False
) -> nn.Module:
    """ResNet-20 for CIFAR, 3 blocks a stage."""
    return _residual_cifar(20, num_classes, shortcut, fused)


def resnet32(
    *, num_classes: int = 10, shortcut: ShortcutOption = "A", fused: bool = False
) -> nn.Module:
    """ResNet-32 for CIFAR, 5 blocks a stage."""
    return _residual_cifar(32, num_classes, shortcut, fused)


def resnet44(
    *, num_classes: int = 10, shortcut: ShortcutOption = "A", fused: bool = False
) -> nn.Module:
    """ResNet-44 for CIFAR, 7 blocks a stage."""
    return _residual_cifar(44, num_classes, shortcut, fused)


def resnet56(
    *, num_classes: int = 10, shortcut: ShortcutOption = "A", fused: bool = False
) -> nn.Module:
    """ResNet-56 for CIFAR, 9 blocks a stage."""
    return _residual_cifar(56, num_classes, shortcut, fused)


def resnet110(
    *, num_classes: int = 10, shortcut: ShortcutOption = "A", fused: bool = False
) -> nn.Module:
    """ResNet-110 for CIFAR, 18 blocks a stage."""
    return _residual_cifar(110, num_classes, shortcut, fused)


def plain20(*, num_classes: int = 10, fused: bool = False) -> nn.Module:
    """ResNet-20 for CIFAR without shortcuts."""
    return _finish(CifarResNet(20, num_classes=num_classes, shortcut=None), fused)


def plain32(*, num_classes: int = 10, fused: bool = False) -> nn.Module:
    """ResNet-32 for CIFAR without shortcuts."""
    return _finish(CifarResNet(32, num_classes=num_classes, shortcut=None), fused)


def plain44(*, num_classes: int = 10, fused: bool = False) -> nn.Module:
    """ResNet-44 for CIFAR without shortcuts."""
    return _finish(CifarResNet(44, num_classes=num_classes, shortcut=None), fused)


def plain56(*, num_classes: int = 10, fused: bool = False) -> nn.Module:
    """ResNet-56 for CIFAR without shortcuts."""
    return _finish(CifarResNet(56, num_classes=num_classes, shortcut=None), fused)


#: Every builder by its name.
MODELS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        wide_resnet50_2,
        wide_resnet101_2,
        plain18,
        plain34,
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
        plain20,
        plain32,
        plain44,
        plain56,
    )
}
