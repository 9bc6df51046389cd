"""Convolution as an implicit matrix product over NHWC, with what stands before and behind it.

    y[pixel, k] = Σ over taps and channels of  a(x[pixel · stride + tap, c]) · w[k, tap, c]

One kernel, whose parts are chosen when it is compiled:

* before: a is the identity, or act(bn(·)) with known statistics, computed on what is loaded. Pixels
  outside of the image are 0 behind it.
* behind: "affine" y = act(sum · scale + shift + residual), evaluation's fused step; "statistics"
  y = sum + shift, and mean and squared distances of each channel over the tile, so that batch norm
  needs no pass of its own; "gradient", for the gradient of act(bn(z)): y = sum + residual, and the
  two sums that the backward of that batch norm needs.

A program makes BLOCK_M pixels × BLOCK_N outputs of one group; programs with the same pixels follow
each other, so that x is read from L2 after the first. Weights have any strides: the gradient of the
input is the same product with the kernel turned. With TMA (1x1, no padding, stride 1: a plain
matrix product) x and w are tensor descriptors and the copy engine loads the tiles.

Sums are float32, TF32 only where torch allows it. Bytes moved: x, w, y (and the residual) once;
eager PyTorch reads and writes y once more for each of batch norm, addition and activation.
Chetlur et al., *cuDNN: Efficient Primitives for Deep Learning* (2014), for the implicit product;
Jacob et al. (2018) for folding batch norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.backends.triton.activation import activate, activate_backward
from resnet_fused.backends.triton.batch_statistics import tile_statistics
from resnet_fused.backends.triton.tiles import channel_vector, norm_vectors


@triton.jit
def conv_kernel(
    x, w, p_y, p_scale, p_shift, p_residual,
    p_before_mean, p_before_var, p_before_weight, p_before_bias,
    p_z, p_mean, p_var, p_weight, p_bias, p_first, p_second,
    height, width, channels, out_height, out_width, out_channels, pixels,
    group_channels, group_outputs,
    w_output, w_tap, w_channel, eps_before, eps, slope,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BEFORE: tl.constexpr, BEHIND: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x is NHWC; w has the strides w_output, w_tap, w_channel; y, residual and z are NHWC.

    `p_before_*` normalise x in front of the activation BEFORE (None: x is read as it is).
    `p_first` and `p_second` take a row for each tile of pixels: mean and squares, or the sums.
    `p_z` to `p_bias` belong to the batch norm whose backward "gradient" begins.
    """
    blocks = tl.cdiv(group_outputs, BLOCK_N)
    i_m = tl.program_id(0) // blocks
    i_n = tl.program_id(0) % blocks
    i_g = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < pixels
    m_n = o_n < group_outputs
    first_channel = i_g * group_channels
    outputs = i_g * group_outputs + o_n

    image = o_m // (out_height * out_width)
    inside = o_m - image * (out_height * out_width)
    top = (inside // out_width) * STRIDE_H - PAD_H
    left = (inside % out_width) * STRIDE_W - PAD_W
    o_x = ((image.to(tl.int64) * height + top) * width + left) * channels + first_channel
    o_w = outputs.to(tl.int64) * w_output

    steps = tl.cdiv(group_channels, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(R * S * steps):
        tap = i // steps
        o_k = (i - tap * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < group_channels
        if TMA:
            b_x = x.load([i_m * BLOCK_M, i * BLOCK_K])
            b_w = w.load([i_n * BLOCK_N, i * BLOCK_K]).T
        else:
            row = (tap // S) * DILATION_H
            column = (tap % S) * DILATION_W
            shifted = (row * width + column).to(tl.int64) * channels
            m_x = m_m
            if not (R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0):
                m_x = m_x & (top + row >= 0) & (top + row < height)
                m_x = m_x & (left + column >= 0) & (left + column < width)
            m_x = m_x[:, None] & m_k[None, :]
            b_x = tl.load(x + (o_x + shifted)[:, None] + o_k[None, :], mask=m_x, other=0.0)
            p_w = w + tap.to(tl.int64) * w_tap + o_w[None, :]
            p_w += o_k.to(tl.int64)[:, None] * w_channel
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if BEFORE is not None:
            o_c = first_channel + o_k
            mean, rstd, weight, bias = norm_vectors(
                p_before_mean, p_before_var, p_before_weight, p_before_bias, eps_before, o_c, m_k
            )
            b_a = (b_x.to(tl.float32) - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
            b_a = activate(b_a, slope, BEFORE)
            if TMA:
                m_x = m_m[:, None] & m_k[None, :]
            b_x = tl.where(m_x, b_a, 0.0).to(b_x.dtype)
        if b_x.dtype == tl.float32 and PRECISION == "ieee":
            # One chain of multiply-adds over all of K would be as wrong as it is long, so each tile
            # is one. (If no addition were allowed to be imprecise, the compiler would join them.)
            part = tl.dot(b_x, b_w, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_K)
            acc += part
        else:
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)

    mask = m_m[:, None] & m_n[None, :]
    offsets = o_m.to(tl.int64)[:, None] * out_channels + outputs[None, :]
    if p_scale is not None:
        acc *= channel_vector(p_scale, outputs, m_n, 1.0)[None, :]
    if p_shift is not None:
        acc += channel_vector(p_shift, outputs, m_n, 0.0)[None, :]
    if p_residual is not None:
        acc += tl.load(p_residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if BEHIND == "affine":
        acc = activate(acc, slope, ACT)
    b_y = acc.to(p_y.dtype.element_ty)
    tl.store(p_y + offsets, b_y, mask=mask)

    row = i_m.to(tl.int64) * out_channels + outputs
    if BEHIND == "statistics":  # of the numbers that are stored
        mean, square = tile_statistics(b_y.to(tl.float32), m_m)
        tl.store(p_first + row, mean, mask=m_n)
        tl.store(p_second + row, square, mask=m_n)
    if BEHIND == "gradient":
        b_z = tl.load(p_z + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, rstd, weight, bias = norm_vectors(p_mean, p_var, p_weight, p_bias, eps, outputs, m_n)
        b_xhat = (b_z - mean[None, :]) * rstd[None, :]
        argument = b_xhat * weight[None, :] + bias[None, :]
        b_grad = activate_backward(b_y.to(tl.float32), argument, slope, ACT)
        tl.store(p_first + row, tl.sum(tl.where(mask, b_grad * b_xhat, 0.0), 0), mask=m_n)
        tl.store(p_second + row, tl.sum(tl.where(mask, b_grad, 0.0), 0), mask=m_n)
