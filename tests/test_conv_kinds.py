"""Kernels for some convolutions only: narrow groups, Strassen's 1x1, images of few channels."""

from __future__ import annotations

import pytest
import torch
from activations import ACTS
from conv_case import INF, NAN, SIZES, Case, corners
from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.backends.native_conv import (
    multiplies_bf16,
)

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.reason))


GROUPED = [(16, 1), (32, 2), (16, 4), (48, 8), (64, 16)]  # channels, and those of a group


@pytest.mark.parametrize(("channels", "group"), GROUPED)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_groups(
    dtype: torch.dtype, padding: int, stride: int, channels: int, group: int
) -> None:
    """Every edge, and no value that is not finite beyond its group."""
    for size in SIZES:
        if min(size) + 2 * padding < 3:
            continue
        for value in (0.0, NAN, INF):

            def place(data: Tensor, value: float = value) -> Tensor:
                data[-1, 3, -1, -1] = value
                return data

            case = Case(
                "grouped", (2, channels, *size), channels, stride=stride, padding=padding,
                groups=channels // group, residual=value == 0.0, dtype=dtype,
            )  # fmt: skip
            with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
                case.check(place)


@pytest.mark.parametrize("pixels", [1, 2, 13, 14, 27, 28, 29, 57, 100])
@pytest.mark.parametrize("stride", [1, 2])
def test_strassen_pairs_of_tiles(stride: int, pixels: int) -> None:
    """Every count of pixels, and no value that is not finite in another pixel's outputs."""
    for value in (0.0, NAN, INF, -INF, 1e38):
        for at in {0, pixels // 2, pixels - 1}:

            def place(data: Tensor, at: int = at, value: float = value) -> Tensor:
                data[0, 40, 0, at * stride] = value
                return data

            width = (pixels - 1) * stride + 1
            Case(
                "strassen", (1, 64, 1, width), 128, kernel=1, stride=stride, padding=0,
                residual=value == 0.0, act="none",
            ).check(place)  # fmt: skip


def test_strassen_of_many_channels() -> None:
    """Where its error is largest: that of one draw is over the policy's now and then."""
    Case("strassen", (1, 2048, 7, 7), 512, kernel=1, padding=0).check(draws=8)
    Case("strassen", (2, 1024, 14, 14), 2048, kernel=1, stride=2, padding=0).check(draws=8)


@pytest.mark.parametrize("act", ACTS)
def test_narrow_groups_with_every_activation(act: str) -> None:
    Case("grouped", (1, 32, 9, 11), 32, groups=8, act=act).check()


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no AVX512_BF16")
@pytest.mark.parametrize(
    ("channels", "kernel"), [(1, 3), (3, 7), (3, 11), (5, 3), (15, 5), (13, 1)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_windows_of_few_channels(channels: int, kernel: int, layout: torch.memory_format) -> None:
    """Odd channels are paired along the kernel's row: what follows the row is not read.

    (oneDNN reads it: its NaN reach further than float64's. So eager PyTorch runs without it.)
    """
    for value in (0.0, NAN, INF):
        for y, x in corners(12, 23):

            def place(data: Tensor, y: int = y, x: int = x, value: float = value) -> Tensor:
                data[-1, 0, y, x] = value
                return data.contiguous(memory_format=layout)

            for stride in (1, 2, 3):
                case = Case(
                    "direct", (2, channels, 12, 23), 40, stride=stride, residual=False,
                    kernel=kernel, padding=kernel // 2, dtype=torch.bfloat16, pairs=True,
                )  # fmt: skip
                with torch.backends.mkldnn.flags(enabled=False):
                    case.check(place)
