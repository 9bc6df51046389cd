"""conv → BN → activation → max-pool, a network's stem, as one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused.backends.triton import support
from resnet_fused.modules.batch_norm import (
    affine,
    process_group,
    update_all_running_statistics,
    uses_batch_statistics,
)
from resnet_fused.modules.conv_bn_act import ConvBNAct, any_requires_grad, sound
from resnet_fused.modules.deferred import Deferred
from resnet_fused.modules.max_pool import MaxPool
from resnet_fused.modules.train import options_of
from resnet_fused.ops.autograd import cast_for_autocast
from resnet_fused.ops.schema import conv_output_size
from resnet_fused.ops.train_stem import TrainStem
from resnet_fused.packing import conv_padding


@dataclass(frozen=True, slots=True)
class Stem:
    """Equivalent to the pool after the convolution's step."""

    conv: ConvBNAct
    pool: MaxPool

    def __call__(
        self,
        input: Tensor | Deferred,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        pool: nn.MaxPool2d,
    ) -> Tensor:
        output = self._train(input, conv, bn, pool)
        return self.pool(self.conv(input, conv, bn), pool) if output is None else output

    def _train(
        self,
        input: Tensor | Deferred,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        pool: nn.MaxPool2d,
    ) -> Tensor | None:
        """All of it as one function; None where that is not to be had."""
        if (
            torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or bn is None
            or not uses_batch_statistics(bn)
            or process_group(bn) is not None
            or isinstance(input, Deferred)
            or not any_requires_grad(input, conv, bn, None)
        ):
            return None
        data, weight, bias = cast_for_autocast(input.device, input, conv.weight, conv.bias)
        if not sound(data, weight, bias, conv, None):
            return None
        weight, bias = conv.weight, conv.bias
        padding = conv_padding(conv)
        assert padding is not None  # the matcher leaves such convolutions alone
        size = conv_output_size(data.shape, weight, conv.stride, padding, conv.dilation)
        window = MaxPool.window(pool)
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        if (
            size[0] * size[2] * size[3] < 2
            or pool.ceil_mode
            or not MaxPool.inside(size, window)
            or any(v is not None and v.shape != weight.shape[:1] for v in vectors)
        ):
            return None
        after = self.conv.after
        stem = TrainStem(options_of(conv, bn, after.act, after.negative_slope), window)
        small = math.prod(size) * data.element_size() < support.LEAST_STEP_BYTES
        if (support.on_gpu(data) and small) or not stem.runs(data):
            return None
        output, mean, var = stem(data, weight, bias, *affine(bn, data))
        update_all_running_statistics([bn], [mean, var], [size[0] * size[2] * size[3]])
        return output
