"""The max-pool behind a stem: takes a deferred activation in training, and no indices otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fused.backends import native
from resnet_fused.modules.deferred import Deferred
from resnet_fused.ops.schema import is_channels_last

_COMPILED = (torch.float32, torch.float64, torch.bfloat16)


class MaxPool:
    """Equivalent to the nn.MaxPool2d that is handed over at each call."""

    def __call__(self, input: Tensor | Deferred, pool: nn.MaxPool2d) -> Tensor:
        pair = nn.modules.utils._pair
        kernel = pair(pool.kernel_size)
        stride = kernel if pool.stride is None else pair(pool.stride)
        padding, dilation = pair(pool.padding), pair(pool.dilation)
        if isinstance(input, Deferred):
            return input.max_pool((kernel, stride, padding, dilation, pool.ceil_mode))
        if (
            not native.available
            or not input.is_cpu
            or input.dtype not in _COMPILED
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and input.requires_grad)
            or not is_channels_last(input)
            or not self._inside(input, kernel, padding, dilation)
            or pool.ceil_mode
        ):
            return pool(input)
        return torch.ops.resnet_fused._max_pool2d(input, kernel, stride, padding, dilation)

    @staticmethod
    def _inside(
        input: Tensor, kernel: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> bool:
        """Whether every window meets the image; eager PyTorch raises for the others."""
        return all(
            0 <= 2 * p <= k and size + 2 * p > d * (k - 1)
            for size, k, p, d in zip(input.shape[2:], kernel, padding, dilation, strict=True)
        )
