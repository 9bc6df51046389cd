"""Batch norm by the compiled CUDA kernels, and what it is compared with.

That is eager PyTorch on a GPU. On a CPU, where the emulator runs the kernels, the plain formula in
the data's own precision stands in for it: eager batch norm there adds up in float64, which no GPU
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda_case import DEVICE, HAS_GPU, operators
from test_functional import plain_bn, plain_scale_shift
from torch import Tensor

from resnet_fused.backends import reference


def on_device(args: Sequence[Any]) -> list[Any]:
    """The arguments with every tensor where the kernels are."""
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]


class _BnAct(torch.autograd.Function):
    """The operators ``bn_act`` and ``bn_act_backward`` as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, options: Any) -> Any:
        y, mean, var = operators().bn_act(x, residual, weight, bias, *options)
        adds, linear = residual is not None, options[1] in ("none", "relu", "relu6", "leaky_relu")
        kept = None if linear else residual, y if adds and linear else None
        ctx.save_for_backward(x, *kept, mean, var, weight, bias)
        ctx.rest = *options, adds
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        gx, gr, gw, gb = operators().bn_act_backward(grad, *ctx.saved_tensors, *ctx.rest)
        weight, bias = ctx.saved_tensors[-2:]
        some = (None if weight is None else gw, None if bias is None else gb)
        return gx, *some, gr if ctx.rest[-1] else None, None


def bn_functions(act: str, eps: float = 1e-5) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of (x, weight, bias, residual): the kernels, and what they are compared with."""

    def plain(x: Tensor, weight: Any, bias: Any, residual: Any) -> Any:
        if HAS_GPU:
            return plain_bn(x, weight, bias, residual, act=act, eps=eps)
        y, mean, var = reference.bn_act(x, residual, weight, bias, eps, act, 0.1)
        return y, mean.detach(), var.detach()

    return lambda *args: _BnAct.apply(*args, (eps, act, 0.1)), plain


def scale_shift_functions(act: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same for a scale and a shift."""
    return (
        lambda *args: operators().scale_shift_act(*args, act, 0.1),
        lambda *args: plain_scale_shift(*args, act=act),
    )
