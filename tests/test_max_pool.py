"""The compiled max-pool of inference equals nn.MaxPool2d bit for bit, NaN and strides included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused.backends import native
from resnet_fused.modules.max_pool import MaxPool

POOLS = {
    "stem": nn.MaxPool2d(3, 2, 1),
    "vgg": nn.MaxPool2d(2),
    "dilated": nn.MaxPool2d(3, 1, 1, dilation=2),
    "unequal": nn.MaxPool2d((3, 1), (2, 1), (1, 0)),
    "wide": nn.MaxPool2d(5, 3, 2),
    "ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
}
SHAPES = [
    (2, 64, 11, 13),
    (1, 3, 7, 7),
    (2, 130, 9, 5),
    (3, 65, 5, 5),
    (2, 16, 8, 10),  # windows leave pixels over, which ceil_mode takes
    (0, 8, 6, 6),
]


@pytest.mark.skipif(not native.available, reason="the compiled library is missing")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_eager(dtype: torch.dtype, pool: nn.MaxPool2d, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    if x.numel():
        x[0, 0, 0, 0] = float("nan")
        x[-1, -1, -1, -1] = -float("inf")
        x[0, 1] = -float("inf")
    expected, actual = pool(x), MaxPool()(x, pool)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))
    assert actual.stride() == expected.stride()


def test_a_window_outside_the_image_is_eagers_error() -> None:
    x = torch.zeros(1, 8, 2, 2).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        MaxPool()(x, nn.MaxPool2d(5))
    with pytest.raises(RuntimeError):
        MaxPool()(x, nn.MaxPool2d(2, padding=2))


@pytest.mark.skipif(not native.available, reason="the compiled library is missing")
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_hostile_arguments(name: str) -> None:
    arguments = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1]}
    arguments[name] = [-1, 2]
    with pytest.raises(RuntimeError, match=name):
        torch.ops.resnet_fused._max_pool2d(torch.zeros(1, 3, 8, 8), *arguments.values())


def test_gradient_stays_eagers() -> None:
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(MaxPool()(x, POOLS["stem"]).sum(), x)
    (expected,) = torch.autograd.grad(POOLS["stem"](x).sum(), x)
    assert torch.equal(grad, expected)
