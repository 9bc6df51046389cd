"""The max-pool behind a stem: takes a deferred activation in training, and no int64 indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnet_fused.backends import native
from resnet_fused.backends.triton import support
from resnet_fused.modules.deferred import Deferred
from resnet_fused.ops import max_pool
from resnet_fused.ops.schema import is_channels_last

_COMPILED = (torch.float32, torch.float64, torch.bfloat16)


class MaxPool:
    """Equivalent to the nn.MaxPool2d that is handed over at each call."""

    def __call__(self, input: Tensor | Deferred, pool: nn.MaxPool2d) -> Tensor:
        window = self.window(pool)
        kernel, stride, padding, dilation = (window[i : i + 2] for i in (0, 2, 4, 6))
        if isinstance(input, Deferred):
            return input.max_pool((kernel, stride, padding, dilation, pool.ceil_mode))
        if (
            torch.compiler.is_compiling()
            or input.dim() != 4
            or pool.ceil_mode
            or not self.inside(input.shape, window)
        ):
            return pool(input)
        records = torch.is_grad_enabled() and input.requires_grad
        if max_pool.on_gpu(input, window):
            if records and input.nbytes < support.LEAST_STEP_BYTES:
                return pool(input)
            if records:
                return max_pool.MaxPool2d.apply(input, list(window))
        elif (
            not native.available
            or not input.is_cpu
            or input.dtype not in _COMPILED
            or records
            or not is_channels_last(input)
        ):
            return pool(input)
        return torch.ops.resnet_fused._max_pool2d(input, kernel, stride, padding, dilation)

    @staticmethod
    def window(pool: nn.MaxPool2d) -> tuple[int, ...]:
        """kernel_size, stride, padding and dilation, two numbers each."""
        pair = nn.modules.utils._pair
        stride = pool.kernel_size if pool.stride is None else pool.stride
        return (
            *pair(pool.kernel_size), *pair(stride), *pair(pool.padding), *pair(pool.dilation),
        )  # fmt: skip

    @staticmethod
    def inside(shape: Sequence[int], window: Sequence[int]) -> bool:
        """Whether every window meets the image, or eager PyTorch raises, and is no larger than the
        kernels take.
        """
        return all(
            0 <= 2 * window[4 + i] <= window[i]
            and max(window) <= max_pool.MOST_STEP
            and shape[2 + i] + 2 * window[4 + i] > window[6 + i] * (window[i] - 1)
            for i in (0, 1)
        )
