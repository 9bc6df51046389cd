"""Blocks and images that the library's own training kernels take, and models to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import models


def big(kind: str, **options: Any) -> nn.Module:
    """A block that the library's own kernels take."""
    torch.manual_seed(1)
    builder = models.resnet18 if kind == "basic" else models.resnet50
    return builder(**options).layer2.train().to(memory_format=torch.channels_last)


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
