"""Max-pooling on a GPU in training, by the compiled kernels.

Kept for backward is a byte for each output, its place in its window. Eager PyTorch keeps an int64
index and the input, which is read for its shape only. The gradient is gathered: every pixel adds up
the windows that chose it, the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import gpu_kernels, native_cuda
from resnet_fused.ops.schema import is_channels_last

_ops = torch.ops.resnet_fused

MOST_POSITIONS = 255
"""Pixels of a window whose places are kept (csrc/common/pool_shape.h)."""

MOST_STEP = 2**15 - 1
"""The largest kernel_size, stride and dilation (csrc/common/pool_shape.h)."""

_MOST_PIXELS = 2**30  # of all images; the kernels count an output's in 32 bits
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def on_gpu(input: Tensor, window: tuple[int, ...]) -> bool:
    """Whether the compiled kernels for a GPU take this, in training as well.

    Args:
        window: kernel_size, stride, padding and dilation, two numbers each.
    """
    return (
        gpu_kernels.compiled(input)
        and input.dtype in _DTYPES
        and is_channels_last(input)
        and window[0] * window[1] <= MOST_POSITIONS
        and max(window) <= MOST_STEP
        and input.numel() // input.shape[1] < _MOST_PIXELS
        and native_cuda.unusable(input.get_device()) is None
    )


class MaxPool2d(torch.autograd.Function):
    """max_pool2d(input) of channels_last images, for a window as :func:`on_gpu` takes it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: list[int]) -> Tensor:
        output, positions = _ops._train_pool(input, [], 0.0, "none", 0.0, window)
        ctx.window, ctx.shape = window, input.shape
        ctx.save_for_backward(positions)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Unpool.apply(grad, *ctx.saved_tensors, ctx.shape, ctx.window), None


class _Unpool(torch.autograd.Function):
    """The gradient of the input; its own is what the windows' chosen pixels have."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, positions: Tensor, shape: torch.Size, window: list[int]
    ) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(positions)
        return _ops._max_unpool(grad, positions, grad.new_empty(1).expand(shape), window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        _, width, *steps = ctx.window
        stride, padding, dilation = (steps[i : i + 2] for i in (0, 2, 4))
        places = positions.long()
        inside = places // width, places % width
        y, x = (
            torch.arange(n, device=grad.device) * s - p for n, s, p in
            zip(places.shape[2:], stride, padding, strict=True)
        )  # fmt: skip
        rows = y[:, None] + inside[0] * dilation[0]
        chosen = rows * grad.shape[3] + x + inside[1] * dilation[1]
        found = grad.flatten(2).gather(2, chosen.flatten(2)).view_as(places)
        return found, None, None, None
