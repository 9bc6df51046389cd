"""Backward functions that cannot be differentiated again, with an error that says what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_derivative_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """torch.autograd.function.once_differentiable, but for its message."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *grads)
        given = [grad for grad in grads if grad is not None]
        if not torch.is_grad_enabled() or not given:
            return found
        return _NoSecond.apply(given[0], *found)

    return run


class _NoSecond(torch.autograd.Function):
    """Gradients as they are, and an error for who differentiates them by the first argument."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *grads: Tensor | None) -> Gradients:
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "resnet_fused: a fused convolution and batch norm in training have no second "
            "derivative: unfuse the model (resnet_fused.unfuse) to differentiate its gradients"
        )
