"""Convolutions of a block in training: one autograd function, where everything is as usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import policy
from resnet_fused.backends import gpu_kernels
from resnet_fused.backends.native_conv import Wired
from resnet_fused.backends.triton import support
from resnet_fused.checks import DTYPES
from resnet_fused.kept import Kept
from resnet_fused.modules.batch_norm import (
    affine,
    process_group,
    update_all_running_statistics,
    uses_batch_statistics,
)
from resnet_fused.modules.deferred import Deferred
from resnet_fused.ops import train_conv
from resnet_fused.ops.autograd import cast_for_autocast
from resnet_fused.ops.schema import conv_output_size
from resnet_fused.ops.train_block import TrainBlock, TrainStep
from resnet_fused.ops.train_conv import ConvNorm
from resnet_fused.packing import conv_padding


def options_of(conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str, negative_slope: float) -> ConvNorm:
    """What the kernels need to know of two modules and an activation."""
    padding = conv_padding(conv)
    assert padding is not None  # the matcher leaves such convolutions alone
    return ConvNorm(
        (conv.stride[0], conv.stride[1]), (padding[0], padding[1]),
        (conv.dilation[0], conv.dilation[1]), conv.groups, bn.eps, act, negative_slope,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Training:
    """Equivalent to the block's steps one after the other, where every batch norm trains."""

    wiring: tuple[Wired, ...]
    low_memory: bool
    _made: Kept[TrainBlock | None] = field(default_factory=Kept, compare=False)

    def run(self, input: Tensor | Deferred, modules: Sequence[Any]) -> Tensor | None:
        """The block's output; None where its steps have to choose themselves."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        convs, norms = modules[::2], modules[1::2]
        if any(bn is None or not uses_batch_statistics(bn) for bn in norms):
            return None
        data = input.z if isinstance(input, Deferred) else input
        whole = data
        (data,) = cast_for_autocast(data.device, data)
        if data is not whole and any(wired.residual == 0 for wired in self.wiring):
            return None  # the residual is added as it was
        precision = policy.current()
        state = _state(data, convs, norms, precision)
        block = self._made.get(state, (), lambda: self._block(data, convs, norms, precision))
        if block is None:
            return None
        if isinstance(input, Deferred):
            (data,) = cast_for_autocast(data.device, input.tensor())
        parameters: list[Tensor | None] = []
        for conv, bn in zip(convs, norms, strict=True):
            own = conv._parameters
            parameters += [own["weight"], own["bias"], *affine(bn, data)]
        if not any(t is not None and t.requires_grad for t in (data, *parameters)):
            return None
        output, statistics, counts = block(data, parameters)
        update_all_running_statistics(norms, statistics, counts)
        return output

    def _block(
        self,
        data: Tensor,
        convs: Sequence[nn.Conv2d],
        norms: Sequence[nn.BatchNorm2d],
        precision: str,
    ) -> TrainBlock | None:
        """What runs; None if anything does not fit the others."""
        if data.dim() != 4 or data.numel() == 0 or data.dtype not in DTYPES:
            return None
        if support.on_gpu(data):
            alone = all(process_group(bn) is None for bn in norms)
            small = alone and not self.low_memory and data.nbytes < support.LEAST_BLOCK_BYTES
            if small or gpu_kernels.unusable(data) is not None:
                return None
        # Autocast would cast the parameters; what needs them so does it itself.
        kind = data.device.type
        casts = torch.is_autocast_enabled(kind) and data.dtype == torch.get_autocast_dtype(kind)
        for t in (data, *(t for conv in convs for t in (conv.weight, conv.bias))):
            if t is not None and not (
                (t.dtype == data.dtype or (casts and t.dtype == torch.float32))
                and t.device == data.device
                and t.layout == torch.strided
            ):
                return None
        steps = []
        shapes: list[torch.Size] = [data.shape, torch.Size()]
        for conv, bn, wired in zip(convs, norms, self.wiring, strict=True):
            input, weight = shapes[wired.input], conv.weight
            vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            if input[1] != weight.shape[1] * conv.groups or any(
                v is not None and (v.shape != weight.shape[:1] or v.device != data.device)
                for v in vectors
            ):
                return None
            options = options_of(conv, bn, wired.act, wired.negative_slope)
            size = conv_output_size(
                input, weight, options.stride, options.padding, options.dilation
            )
            shape, group = torch.Size(size), process_group(bn)
            if min(size) < 1 or (group is None and shape.numel() == shape[1]):
                return None
            if wired.residual >= 0 and shapes[wired.residual] != shape:
                return None
            shapes.append(shape)
            algorithms = train_conv.choose_for(
                tuple(input), tuple(weight.shape), options[:4], data.dtype, precision
            )
            has = (conv.bias is not None, bn.weight is not None, bn.bias is not None)
            steps.append(TrainStep(wired.input, wired.residual, options, group, algorithms, has))
        return TrainBlock(tuple(steps), self.low_memory)


def _state(
    data: Tensor, convs: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d], precision: str
) -> tuple[object, ...]:
    """Everything that :meth:`Training._block` looks at."""
    kind = data.device.type
    casts = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    state: list[object] = [casts, precision, *_kind(data)]
    for conv, bn in zip(convs, norms, strict=True):
        state += _kind(conv._parameters["weight"])
        state += _kind(conv._parameters["bias"])
        state += (conv.stride, conv.padding, conv.dilation, conv.groups, bn.eps, process_group(bn))
        for t in (*bn._parameters.values(), *bn._buffers.values()):
            state += (None,) if t is None else (t.shape, t.device)
    return tuple(state)


def _kind(t: Tensor | None) -> tuple[object, ...]:
    return () if t is None else (t.shape, t.dtype, t.device, t.layout)
