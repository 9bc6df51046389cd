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
from resnet_fused.backends.triton.tiles import (
    ceil_div,
    channel_vector,
    power_of_two,
    tile_offsets,
)

COMBINED = 16  # channels that one program combines; few, so that many programs do
LOADS = tl.constexpr(4)  # tiles that a program has under way; without, a thread waits for each load
_COMBINED_ROWS = 128  # chunks that it reads at once
_GROUP = 256  # chunks that one program combines in the first of two levels,
_MOST_AT_ONCE = 1024  # and in the only one


@triton.jit
def partial_statistics_kernel(
    p_x, p_origin, p_mean, p_square, rows, channels, pixels, chunk,
    LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
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
    offsets = tile_offsets(o_r, o_c, channels, pixels, LAYOUT)
    b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)
    origin = tl.sum(b_x, 0) / tl.minimum(rows, BLOCK_R)
    # With no more bits than x, or all differences from it would be rounded the same way.
    origin = origin.to(p_x.dtype.element_ty).to(tl.float32)
    # One pair of sums for each place of the tile, so that no thread waits for another in the loop.
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=LOADS):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < end
        offsets = tile_offsets(o_r, o_c, channels, pixels, LAYOUT)
        b_x = tl.load(p_x + offsets, mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        distance = tl.where(m_r[:, None], b_x - origin[None, :], 0.0)
        sums += distance
        squares += distance * distance
    count = (end - begin).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, 0), count)
    square = tl.sum(squares, 0) - count * mean * mean
    tl.store(p_mean + i_chunk * channels + o_c, mean, mask=m_c)
    tl.store(p_square + i_chunk * channels + o_c, square, mask=m_c)
    if i_chunk == 0:
        tl.store(p_origin + o_c, origin, mask=m_c)


@triton.jit
def tile_statistics(b_x, m_r):
    """Mean and sum of squared distances of each column over the rows of a mask."""
    count = tl.sum(m_r.to(tl.float32), 0)
    mean = tl.div_rn(tl.sum(tl.where(m_r[:, None], b_x, 0.0), 0), count)
    distance = tl.where(m_r[:, None], b_x - mean[None, :], 0.0)
    return mean, tl.sum(distance * distance, 0)


@triton.jit
def combine_statistics_kernel(
    p_partial_mean, p_partial_square, p_origin, p_mean, p_square, rows, channels, chunk, chunks,
    group, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of every `group` chunks as one; the LAST time of all, mean and variance.

    Means are distances from the origin, or from 0 without one, until then.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    i_group = tl.program_id(1).to(tl.int64)
    begin = i_group * group
    end = tl.minimum(begin + group, chunks)
    near = tl.load(p_partial_mean + begin * channels + o_c, mask=m_c, other=0.0)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=2):
        o_r = start + tl.arange(0, BLOCK_R)
        mask = (o_r < end)[:, None] & m_c[None, :]
        offsets = o_r[:, None] * channels + o_c[None, :]
        mean = tl.load(p_partial_mean + offsets, mask=mask, other=0.0)
        count = tl.minimum(rows - o_r * chunk, chunk).to(tl.float32)[:, None]
        distance = tl.where(mask, mean - near[None, :], 0.0)
        sums += distance * count
        # Chan: the distances between the means add what lies between the sets.
        squares += tl.load(p_partial_square + offsets, mask=mask, other=0.0)
        squares += distance * distance * count
    count = tl.minimum(rows - begin * chunk, (end - begin) * chunk).to(tl.float32)
    # A plain / is wrong by up to two roundings, which a whole channel would share.
    rest = tl.div_rn(tl.sum(sums, 0), count)
    mean = near + rest
    square = tl.div_rn(tl.sum(squares, 0), count) - rest * rest
    if LAST:
        mean += channel_vector(p_origin, o_c, m_c, 0.0)
    else:
        square *= count
    tl.store(p_mean + i_group * channels + o_c, mean, mask=m_c)
    tl.store(p_square + i_group * channels + o_c, square, mask=m_c)


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
    if rows == 0:
        return mean.new_zeros(channels), mean.new_zeros(channels)
    for group in groups(chunks):
        parts, last = ceil_div(chunks, group), group == chunks
        merged = partial_table(mean, parts, channels)
        launch(
            combine_statistics_kernel, (ceil_div(channels, COMBINED), parts), mean,
            mean, square, origin, *merged, rows, channels, chunk, chunks, group,
            LAST=last, **combining(group),
        )  # fmt: skip
        (mean, square), chunk, chunks = merged, chunk * group, parts
    return mean[0], square[0]


def groups(chunks: int) -> tuple[int, ...]:
    """How many chunks one program combines, level by level, until one is left.

    A convolution leaves thousands: few programs would take as long for them as it did.
    """
    if chunks <= _MOST_AT_ONCE:
        return (chunks,)
    return _GROUP, ceil_div(chunks, _GROUP)


def combining(group: int) -> dict[str, int]:
    """The tile of a program that combines so many chunks."""
    return {"BLOCK_R": min(power_of_two(group), _COMBINED_ROWS), "BLOCK_C": COMBINED}
