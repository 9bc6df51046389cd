"""y = act(x · scale[c] + shift[c] (+ residual)), and the same around x̂, in one pass over memory.

Reads x (and the residual), writes y: 2 (3) passes over an activation, where eager PyTorch's batch
norm, addition and relu make 2 + 3 + 2. Any layout of ``tiles.py``; arithmetic in float32, rounded
once. Ioffe and Szegedy, *Batch Normalization* (2015), algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.activation import activate
from resnet_fused.backends.triton.launch import launch
from resnet_fused.backends.triton.tiles import channel_vector, norm_vectors, tile_of_program


@triton.jit
def scale_shift_act_kernel(
    p_x, p_mean, p_var, p_weight, p_bias, p_residual, p_y,
    rows, channels, pixels, eps, slope,
    ACT: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalises by mean and variance where there are any, then · weight + bias."""
    o_c, m_c, offsets, mask = tile_of_program(rows, channels, pixels, LAYOUT, BLOCK_R, BLOCK_C)
    b_x = tl.load(p_x + offsets, mask=mask).to(tl.float32)
    if p_mean is not None:
        mean, rstd, weight, bias = norm_vectors(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
        b_y = (b_x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    else:
        weight = channel_vector(p_weight, o_c, m_c, 1.0)
        b_y = b_x * weight[None, :] + channel_vector(p_bias, o_c, m_c, 0.0)[None, :]
    if p_residual is not None:
        b_y += tl.load(p_residual + offsets, mask=mask).to(tl.float32)
    b_y = activate(b_y, slope, ACT)
    tl.store(p_y + offsets, b_y.to(p_y.dtype.element_ty), mask=mask)


def scale_shift_act(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    negative_slope: float,
    *,
    output: Tensor | None = None,
) -> Tensor:
    """The operator of this name, also without vectors; `output` may be the input itself."""
    return _run(input, residual, None, None, scale, shift, 0.0, act, negative_slope, output)


def normalize_act(
    input: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
) -> Tensor:
    """The operator of this name: y = act(x̂ · weight + bias (+ residual))."""
    return _run(input, residual, mean, var, weight, bias, eps, act, negative_slope, None)


def _run(
    input: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    output: Tensor | None,
) -> Tensor:
    x = tiles.dense(input)
    y = tiles.empty_like(x) if output is None else output
    if residual is not None:
        residual = tiles.matching(residual, x)
    cut = tiles.cut(x)
    launch(
        scale_shift_act_kernel, (cut.count,), x,
        x, mean, var, weight, bias, residual, y, *cut.shape, eps, slope, ACT=act, **cut.meta,
    )  # fmt: skip
    return y
