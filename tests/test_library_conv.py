"""What the library's own convolution is asked for, and how: :mod:`resnet_fused.backends.onednn`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_parity
from torch import Tensor

from resnet_fused.backends.onednn import convolution_backward

C, L = torch.contiguous_format, torch.channels_last
LAYOUTS = {  # of input, weight and gradient
    "contiguous": (C, C, C), "channels_last": (L, L, L), "weight": (C, L, C), "input": (L, C, C),
}  # fmt: skip
SIZES = ((12, 10), (10, 1), (1, 10), (2, 2))
GEOMETRIES = {
    # kernel, stride, padding, dilation, groups: what is taken of the pixels that are read
    "projection": (1, (2, 2), 0, 1, 1),
    "one way": (1, (1, 2), 0, 1, 1),
    "far": (1, (3, 5), 0, 1, 1),
    "grouped projection": (1, (2, 2), 0, 1, 2),
    # and what is not
    "point": (1, (1, 1), 0, 1, 1),
    "padded point": (1, (2, 2), 1, 1, 1),
    "3x3": (3, (2, 2), 1, 1, 1),
    "dilated": (3, (2, 1), 2, 2, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2, 4, 6, 16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients(geometry: str, channels: int, layout: str, dtype: torch.dtype) -> None:
    """Of images whose last rows and columns some strides do not reach, and of one row or column,
    whose strides say nothing; of whole numbers, so that sums are exact in any order.
    """
    kernel, stride, padding, dilation, groups = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(0)

    def whole(shape: Sequence[int], format: torch.memory_format) -> Tensor:
        drawn = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return drawn.contiguous(memory_format=format)

    of_input, of_weight, of_grad = LAYOUTS[layout]
    w = whole((8, channels // groups, kernel, kernel), of_weight)
    options = (list(stride), [padding] * 2, [dilation] * 2, groups)

    def plain(x: Tensor, w: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
        """In a layout that oneDNN's defect does not reach."""
        leaves = x.contiguous().requires_grad_(), w.contiguous().requires_grad_()
        return torch.autograd.grad(F.conv2d(*leaves, None, *options), leaves, gy.contiguous())

    for size in SIZES:
        x = whole((3, channels, *size), of_input)
        gy = whole(F.conv2d(x, w, None, *options).shape, of_grad)
        ours = convolution_backward(gy, x, w, *options, wanted=(True, True))
        eager = plain(x, w, gy)
        truth = plain(x.double(), w.double(), gy.double())
        for name, mine, theirs, exact in zip(("input", "weight"), ours, eager, truth, strict=True):
            assert mine is not None
            assert_parity(mine, theirs, exact, what=f"gradient of {name}, {size}")
        for wanted in ((True, False), (False, True)):
            alone = convolution_backward(gy, x, w, *options, wanted=wanted)
            for one, both, asked in zip(alone, ours, wanted, strict=True):
                assert torch.equal(one, both) if asked else one is None


def test_pixels_that_are_not_read_have_no_gradient() -> None:
    x = torch.randn(2, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    gy, w = torch.full((2, 4, 3, 4), torch.nan), torch.randn(4, 3, 1, 1)
    gy = gy.contiguous(memory_format=torch.channels_last)
    grad, _ = convolution_backward(gy, x, w, [2, 2], [0, 0], [1, 1], 1, (True, False))
    assert grad is not None and grad[..., ::2, ::2].isnan().all()
    assert (grad[..., 1::2, :] == 0).all() and (grad[..., 1::2] == 0).all()


def test_no_images() -> None:
    x = torch.empty(0, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    gy, w = torch.empty(0, 4, 3, 4), torch.randn(4, 3, 1, 1)
    grad, weight = convolution_backward(gy, x, w, [2, 2], [0, 0], [1, 1], 1, (True, True))
    assert grad is not None and grad.shape == x.shape
    assert weight is not None and not weight.any()
