"""Mean and biased variance of every channel: two levels, nothing cancels, the same bits always.

One pass over x. Each program goes through a chunk of rows and keeps running means and sums of
squared distances from them (Welford), which combine by Chan's formula: in the program, and those of
all chunks in a second kernel. Chunks follow from the shape, the order is fixed, and there are no
atomics. Welford (1962); Chan, Golub and LeVeque, *Algorithms for
Computing the Sample Variance* (1983).

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
from resnet_fused.backends.triton.tiles import tile_offsets

_COMBINED = 16  # channels that one program combines; few, so that many programs do
_COMBINED_ROWS = 256  # chunks that it reads at once


@triton.jit
def partial_statistics_kernel(
    p_x, p_mean, p_square, rows, channels, pixels, chunk,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances of each channel over a chunk of rows."""
    i_chunk = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, rows)
    # One running mean for each place of the tile, so that no thread waits for another in the loop.
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    seen = tl.zeros([BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < end
        mask = m_r[:, None] & m_c[None, :]
        offsets = tile_offsets(o_r, o_c, channels, pixels, CHANNELS_LAST)
        b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)
        seen += m_r.to(tl.float32)
        distance = b_x - mean
        mean += tl.where(mask, distance / tl.where(m_r, seen, 1.0)[:, None], 0.0)
        square += tl.where(mask, distance * (b_x - mean), 0.0)
    middle, total = combine_tile(mean, square, seen)
    tl.store(p_mean + i_chunk * channels + o_c, middle, mask=m_c)
    tl.store(p_square + i_chunk * channels + o_c, total, mask=m_c)


@triton.jit
def combine_tile(mean, square, seen):
    """Mean and sum of squared distances of each column, from those of rows of `seen` values each.

    Chan: the distances between the means add to the squares what lies between the sets.
    """
    count = tl.sum(seen, 0)
    middle = tl.sum(mean * seen[:, None], 0) / count
    distance = tl.where(seen[:, None] > 0, mean - middle[None, :], 0.0)
    weighted = distance * seen[:, None]
    # `middle` is off by the rounding of a long sum; the distances from it say by how much.
    shift = tl.sum(weighted, 0) / count
    inner = tl.sum(square + weighted * distance, 0)
    return middle + shift, inner - count * shift * shift


@triton.jit
def combine_statistics_kernel(
    p_partial_mean, p_partial_square, p_mean, p_var, rows, channels, chunk, chunks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance from those of the chunks."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    seen = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, chunks, BLOCK_R):
        o_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_r = o_r < chunks
        mask = m_r[:, None] & m_c[None, :]
        offsets = o_r[:, None] * channels + o_c[None, :]
        b_mean = tl.load(p_partial_mean + offsets, mask=mask, other=0.0)
        b_square = tl.load(p_partial_square + offsets, mask=mask, other=0.0)
        count = tl.where(m_r, tl.minimum(rows - o_r * chunk, chunk), 0).to(tl.float32)
        share = count / tl.where(m_r, seen + count, 1.0)
        distance = b_mean - mean
        mean += tl.where(mask, distance * share[:, None], 0.0)
        square += tl.where(mask, b_square + distance * distance * (seen * share)[:, None], 0.0)
        seen += count
    middle, total = combine_tile(mean, square, seen)
    tl.store(p_mean + o_c, middle, mask=m_c)
    tl.store(p_var + o_c, total / rows, mask=m_c)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    x = tiles.dense(input)
    cut = tiles.cut(x, reduces=True)
    mean, square = partial_table(x, cut.chunks, cut.channels)
    launch(
        partial_statistics_kernel, (cut.chunks, cut.channel_blocks), x,
        x, mean, square, *cut.shape, cut.chunk, **cut.meta,
    )  # fmt: skip
    return combine(mean, square, cut.rows, cut.chunk)


def partial_table(like: Tensor, chunks: int, channels: int) -> tuple[Tensor, Tensor]:
    """Two float32 numbers for each channel of each chunk."""
    table = like.new_empty((2, chunks, channels), dtype=torch.float32)
    return table[0], table[1]


def combine(mean: Tensor, square: Tensor, rows: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all rows from those of chunks of `chunk` rows; 0 of none."""
    chunks, channels = mean.shape
    whole = mean.new_zeros(channels) if rows == 0 else mean.new_empty(channels)
    var = torch.zeros_like(whole) if rows == 0 else torch.empty_like(whole)
    launch(
        combine_statistics_kernel, (triton.cdiv(channels, _COMBINED) if rows else 0,), mean,
        mean, square, whole, var, rows, channels, chunk, chunks,
        BLOCK_R=min(triton.next_power_of_2(chunks), _COMBINED_ROWS), BLOCK_C=_COMBINED,
    )  # fmt: skip
    return whole, var
