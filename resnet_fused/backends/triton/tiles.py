"""Per-channel work on (N, C, ...) tensors: which elements a program's tile holds, and its vectors.

A tensor is a matrix of rows (the pixels of all images) by channels. A tile is some rows by some
channels. In channels_last a row lies in one piece; in contiguous tensors a channel of one image
does, so tiles there are one channel wide.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.ops.schema import is_channels_last

_TILE = 4096  # elements; with 4 warps each thread has four 16-byte loads of bfloat16 in flight
_SMALL_TILE = 1024  # where each element has two sums, or its place is computed
_CHANNELS = 64  # of a tile at most; 128 bytes of bfloat16 are a cache line
_PROGRAMS = 1024  # of a reduction: fills any chip, and leaves few partial results to combine
_INT32_ROWS = 2**31 - _TILE  # with a tile that reaches past the end


@dataclass(frozen=True)
class Tiles:
    """How a tensor is cut, which depends on its shape and layout only."""

    rows: int
    channels: int
    pixels: int  # of an image
    layout: str
    block_r: int
    block_c: int

    @cached_property
    def channel_blocks(self) -> int:
        return ceil_div(self.channels, self.block_c)

    @cached_property
    def count(self) -> int:
        """Tiles of the whole tensor."""
        return ceil_div(self.rows, self.block_r) * self.channel_blocks

    @cached_property
    def chunk(self) -> int:
        """Rows that one program of a reduction adds up: a multiple of the tile's."""
        wanted = ceil_div(self.rows * self.channel_blocks, _PROGRAMS)
        return max(1, ceil_div(wanted, self.block_r)) * self.block_r

    @cached_property
    def chunks(self) -> int:
        """Programs of a reduction for each block of channels."""
        return ceil_div(self.rows, self.chunk)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """What every kernel takes of it."""
        return self.rows, self.channels, self.pixels

    @cached_property
    def meta(self) -> dict[str, int | str]:
        """The constants of a kernel."""
        return {"LAYOUT": self.layout, "BLOCK_R": self.block_r, "BLOCK_C": self.block_c}


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉; triton.cdiv on the host takes twenty times as long."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def memory_format(tensor: Tensor) -> torch.memory_format:
    """What eager PyTorch gives the output of an operator on this tensor."""
    if tensor.dim() != 4:
        return suggest_memory_format(tensor)
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy without gaps in the memory format that eager PyTorch keeps."""
    if tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor
    return tensor.contiguous(memory_format=memory_format(tensor))


def empty_like(tensor: Tensor) -> Tensor:
    """An output for an operator that keeps its input's memory format."""
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


def matching(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `like`, which is dense."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def cut(tensor: Tensor, *, reduces: bool = False) -> Tiles:
    """The tiles of a dense tensor.

    Args:
        reduces: for a kernel that keeps sums for each place of a tile.
    """
    return _cut(tensor.shape, tensor.is_contiguous(), reduces)


@functools.lru_cache(maxsize=4096)
def _cut(shape: Sequence[int], contiguous: bool, reduces: bool) -> Tiles:
    channels = shape[1]
    rows = math.prod(shape) // max(channels, 1)
    pixels = max(rows // max(shape[0], 1), 1)
    # A vector of channels without pixels is channels_last too: (N, C).
    channels_last = pixels == 1 or not contiguous
    block_c = min(power_of_two(channels), _CHANNELS) if channels_last else 1
    tile = _TILE if channels_last and not reduces else _SMALL_TILE
    block_r = min(tile // block_c, power_of_two(rows))
    layout = "nhwc" if channels_last else "nchw" if rows < _INT32_ROWS else "nchw_long"
    return Tiles(rows, channels, pixels, layout, block_r, block_c)


@triton.jit
def tile_offsets(o_r, o_c, channels, pixels, LAYOUT: tl.constexpr):
    """Where the elements of rows `o_r` (int64) and channels `o_c` lie."""
    if LAYOUT == "nhwc":
        return o_r[:, None] * channels + o_c[None, :]
    else:
        if LAYOUT == "nchw":  # noqa: SIM108  (a division of 64 bits is a loop on a GPU)
            image = (o_r.to(tl.int32) // pixels).to(tl.int64)
        else:
            image = o_r // pixels
        inside = o_r - image * pixels
        channel = o_c[None, :].to(tl.int64) * pixels
        return (image * channels * pixels + inside)[:, None] + channel


@triton.jit
def tile_of_program(
    rows, channels, pixels,
    LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The channels of this program's tile and whether they exist, and the same of its elements.

    Programs of the same rows follow each other.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    i_r = tl.program_id(0) // blocks
    i_c = tl.program_id(0) % blocks
    o_r = i_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    offsets = tile_offsets(o_r, o_c, channels, pixels, LAYOUT)
    return o_c, m_c, offsets, (o_r < rows)[:, None] & m_c[None, :]


@triton.jit
def channel_vector(p_vector, o_c, m_c, default: tl.constexpr):
    """One float32 number for each channel; `default` where there is no vector."""
    if p_vector is None:
        return tl.full(o_c.shape, default, tl.float32)
    else:
        return tl.load(p_vector + o_c, mask=m_c, other=default).to(tl.float32)


@triton.jit
def norm_vectors(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c):
    """Mean, 1 / √(var + eps), weight and bias of a batch norm."""
    mean = channel_vector(p_mean, o_c, m_c, 0.0)
    rstd = tl.math.rsqrt(channel_vector(p_var, o_c, m_c, 1.0) + tl.cast(eps, tl.float32))
    weight = channel_vector(p_weight, o_c, m_c, 1.0)
    return mean, rstd, weight, channel_vector(p_bias, o_c, m_c, 0.0)
