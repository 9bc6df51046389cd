"""The tile sizes that convolutions may run with, and which of them fit a problem and a chip."""

from __future__ import annotations

from dataclasses import dataclass, replace

from resnet_fused.conv_choice import ConvProblem

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                120: 99 << 10}  # fmt: skip
"""What one block may have, by compute capability (CUDA programming guide, table of limits)."""

_LEAST_SHARED = 99 << 10
_TMA_ARCH = 90
TMA_BYTES = 16
"""A tensor descriptor's start and rows are multiples of it."""


@dataclass(frozen=True)
class Config:
    """BLOCK_M pixels by BLOCK_N outputs, BLOCK_K products at once (half as many of 4 bytes)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False

    @property
    def name(self) -> str:
        """As choices name it: "triton_128x64x64", "triton_tma_128x64x64"."""
        kind = "triton_tma" if self.tma else "triton"
        return f"{kind}_{self.block_m}x{self.block_n}x{self.block_k}"

    def block_k_of(self, itemsize: int) -> int:
        """BLOCK_K for numbers of so many bytes."""
        return self.block_k * 2 // max(itemsize, 2)

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the loads that are under way."""
        return self.stages * (self.block_m + self.block_n) * self.block_k_of(itemsize) * itemsize


_TILES = (
    Config(128, 128, 64, 8, 3),
    Config(256, 64, 64, 8, 3),  # ResNet's first stage has 64 channels
    Config(128, 64, 64, 8, 3),
    Config(64, 128, 64, 8, 3),
    Config(64, 64, 64, 4, 4),  # small images: more programs
    Config(64, 32, 64, 4, 5),  # batch 1
    Config(128, 32, 32, 4, 4),  # narrow groups, few channels
)
CONFIGS = (*_TILES, *(replace(tile, tma=True) for tile in _TILES[:5]))
"""Every one that can be selected; the tests compile them all."""

BY_NAME = {config.name: config for config in CONFIGS}


_MOST_FMA = 64 * 64
"""Sums of a tile without matrix instructions; more of them do not fit the registers."""


def candidates(
    problem: ConvProblem, itemsize: int, arch: int, precision: str
) -> tuple[Config, ...]:
    """The tile sizes worth timing: those that fit the chip and are not mostly padding.

    Args:
        precision: of float32 products, "ieee" or "tf32".
    """
    fma = itemsize == 4 and precision == "ieee"
    outputs = problem.out_channels // problem.groups
    height, width = problem.out_size
    pixels = problem.batch * height * width
    limit = shared_bytes(arch)
    return tuple(
        c
        for c in CONFIGS
        if c.shared_bytes(itemsize) <= limit
        and not (fma and (c.tma or c.block_m * c.block_n > _MOST_FMA))
        and (c.block_n <= 32 or c.block_n < 2 * outputs)
        and (c.block_m <= 64 or c.block_m < 2 * pixels)
        and (not c.tma or (arch >= _TMA_ARCH and takes_tma(problem, itemsize)))
    )


def shared_bytes(arch: int) -> int:
    """What one block may have on this compute capability, or on every known one."""
    return SHARED_BYTES.get(arch, _LEAST_SHARED)


def takes_tma(problem: ConvProblem, itemsize: int) -> bool:
    """Whether a convolution is a plain matrix product of rows that tensor descriptors can have."""
    return (
        problem.kernel == (1, 1)
        and problem.stride == (1, 1)
        and problem.padding == (0, 0)
        and problem.groups == 1
        and problem.channels * itemsize % TMA_BYTES == 0
    )
