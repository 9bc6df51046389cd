"""A convolution in training by one of Triton's kernels (backends/triton/conv_bn_act.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from resnet_fused.backends.triton import configs
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.gpu import kernels

if TYPE_CHECKING:
    from resnet_fused.ops.train_conv import Conv, Normalised, Source


def forward(
    data: Tensor, source: Source, conv: Conv, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """z = conv(source), and the mean and biased variance of its channels.

    Args:
        data: of the source, before it is normalised.
        algorithm: a name of :data:`configs.BY_NAME`.
    """
    return kernels("conv_bn_act").train_conv(
        data, None if source is data else _norm(source), *conv.parameters(data.dtype),
        conv.stride, conv.padding, conv.dilation, conv.groups,
        configs.BY_NAME[algorithm], gpu_choice.precision(data.dtype),
    )  # fmt: skip


def backward_input(
    grad: Tensor, source: Normalised, conv: Conv, residual: Tensor | None, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the source plus `residual`, and those of its batch norm's weight and bias."""
    return kernels("conv_bn_act").train_conv_backward_input(
        grad, conv.parameters(grad.dtype)[0], conv.padding, conv.dilation, residual,
        source.z, _norm(source), configs.BY_NAME[algorithm], gpu_choice.precision(grad.dtype),
    )  # fmt: skip


def _norm(source: Any) -> Any:
    return kernels("conv_bn_act").Norm(*source[1:])
