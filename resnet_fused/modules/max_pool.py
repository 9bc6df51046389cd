"""The max-pool behind a stem: takes a deferred activation, so that it is not kept for backward."""

from __future__ import annotations

from torch import Tensor, nn

from resnet_fused.modules.deferred import Deferred


class MaxPool:
    """Equivalent to the nn.MaxPool2d that is handed over at each call."""

    def __call__(self, input: Tensor | Deferred, pool: nn.MaxPool2d) -> Tensor:
        if not isinstance(input, Deferred):
            return pool(input)
        pair = nn.modules.utils._pair
        kernel = pair(pool.kernel_size)
        stride = kernel if pool.stride is None else pair(pool.stride)
        return input.max_pool(
            (kernel, stride, pair(pool.padding), pair(pool.dilation), pool.ceil_mode)
        )
