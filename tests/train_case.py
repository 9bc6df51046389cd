"""Blocks and images that the library's own training kernels take, and models to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.models.blocks import BasicBlock, Bottleneck, conv1x1


def big(kind: str, **options: Any) -> nn.Module:
    """A block that the library's own kernels take."""
    torch.manual_seed(1)
    builder = models.resnet18 if kind == "basic" else models.resnet50
    return builder(**options).layer2.train().to(memory_format=torch.channels_last)


def small(kind: str, seed: int = 1) -> nn.Module:
    """A residual block small enough for what acts a GPU, with statistics that look trained.

    Args:
        kind: "basic" or "bottleneck", with " down" behind it for stride 2 and a projection.
    """
    torch.manual_seed(seed)
    make, planes = (BasicBlock, 16) if kind.startswith("basic") else (Bottleneck, 8)
    channels, outputs = 32 if "down" in kind else planes * make.expansion, planes * make.expansion
    options: dict[str, Any] = {}
    if "down" in kind:
        down = nn.Sequential(conv1x1(channels, outputs, stride=2), nn.BatchNorm2d(outputs))
        options = {"stride": 2, "downsample": down}
    return trained(make(channels, planes, **options))


def trained(module: nn.Module) -> nn.Module:
    """The module, its batch norms as after training."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
            nn.init.normal_(m.running_mean, 0, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module


def images(kind: str) -> Tensor:
    channels = 64 if kind == "basic" else 256
    return torch.randn(4, channels, 20, 18).to(memory_format=torch.channels_last)


def smooth(model: nn.Module) -> nn.Module:
    """The same with SiLU for ReLU.

    Where a ReLU's input is nearly 0, rounding decides its derivative; one such value among millions
    and a gradient differs in the third digit, in eager PyTorch as well.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.SiLU())
        smooth(child)
    return model


def results(model: nn.Module, x: Tensor, weigh: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Everything that a training step of a weighed sum gives, by name."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    weigh(y).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}
