"""Batch norm in training with residual addition and activation, forward and backward.

Forward is two passes: statistics (reads x), then normalise, add and activate (reads x and the
residual, writes y). Backward is two as well:

    sums:   g = dy · act'(·);  dβ = Σ g,  dγ = Σ g · x̂          reads dy, x (y or the residual)
    input:  dx = γ / √(var + eps) · (g − dβ/n − x̂ · dγ/n)       reads dy, x, writes dx

act' is computed again from x, or read off y where a residual was added; g, the residual's gradient,
is written by the first pass where there is one. 4 + 5 passes where eager PyTorch's batch norm and
relu make 5 + 8. Ioffe and Szegedy, *Batch Normalization* (2015), section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.activation import activate_backward
from resnet_fused.backends.triton.batch_statistics import (
    COMBINED,
    LOADS,
    batch_statistics,
    combining,
    groups,
    partial_table,
)
from resnet_fused.backends.triton.launch import launch
from resnet_fused.backends.triton.scale_shift_act import normalize_act
from resnet_fused.backends.triton.tiles import (
    ceil_div,
    channel_vector,
    norm_vectors,
    tile_of_program,
    tile_offsets,
)


@triton.jit
def partial_sums_kernel(
    p_grad, p_x, p_residual, p_output, p_mean, p_var, p_weight, p_bias,
    p_grad_residual, p_product, p_sum, rows, channels, pixels, chunk, eps, slope,
    ACT: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ g · x̂ and Σ g of each channel over a chunk of rows; g is written where it is wanted."""
    blocks = tl.cdiv(channels, BLOCK_C)
    i_chunk = (tl.program_id(0) // blocks).to(tl.int64)
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, rows)
    mean, rstd, weight, bias = norm_vectors(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=LOADS):
        o_r = start + tl.arange(0, BLOCK_R)
        mask = (o_r < end)[:, None] & m_c[None, :]
        offsets = tile_offsets(o_r, o_c, channels, pixels, LAYOUT)
        b_grad = tl.load(p_grad + offsets, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)
        b_xhat = (b_x - mean[None, :]) * rstd[None, :]
        if p_output is not None:
            argument = tl.load(p_output + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            argument = b_xhat * weight[None, :] + bias[None, :]
            if p_residual is not None:
                argument += tl.load(p_residual + offsets, mask=mask, other=0.0).to(tl.float32)
        b_grad = activate_backward(b_grad, argument, slope, ACT)
        if p_grad_residual is not None:
            tl.store(
                p_grad_residual + offsets, b_grad.to(p_grad_residual.dtype.element_ty), mask=mask
            )
        # A masked element has grad 0, but x̂ of 0 may be infinite.
        products += tl.where(mask, b_grad * b_xhat, 0.0)
        sums += tl.where(mask, b_grad, 0.0)
    tl.store(p_product + i_chunk * channels + o_c, tl.sum(products, 0), mask=m_c)
    tl.store(p_sum + i_chunk * channels + o_c, tl.sum(sums, 0), mask=m_c)


@triton.jit
def combine_sums_kernel(
    p_partial_product, p_partial_sum, p_product, p_sum, channels, chunks, group,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of every `group` chunks added up, in a fixed order."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    i_group = tl.program_id(1).to(tl.int64)
    begin = i_group * group
    end = tl.minimum(begin + group, chunks)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=2):
        o_r = start + tl.arange(0, BLOCK_R)
        mask = (o_r < end)[:, None] & m_c[None, :]
        offsets = o_r[:, None] * channels + o_c[None, :]
        products += tl.load(p_partial_product + offsets, mask=mask, other=0.0)
        sums += tl.load(p_partial_sum + offsets, mask=mask, other=0.0)
    tl.store(p_product + i_group * channels + o_c, tl.sum(products, 0), mask=m_c)
    tl.store(p_sum + i_group * channels + o_c, tl.sum(sums, 0), mask=m_c)


@triton.jit
def grad_input_kernel(
    p_grad, p_x, p_mean, p_var, p_weight, p_bias, p_product, p_sum, p_grad_input,
    rows, channels, pixels, eps, slope, one_nth,
    ACT: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a tile, from the sums over all rows and one over their number."""
    o_c, m_c, offsets, mask = tile_of_program(rows, channels, pixels, LAYOUT, BLOCK_R, BLOCK_C)
    b_grad = tl.load(p_grad + offsets, mask=mask).to(tl.float32)
    b_x = tl.load(p_x + offsets, mask=mask).to(tl.float32)
    mean, rstd, weight, bias = norm_vectors(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    b_xhat = (b_x - mean[None, :]) * rstd[None, :]
    argument = b_xhat * weight[None, :] + bias[None, :]
    b_grad = activate_backward(b_grad, argument, slope, ACT)
    one_nth = tl.cast(one_nth, tl.float32)  # a plain / costs two roundings, an exact one registers
    mean_product = channel_vector(p_product, o_c, m_c, 0.0) * one_nth
    mean_grad = channel_vector(p_sum, o_c, m_c, 0.0) * one_nth
    scale = rstd * weight
    b_dx = (b_grad - mean_grad[None, :] - b_xhat * mean_product[None, :]) * scale[None, :]
    tl.store(p_grad_input + offsets, b_dx.to(p_grad_input.dtype.element_ty), mask=mask)


def bn_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of this name."""
    x = tiles.dense(input)
    mean, var = batch_statistics(x)
    y = normalize_act(x, residual, mean, var, weight, bias, eps, act, negative_slope)
    return y, mean, var


def bn_act_backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of this name: both halves."""
    x = tiles.dense(input)
    grad = tiles.matching(grad_output, x)
    grad_residual, grad_weight, grad_bias = bn_act_backward_sums(
        grad, x, residual, output, mean, var, weight, bias, eps, act, negative_slope, has_residual
    )
    count = max(x.numel() // max(x.shape[1], 1), 1)
    grad, act = (grad_residual, "none") if has_residual else (grad, act)
    grad_input = bn_act_backward_input(
        grad, x, mean, var, weight, bias, grad_weight, grad_bias, eps, act, negative_slope, count
    )
    return grad_input, grad_residual, grad_weight, grad_bias


def bn_act_backward_sums(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of this name."""
    x = tiles.dense(input)
    grad = tiles.matching(grad_output, x)
    residual, output = (None if t is None else tiles.matching(t, x) for t in (residual, output))
    grad_residual = tiles.empty_like(x) if has_residual else x.new_empty(0)
    cut = tiles.cut(x, reduces=True)
    product, sums = partial_table(x, cut.chunks, cut.channels)
    launch(
        partial_sums_kernel, (cut.chunks * cut.channel_blocks,), x,
        grad, x, residual, output, mean, var, weight, bias,
        grad_residual if has_residual else None, product, sums,
        *cut.shape, cut.chunk, eps, negative_slope, ACT=act, **cut.meta,
    )  # fmt: skip
    return grad_residual, *combine_sums(product, sums)


def combine_sums(product: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias from their parts, one row a chunk; 0 of none."""
    chunks, channels = product.shape
    if chunks == 0:
        return product.new_zeros(channels), product.new_zeros(channels)
    for group in groups(chunks):
        parts = ceil_div(chunks, group)
        merged = partial_table(product, parts, channels)
        launch(
            combine_sums_kernel, (ceil_div(channels, COMBINED), parts), product,
            product, sums, *merged, channels, chunks, group, **combining(group),
        )  # fmt: skip
        (product, sums), chunks = merged, parts
    return product[0], sums[0]


def bn_act_backward_input(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
    count: int,
) -> Tensor:
    """The operator of this name."""
    x = tiles.dense(input)
    grad = tiles.matching(grad_output, x)
    dx = tiles.empty_like(x)
    cut = tiles.cut(x)
    launch(
        grad_input_kernel, (cut.count,), x,
        grad, x, mean, var, weight, bias, grad_weight, grad_bias, dx,
        *cut.shape, eps, negative_slope, 1.0 / max(count, 1), ACT=act, **cut.meta,
    )  # fmt: skip
    return dx
