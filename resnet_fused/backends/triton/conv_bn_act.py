"""Starts :func:`conv_kernel.conv_kernel`: evaluation's fused step, and training's two.

Training's forward takes act(bn(z)) as it loads and gathers its output's statistics as it stores:
2 passes over activations where normalise, convolve, gather make 5. Its gradient by the input is the
same product with the kernel turned, for stride 1, and gathers the sums that the batch norm before
it needs: 3 passes for 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused.backends.triton.batch_statistics import combine, partial_table
from resnet_fused.backends.triton.bn_act import combine_sums
from resnet_fused.backends.triton.configs import TMA_BYTES, Config
from resnet_fused.backends.triton.conv_kernel import conv_kernel
from resnet_fused.backends.triton.launch import launch
from resnet_fused.backends.triton.tiles import ceil_div
from resnet_fused.ops.schema import conv_output_size


class Norm(NamedTuple):
    """act(bn(z)) with known statistics, as the kernels take it."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    act: str
    negative_slope: float


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    negative_slope: float,
    config: Config,
    precision: str,
) -> Tensor:
    """The operator of this name; the output is channels_last.

    Args:
        precision: of float32 products, "ieee" or "tf32".
    """
    x = input.contiguous(memory_format=torch.channels_last)
    size = conv_output_size(x.shape, weight, stride, padding, dilation)
    y = _empty(x, size)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    _launch(
        x, weight, y, (stride, padding, dilation, groups), config, precision, behind="affine",
        act=act, slope=negative_slope, scale=scale, shift=shift, residual=residual,
    )  # fmt: skip
    return y


def train_conv(
    input: Tensor,
    before: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: Config,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = conv(act(bn(input))) + bias, mean and biased variance of its channels.

    Args:
        before: None for conv(input).
    """
    x = input.contiguous(memory_format=torch.channels_last)
    z = _empty(x, conv_output_size(x.shape, weight, stride, padding, dilation))
    rows = z.shape[0] * z.shape[2] * z.shape[3]
    mean, square = partial_table(z, ceil_div(rows, config.block_m), z.shape[1])
    _launch(
        x, weight, z, (stride, padding, dilation, groups), config, precision, behind="statistics",
        before=before, slope=0.0 if before is None else before.negative_slope,
        shift=bias, tables=(mean, square),
    )  # fmt: skip
    return z, *combine(mean, square, rows, config.block_m)


def train_conv_backward_input(
    grad: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    dilation: Sequence[int],
    residual: Tensor | None,
    z: Tensor,
    norm: Norm,
    config: Config,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a = act(bn(z)) where conv(a), of stride 1 and one group, has gradient `grad`.

    Returns:
        That gradient plus `residual`, and the gradients of the batch norm's weight and bias.
    """
    g = grad.contiguous(memory_format=torch.channels_last)
    z = z.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    out = _empty(g, z.shape)
    kernel = weight.shape[2:]
    turned = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    rows = z.shape[0] * z.shape[2] * z.shape[3]
    product, sums = partial_table(g, ceil_div(rows, config.block_m), z.shape[1])
    _launch(
        g, weight.transpose(0, 1), out, ((1, 1), turned, dilation, 1), config, precision,
        turned=True, behind="gradient", act=norm.act, slope=norm.negative_slope,
        residual=residual, z=z, norm=norm, tables=(product, sums),
    )  # fmt: skip
    return out, *combine_sums(product, sums)


def _empty(like: Tensor, size: Sequence[int]) -> Tensor:
    # Inductor would fill what `empty(memory_format=)` makes, and copy it.
    n, c, h, w = size
    return torch.empty_strided(
        (n, c, h, w), (c * h * w, 1, w * c, c), dtype=like.dtype, device=like.device
    )


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    config: Config,
    precision: str,
    *,
    behind: str,
    turned: bool = False,
    act: str = "none",
    slope: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    before: Norm | None = None,
    z: Tensor | None = None,
    norm: Norm | None = None,
    tables: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """`turned` goes through the kernel's taps backwards."""
    if y.numel() == 0:
        return
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), groups = geometry
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    if kernel_h > 1 and kernel_w > 1 and weight.stride(2) != kernel_w * weight.stride(3):
        weight = weight.contiguous(memory_format=torch.channels_last)
    tap = weight.stride(3) if kernel_w > 1 else weight.stride(2)
    block_k = config.block_k_of(x.element_size())
    x_source: Any = x
    w_source: Any = weight
    tma = False
    if config.tma:
        rows, matrix = (
            x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]),
            weight[:, :, 0, 0].contiguous(),
        )
        tma = _describable(rows) and _describable(matrix)
        if tma:
            x_source = TensorDescriptor.from_tensor(rows, [config.block_m, block_k])
            w_source = TensorDescriptor.from_tensor(matrix, [config.block_n, block_k])
    if turned and not tma:
        w_source, tap = weight[:, :, -1, -1], -tap
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    blocks = ceil_div(pixels, config.block_m) * ceil_div(outputs // groups, config.block_n)
    launch(
        conv_kernel, (blocks, groups), x,
        x_source, w_source, y, scale, shift, residual,
        *_vectors(before), z, *_vectors(norm), *tables,
        x.shape[2], x.shape[3], x.shape[1], y.shape[2], y.shape[3], y.shape[1], pixels,
        group_channels, outputs // groups, weight.stride(0), tap, weight.stride(1),
        before.eps if before else 0.0, norm.eps if norm else 0.0, slope,
        R=kernel_h, S=kernel_w, STRIDE_H=stride_h, STRIDE_W=stride_w, PAD_H=pad_h, PAD_W=pad_w,
        DILATION_H=dilation_h, DILATION_W=dilation_w,
        BEFORE=before.act if before else None, BEHIND=behind, ACT=act, PRECISION=precision,
        TMA=tma, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can have it: start and rows aligned."""
    aligned = matrix.stride(0) * matrix.element_size() % TMA_BYTES == 0
    return aligned and matrix.data_ptr() % TMA_BYTES == 0


def _vectors(norm: Norm | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if norm is None else norm[:4]
