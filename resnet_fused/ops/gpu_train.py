"""A convolution in training by one of Triton's kernels (backends/triton/conv_bn_act.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from resnet_fused.backends.triton import configs
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.gpu import kernels

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups."""


def forward(
    data: Tensor,
    norm: Sequence[Any] | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = conv(act(bn(data))), and the mean and biased variance of its channels.

    Args:
        norm: mean, variance, weight, bias, eps, act and negative slope; None for conv(data).
        algorithm: a name of :data:`configs.BY_NAME`.
    """
    file = kernels("conv_bn_act")
    before = None if norm is None else file.Norm(*norm)
    config, precision = configs.BY_NAME[algorithm], gpu_choice.precision(data.dtype)
    return file.train_conv(data, before, weight, bias, *geometry, config, precision)


def backward_input(
    grad: Tensor,
    z: Tensor,
    norm: Sequence[Any],
    weight: Tensor,
    residual: Tensor | None,
    geometry: Geometry,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of act(bn(z)) plus `residual`, and those of the batch norm's weight and bias."""
    file = kernels("conv_bn_act")
    _, padding, dilation, _ = geometry
    return file.train_conv_backward_input(
        grad, weight, padding, dilation, residual, z, file.Norm(*norm),
        configs.BY_NAME[algorithm], gpu_choice.precision(grad.dtype),
    )  # fmt: skip
