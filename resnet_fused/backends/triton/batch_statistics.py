"""Mean and biased variance of every channel: two levels, nothing cancels, the same bits always.

One pass over x. Each program goes through a chunk of rows and adds up distances from an origin, and
their squares. The origin is the mean of the tensor's first tile, for every program the same: near
enough to the mean that neither a large one nor a long sum spoils anything. Of a chunk remain its
mean and its sum of squared distances from that (Welford's quantities), which a second kernel
combines by Chan's formula. Chunks follow from the shape, the order is fixed, and there are no
atomics. Welford (1962); Chan, Golub and LeVeque, *Algorithms for Computing the Sample Variance*
(1983).

The same second level serves the convolution that gathers statistics in its epilogue
(``conv_kernel.py``), whose chunks are its tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.launch import launch
from resnet_fused.backends.triton.tiles import channel_vector, tile_offsets

_COMBINED = 16  # channels that one program combines; few, so that many programs do
_COMBINED_ROWS = 256  # chunks that it reads at once


@triton.jit
def partial_statistics_kernel(
    p_x, p_origin, p_mean, p_square, rows, channels, pixels, chunk,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances of each channel over a chunk of rows.

    Means are told as distances from the origin, which is written as well: beside a large mean they
    would be rounded as coarsely as it is.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    i_chunk = (tl.program_id(0) // blocks).to(tl.int64)
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, rows)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (o_r < rows)[:, None] & m_c[None, :]
    offsets = tile_offsets(o_r, o_c, channels, pixels, CHANNELS_LAST)
    b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)
    origin = tl.sum(b_x, 0) / tl.minimum(rows, BLOCK_R)
    # With no more bits than x, or all differences from it would be rounded the same way.
    origin = origin.to(p_x.dtype.element_ty).to(tl.float32)
    # One pair of sums for each place of the tile, so that no thread waits for another in the loop.
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < end
        offsets = tile_offsets(o_r, o_c, channels, pixels, CHANNELS_LAST)
        b_x = tl.load(p_x + offsets, mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        distance = tl.where(m_r[:, None], b_x - origin[None, :], 0.0)
        sums += distance
        squares += distance * distance
    count = (end - begin).to(tl.float32)
    mean = tl.sum(sums, 0) / count
    square = tl.sum(squares, 0) - count * mean * mean
    tl.store(p_mean + i_chunk * channels + o_c, mean, mask=m_c)
    tl.store(p_square + i_chunk * channels + o_c, square, mask=m_c)
    if i_chunk == 0:
        tl.store(p_origin + o_c, origin, mask=m_c)


@triton.jit
def tile_statistics(b_x, m_r):
    """Mean and sum of squared distances of each column over the rows of a mask."""
    count = tl.sum(m_r.to(tl.float32), 0)
    mean = tl.sum(tl.where(m_r[:, None], b_x, 0.0), 0) / count
    distance = tl.where(m_r[:, None], b_x - mean[None, :], 0.0)
    return mean, tl.sum(distance * distance, 0)


@triton.jit
def combine_statistics_kernel(
    p_partial_mean, p_partial_square, p_origin, p_mean, p_var, rows, channels, chunk, chunks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance from those of the chunks, whose means are from an origin or 0."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    near = tl.load(p_partial_mean + o_c, mask=m_c, other=0.0)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, chunks, BLOCK_R):
        o_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (o_r < chunks)[:, None] & m_c[None, :]
        offsets = o_r[:, None] * channels + o_c[None, :]
        mean = tl.load(p_partial_mean + offsets, mask=mask, other=0.0)
        count = tl.minimum(rows - o_r * chunk, chunk).to(tl.float32)[:, None]
        distance = tl.where(mask, mean - near[None, :], 0.0)
        sums += distance * count
        # Chan: the distances between the means add what lies between the sets.
        squares += tl.load(p_partial_square + offsets, mask=mask, other=0.0)
        squares += distance * distance * count
    rest = tl.sum(sums, 0) / rows
    origin = channel_vector(p_origin, o_c, m_c, 0.0)
    tl.store(p_mean + o_c, origin + (near + rest), mask=m_c)
    tl.store(p_var + o_c, tl.sum(squares, 0) / rows - rest * rest, mask=m_c)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    x = tiles.dense(input)
    cut = tiles.cut(x, reduces=True)
    mean, square = partial_table(x, cut.chunks, cut.channels)
    origin = mean.new_empty(cut.channels)
    launch(
        partial_statistics_kernel, (cut.chunks * cut.channel_blocks,), x,
        x, origin, mean, square, *cut.shape, cut.chunk, **cut.meta,
    )  # fmt: skip
    return combine(mean, square, cut.rows, cut.chunk, origin)


def partial_table(like: Tensor, chunks: int, channels: int) -> tuple[Tensor, Tensor]:
    """Two float32 numbers for each channel of each chunk."""
    table = like.new_empty((2, chunks, channels), dtype=torch.float32)
    return table[0], table[1]


def combine(
    mean: Tensor, square: Tensor, rows: int, chunk: int, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all rows from those of chunks of `chunk` rows; 0 of none."""
    chunks, channels = mean.shape
    whole = mean.new_zeros(channels) if rows == 0 else mean.new_empty(channels)
    var = torch.zeros_like(whole) if rows == 0 else torch.empty_like(whole)
    launch(
        combine_statistics_kernel, (triton.cdiv(channels, _COMBINED) if rows else 0,), mean,
        mean, square, origin, whole, var, rows, channels, chunk, chunks,
        BLOCK_R=min(triton.next_power_of_2(chunks), _COMBINED_ROWS), BLOCK_C=_COMBINED,
    )  # fmt: skip
    return whole, var
