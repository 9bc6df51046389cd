"""The convolutions of csrc/cuda/conv_bn_act.cu: what they take, and weights as they read them.

An algorithm's name says the kernel and its tile, output pixels by output channels. Weights are
packed as the tiles lie in shared memory (csrc/cuda/pack_weights.cu): 64 input channels of one tap
at a time, 8 of them together; of float32, which is multiplied as TF32, half as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from resnet_fused.backends import native_cuda
from resnet_fused.conv_choice import ConvProblem
from resnet_fused.ops.schema import groups_together

Step = Literal["inference", "forward", "gradient"]
"""Evaluation; training's forward, with statistics; the gradient of act(bn(z)), with its sums."""

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu")

_CHUNK_BYTES = 128  # of input channels, that are multiplied at once
_PLANE_BYTES = 16  # of them that lie together
_OUTPUTS = 8  # that a thread stores
_MOST_TAPS, _MOST_PHASES = 49, 4
_BARRIER_BYTES = 1024
_NORM_BYTES = 12  # of a channel
_HOPPER = ("wgmma", "pingpong")
_MOST_RESIDENT = 16  # blocks of weights
_AHEAD = 3  # taps that an mma kernel loads before it multiplies them
_STEM_CHANNELS = 3
_STEM_COLUMNS = 64


@dataclass(frozen=True)
class Algorithm:
    """A kernel with a tile of `rows` output pixels and `columns` output channels."""

    kernel: str
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """As the operator and choices have it: "wgmma_256x64"."""
        return f"{self.kernel}_{self.rows}x{self.columns}"


STEM = Algorithm("stem", 16, 16)
ALGORITHMS = (
    Algorithm("wgmma", 256, 64),
    Algorithm("wgmma", 256, 128),
    Algorithm("wgmma", 128, 64),
    Algorithm("wgmma", 128, 128),
    Algorithm("pingpong", 256, 64),
    Algorithm("pingpong", 128, 64),
    Algorithm("pingpong", 128, 128),
    Algorithm("mma", 128, 64),
    Algorithm("mma", 128, 128),
    STEM,
)
BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}


_DTYPES = (torch.float16, torch.bfloat16)
_WITHOUT: dict[str, set[str]] = {
    "inference": set(),
    "float32": {"pingpong_256x64", STEM.name},
    "forward": {"pingpong_256x64", "pingpong_128x128", "mma_128x128", STEM.name},
}
_WITHOUT["gradient"] = {"wgmma_256x128", *_WITHOUT["forward"]}
"""Where registers do not suffice for what is kept beside the sums (csrc/cuda/conv_launch.cuh)."""


def candidates(
    problem: ConvProblem, dtype: torch.dtype, arch: int, shared_bytes: int, step: Step = "inference"
) -> tuple[str, ...]:
    """The algorithms that can run a problem by code for compute capability `arch`.

    Args:
        shared_bytes: what a block may have on the chip.
        dtype: float32 is multiplied as TF32.
        problem: of the gradient, the convolution that makes it.
    """
    wide = dtype == torch.float32
    if not native_cuda.available or (dtype not in _DTYPES and not (wide and step == "inference")):
        return ()
    normalised = {"inference": 0, "forward": problem.channels, "gradient": problem.out_channels}
    room = shared_bytes - _up(_NORM_BYTES * normalised[step], 128)
    without = _WITHOUT["float32" if wide else step]
    left = (a for a in ALGORITHMS if a.name not in without)
    return tuple(a.name for a in left if _takes(a, problem, arch, dtype.itemsize, room))


