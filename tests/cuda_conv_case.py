"""Convolutions that end in the middle of tiles, and which compiled kernels take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_case import DEVICE, HAS_GPU, operators
from test_functional import noise
from torch import Tensor

from resnet_fused.backends import cuda_conv, native_cuda
from resnet_fused.conv_choice import ConvProblem
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.gpu_choice import Kind

# batch, channels, height, width, outputs, kernel, stride, padding, dilation, groups
SHAPES: dict[str, tuple[Any, ...]] = {
    "3x3": (2, 64, 9, 8, 64, 3, 1, 1, 1, 1),
    "odd": (3, 40, 7, 11, 24, 3, 1, 1, 1, 1),
    "tiles": (3, 8, 17, 20, 72, 3, 1, 1, 1, 1),
    "deep": (1, 200, 6, 5, 136, 3, 1, 1, 1, 1),
    "stride2": (2, 72, 11, 10, 40, 3, 2, 1, 1, 1),
    "1x1": (2, 136, 7, 7, 264, 1, 1, 0, 1, 1),
    "1x1stride2": (3, 64, 9, 8, 128, 1, 2, 0, 1, 1),
    "pixel": (2, 16, 1, 1, 8, 3, 1, 1, 1, 1),
    "valid": (1, 16, 8, 9, 16, 3, 1, 0, 1, 1),
    "padded": (1, 8, 5, 5, 16, 3, 1, 4, 1, 1),
    "dilated": (2, 8, 12, 11, 32, 3, 1, 2, 2, 1),
    "gaps": (30, 8, 8, 9, 8, 3, 1, 0, 3, 1),  # of 72 places of an image 6 are pixels
    "unequal": (2, 8, 9, 12, 16, (3, 5), (2, 1), (1, 2), (1, 2), 1),
    "rectangular": (2, 8, 9, 12, 16, (3, 5), 1, (0, 3), (2, 1), 1),
    "many channels": (1, 408, 5, 4, 24, 1, 1, 0, 1, 1),  # than threads
    "grouped": (2, 64, 8, 7, 64, 3, 1, 1, 1, 16),
    "two groups": (1, 48, 6, 7, 256, 3, 1, 1, 1, 2),
    "empty": (0, 8, 6, 7, 16, 3, 1, 1, 1, 1),
    "7x7 stem": (2, 3, 37, 41, 64, 7, 2, 3, 1, 1),
    "3x3 stem": (2, 3, 19, 18, 72, 3, 1, 1, 1, 1),
    "3x3 stride2 stem": (2, 3, 20, 33, 24, 3, 2, 1, 1, 1),
}


def problem(shape: str) -> ConvProblem:
    n, c, h, w, k, *rest = SHAPES[shape]
    kernel, stride, padding, dilation = (v if isinstance(v, tuple) else (v, v) for v in rest[:4])
    return ConvProblem(n, c, (h, w), k, kernel, stride, padding, dilation, rest[4])


def operands(problem: ConvProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An image and a weight with sums about as large as the image's numbers."""
    p = problem
    fan = p.channels // p.groups * p.kernel[0] * p.kernel[1]
    x = noise(p.batch, p.channels, *p.size, dtype=dtype)
    weight = noise(p.out_channels, p.channels // p.groups, *p.kernel, dtype=dtype, seed=1)
    x = x.contiguous(memory_format=torch.channels_last)
    return x.to(DEVICE), (weight / fan**0.5).to(DEVICE)


def kernels(
    shape: str,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind = "inference",
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """All that take a shape, where there is a library."""
    arch = 10 * torch.cuda.get_device_capability()[0] if HAS_GPU else 90
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(native_cuda, "code_for", lambda capability: capability)
    monkeypatch.setattr(gpu_choice, "precision", lambda dtype: "tf32")
    names = gpu_choice.admitted(kind, problem(shape), dtype, arch)
    return [name for name in names if name in cuda_conv.BY_NAME]


def tf32(x: Tensor) -> Tensor:
    """The nearest numbers with 10 bits of mantissa, the larger if two are."""
    bits = x.view(torch.int32)
    return torch.where(x.isfinite(), (bits + 0x1000) & -0x2000, bits).view(torch.float32)


def packed(weight: Tensor, groups: int, algorithm: str) -> Tensor:
    """The weight as the algorithm reads it."""
    chosen = cuda_conv.BY_NAME[algorithm]
    if chosen is cuda_conv.STEM:
        return cuda_conv.pack_stem(weight)
    numbers: Tensor = operators()._cuda_pack(weight, groups, chosen.columns, False)
    return numbers
