"""The library's own convolution kernels on the CPU: Winograd and direct, BN folded in.

What they compute and how is said in ``csrc/cpu/winograd.cpp`` and ``csrc/cpu/direct_conv.cpp``.
They keep NaN and infinities where eager PyTorch has them.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused.backends import native


@functools.cache
def unusable(dtype: torch.dtype) -> str | None:
    """Why the kernels are not chosen for a dtype on this machine, or None if they may be."""
    if native.reason is not None:
        return native.reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they take float32 and bfloat16, not {dtype}"
    if native.isa() == "baseline":
        return "without AVX2 or AVX-512 the library's convolution is faster"
    if dtype == torch.bfloat16 and not multiplies_bf16():
        return "this processor has no AVX512_BF16"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class NativeConv:
    """One convolution's packed weights, and what else its kernel needs to know."""

    algorithm: str
    packed: Tensor  # the scale folded in, in the algorithm's layout; bfloat16 where pairs
    weight: Tensor  # (K, C / groups, R, S) as the model holds it: read for data that is not finite
    scale: Tensor  # (K,) float32
    shift: Tensor  # (K,) float32
    geometry: tuple[int, ...]  # stride, padding, dilation, groups
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wired:
    """A convolution's place in a block: which values it reads, and its activation.

    Values: 0 is the block's input, 1 a residual from outside, 2 + i the output of convolution i;
    `residual` is -1 where there is none.
    """

    input: int
    residual: int
    act: str
    negative_slope: float


@functools.cache
def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Whether this processor's kernels multiply bfloat16 numbers, not only read and write them."""
    return native.available and native.isa() == "avx512_bf16"


def pack(
    weight: Tensor,
    scale: Tensor | None,
    stride: int,
    groups: int,
    algorithm: str,
    *,
    pairs: bool = False,
) -> Tensor:
    """Weights of (K, C / groups, R, S) times scale, in the layout of an algorithm.

    Folded in float64, so that each packed number is rounded once: to float32, or with `pairs` to
    bfloat16, two of which are multiplied in one step.
    """
    folded = weight.detach().double()
    if scale is not None:
        folded = folded * scale.double().view(-1, 1, 1, 1)
    return torch.ops.resnet_fused._pack_conv(folded, stride, groups, algorithm, pairs)


class Program:
    """Blocks of convolutions that run in one call, each reading what the one before wrote.

    Args:
        blocks: each a sequence of convolutions with their places in it. Only the first may read a
            residual from outside.
    """

    __slots__ = ("_arguments",)

    def __init__(self, *blocks: Sequence[tuple[NativeConv, Wired]]) -> None:
        convs = [conv for block in blocks for conv, _ in block]
        places = [wired for block in blocks for _, wired in block]
        numbers: list[int] = []
        for conv, wired in zip(convs, places, strict=True):
            numbers += [wired.input, wired.residual, *conv.geometry]
        self._arguments = (
            [c.packed for c in convs],
            [c.weight for c in convs],
            [c.scale for c in convs],
            [c.shift for c in convs],
            numbers,
            [c.algorithm for c in convs],
            [w.act for w in places],
            [w.negative_slope for w in places],
            [len(block) for block in blocks],
        )

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The last convolution's output, channels_last."""
        return torch.ops.resnet_fused._packed_convs.default(input, residual, *self._arguments)