def _takes(algorithm: Algorithm, problem: ConvProblem, arch: int, itemsize: int, room: int) -> bool:
    if arch < 80 or (algorithm.kernel in _HOPPER and arch != 90):
        return False
    if algorithm is STEM:
        known = ((7, 7), (2, 2)), ((3, 3), (2, 2)), ((3, 3), (1, 1))
        return (
            problem.groups == 1
            and problem.dilation == (1, 1)
            and problem.channels == _STEM_CHANNELS
            and (problem.kernel, problem.stride) in known
            and problem.out_channels % _OUTPUTS == 0
        )
    (kh, kw), (sh, sw) = problem.kernel, problem.stride
    plane = _PLANE_BYTES // itemsize
    channels = problem.channels % plane == 0 and problem.out_channels % _OUTPUTS == 0
    group_outputs = problem.out_channels // problem.groups
    block = groups_together(problem.groups, group_outputs, algorithm.columns)
    return (
        channels
        and kh * kw <= _MOST_TAPS
        and sh * sw <= _MOST_PHASES
        and block is not None
        and block * (problem.channels // problem.groups) % plane == 0
        and (algorithm.columns == 64 or algorithm.columns < 2 * problem.out_channels)
        and _fits(algorithm, problem, block, itemsize, room)
    )


def _fits(algorithm: Algorithm, problem: ConvProblem, block: int, itemsize: int, room: int) -> bool:
    """Whether so many bytes of shared memory have room for what a tile reads."""
    (height, width), (down, right) = problem.kernel, problem.dilation
    pitch = problem.size[1] + width * right  # of a line of places, at most
    places = algorithm.rows + (height - 1) * down * pitch + (width - 1) * right
    if algorithm.kernel == "mma":
        taps = height * width if problem.stride == (1, 1) else 1  # of a stage, at least
        tiles, weights = 1 + -(-_AHEAD // taps), _AHEAD + 1
    else:
        tiles, weights = 2, 2
        room -= _BARRIER_BYTES
    if algorithm.kernel == "pingpong":  # all of them
        chunks = -(-block * (problem.channels // problem.groups) * itemsize // _CHUNK_BYTES)
        weights = -(-problem.out_channels // algorithm.columns) * chunks * height * width
        if weights > _MOST_RESIDENT:
            return False
        tiles = 2 if chunks == 1 and problem.stride == (1, 1) else 4
    plane = _up(places, 32) * _PLANE_BYTES + 16
    planes = _CHUNK_BYTES // _PLANE_BYTES
    return tiles * planes * plane + weights * algorithm.columns * _CHUNK_BYTES <= room


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A convolution's weight as an algorithm reads it."""

    numbers: Tensor
    algorithm: str
    outputs: int
    kernel: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, weight: Tensor, groups: int, algorithm: str, *, turned: bool = False) -> Packed:
        """Pack the weight for an algorithm of :data:`BY_NAME`.

        Args:
            turned: for the convolution that makes the input's gradient.
        """
        kernel = weight.shape[2], weight.shape[3]
        chosen = BY_NAME[algorithm]
        if chosen is STEM:
            numbers = pack_stem(weight)
        else:
            numbers = torch.ops.resnet_fused._cuda_pack(weight, groups, chosen.columns, turned)
        return cls(numbers, algorithm, weight.shape[1 if turned else 0], kernel, groups)

    def __call__(
        self,
        input: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        act: str,
        negative_slope: float,
    ) -> Tensor:
        """act(conv(input) · scale + shift + residual), channels_last."""
        found: Any = torch.ops.resnet_fused._cuda_conv(
            input, self.numbers, scale, shift, residual, self.outputs,
            [*self.kernel, *stride, *padding, *dilation], self.groups, act, negative_slope,
            self.algorithm,
        )  # fmt: skip
        return found


def pack_stem(weight: Tensor) -> Tensor:
    """A stem's weight (K, 3, R, S) as fragments of mma.

    [column tile][16 products][8 columns][lane][4] with zeros beyond outputs and behind each row of
    the kernel.
    """
    outputs, channels, height, width = weight.shape
    line = width * channels
    eights = -(-line // 8)
    steps = -(-height * eights // 2)
    tiles = -(-outputs // _STEM_COLUMNS)
    lines = weight.new_zeros(tiles * _STEM_COLUMNS, height, eights * 8)
    lines[:outputs, :, :line] = weight.permute(0, 2, 3, 1).reshape(outputs, height, line)
    products = weight.new_zeros(tiles * _STEM_COLUMNS, steps * 16)
    products[:, : height * eights * 8] = lines.reshape(tiles * _STEM_COLUMNS, -1)
    cut = _interleaved(products).view(
        tiles, 8, 8, steps, 2, 4, 2
    )  # tile, n, g, step, word, q, number
    return cut.permute(0, 3, 1, 2, 5, 4, 6).contiguous()


def _interleaved(outputs: Tensor) -> Tensor:
    """Output channels in the order of a tile's columns: of 32, column 8 i + 2 q + e is channel
    8 q + 2 i + e. So a thread's accumulators are eight neighbours (csrc/cuda/conv_epilogue.cuh).
    """
    rest = outputs.shape[1:]
    return outputs.reshape(-1, 4, 4, 2, *rest).transpose(1, 2).reshape(-1, *rest)
