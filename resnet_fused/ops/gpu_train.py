"""A convolution in training by one of the kernels for a GPU: the compiled ones, or Triton's
(backends/triton/conv_bn_act.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import cuda_conv
from resnet_fused.backends.triton import configs
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.gpu import kernels

_ops = torch.ops.resnet_fused

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
        algorithm: a name of :data:`cuda_conv.BY_NAME` or :data:`configs.BY_NAME`.
    """
    if algorithm in cuda_conv.BY_NAME:
        *pairs, groups = geometry
        before = ([], 0.0, "none", 0.0) if norm is None else (_vectors(norm), *norm[4:])
        return _ops._cuda_train_conv(
            data, *before, weight, None if bias is None else bias.float(), _flat(pairs), groups,
            algorithm,
        )  # fmt: skip
    file = kernels("conv_bn_act")
    of_file = None if norm is None else file.Norm(*norm)
    config, precision = configs.BY_NAME[algorithm], gpu_choice.precision(data.dtype)
    return file.train_conv(data, of_file, weight, bias, *geometry, config, precision)


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
    if algorithm in cuda_conv.BY_NAME:
        return _ops._cuda_train_conv_input(
            _channels_last(grad), z, _vectors(norm), *norm[4:], weight, residual,
            _flat(geometry[:3]), algorithm,
        )  # fmt: skip
    file = kernels("conv_bn_act")
    _, padding, dilation, _ = geometry
    return file.train_conv_backward_input(
        grad, weight, padding, dilation, residual, z, file.Norm(*norm),
        configs.BY_NAME[algorithm], gpu_choice.precision(grad.dtype),
    )  # fmt: skip


def backward_tensor_input(
    grad: Tensor, weight: Tensor, residual: Tensor | None, geometry: Geometry, algorithm: str
) -> Tensor:
    """The gradient of what a convolution of stride 1 and one group reads, plus `residual`."""
    packed = cuda_conv.Packed.of(weight, 1, algorithm, turned=True)
    _, padding, dilation, _ = geometry
    turned = [d * (k - 1) - p for d, k, p in zip(dilation, packed.kernel, padding, strict=True)]
    return packed(
        _channels_last(grad), None, None, residual, [1, 1], turned, list(dilation), "none", 0.0
    )


def _vectors(norm: Sequence[Any]) -> list[Tensor]:
    """Mean, variance, weight and bias; an empty tensor for one that is not there."""
    none = norm[0].new_empty(0)
    return [none if v is None else v for v in norm[:4]]


def _flat(pairs: Sequence[Sequence[int]]) -> list[int]:
    return [n for pair in pairs for n in pair]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)
