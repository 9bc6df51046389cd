"""What the library's own convolution is asked for, and how: :mod:`resnet_fused.backends.onednn`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_parity, assert_same_layout
from torch import Tensor

from resnet_fused.backends.onednn import convolution_backward

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
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
    """Of images whose last rows and columns some strides do not reach; of whole numbers, so that
    sums are exact in any order.
    """
    kernel, stride, padding, dilation, groups = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(0)
    format = LAYOUTS[layout]

    def whole(*shape: int) -> Tensor:
        drawn = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return drawn.contiguous(memory_format=format)

    x, w = whole(3, channels, 12, 10), whole(8, channels // groups, kernel, kernel)
    options = (list(stride), [padding] * 2, [dilation] * 2, groups)

    def plain(x: Tensor, w: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
        """In a layout that oneDNN's defect does not reach."""
        leaves = x.contiguous().requires_grad_(), w.contiguous().requires_grad_()
        return torch.autograd.grad(F.conv2d(*leaves, None, *options), leaves, gy.contiguous())

    gy = whole(*F.conv2d(x, w, None, *options).shape)
    ours = convolution_backward(gy, x, w, *options, wanted=(True, True))
    eager = plain(x, w, gy)
    truth = plain(x.double(), w.double(), gy.double())
    for name, mine, theirs, exact in zip(("input", "weight"), ours, eager, truth, strict=True):
        assert mine is not None
        assert_parity(mine, theirs, exact, what=f"gradient of {name}")
    assert_same_layout(ours[0], x, what="gradient of input")
    alone = [
        convolution_backward(gy, x, w, *options, wanted=w_) for w_ in ((True, False), (False, True))
    ]
    assert alone[0][1] is None and alone[1][0] is None
    assert torch.equal(alone[0][0], ours[0]) and torch.equal(alone[1][1], ours[1])


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
