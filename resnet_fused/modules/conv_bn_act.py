"""conv → BN → (+ residual) → activation as one step of a model's forward.

A step says what is done and keeps packed weights, never parameters: those stay in the model's own
modules and are handed over at each call. So checkpoints, optimizers and hooks see the same model as
before fusing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_fused.backends import onednn
from resnet_fused.backends.triton import support
from resnet_fused.modules.batch_norm import process_group, uses_batch_statistics
from resnet_fused.modules.bn_act import BNAct
from resnet_fused.modules.conv_on_gpu import ConvOnGpu, vectors_of
from resnet_fused.modules.deferred import Deferred
from resnet_fused.ops.autograd import cast_for_autocast
from resnet_fused.ops.schema import conv_output_size, is_channels_last, statistics_dtype
from resnet_fused.packing import PackedConv, conv_padding


@dataclass(slots=True)
class ConvBNAct:
    """conv → BN or none → (+ residual) → activation, for any device, dtype and mode.

    Equivalent to ``act(bn(conv(input)) + residual)``. Chosen at each call: folded weights in one
    primitive (fixed statistics, no gradient, on a CPU), one operator (the same on a GPU and inside
    torch.compile), or the library's convolution followed by one fused :class:`BNAct`.
    """

    after: BNAct
    packed: PackedConv = field(default_factory=PackedConv, compare=False)
    on_gpu: ConvOnGpu = field(default_factory=ConvOnGpu, compare=False)

    def __call__(
        self,
        input: Tensor | Deferred,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None = None,
    ) -> Tensor | Deferred:
        if isinstance(input, Deferred):
            z = _convolve_deferred(input, conv)
        elif records_on_gpu(input, bn) and _output_bytes(input, conv) < support.LEAST_STEP_BYTES:
            return self.plain(input, conv, bn, residual)
        else:
            output = self._fixed(input, conv, bn, residual)
            if output is not None:
                return output
            z = _convolve(input, conv)
        if bn is None:
            return self.after.finish(z, residual)
        return self.after(z, bn, residual, overwrite=not torch.compiler.is_compiling())

    def plain(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The modules one after the other, as eager PyTorch."""
        z = conv(input)
        return self.after.finish(z if bn is None else bn(z), residual)

    def _fixed(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None,
    ) -> Tensor | None:
        """The whole run in one call; None where that is not to be had, bad input included."""
        if bn is not None and uses_batch_statistics(bn):
            return None
        if torch.is_grad_enabled() and any_requires_grad(input, conv, bn, residual):
            return None
        if torch.compiler.is_compiling():
            return self._operator(input, conv, bn, residual)
        options = (self.after.act, self.after.negative_slope)
        if support.on_gpu(input):
            return self.on_gpu(input, conv, bn, residual, *options)
        data = input
        if torch.is_autocast_enabled("cpu"):
            (data,) = cast_for_autocast(input.device, input)
        if (
            not data.is_cpu
            or data.layout != torch.strided
            or (data is input and not _goes_with(conv, data))
            or onednn.unusable(data.dtype) is not None
        ):
            return None
        return self.packed(data, conv, bn, residual, *options)

    def _operator(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None,
    ) -> Tensor | None:
        """As one node of the graph that torch.compile or torch.export makes."""
        data, weight, bias = cast_for_autocast(input.device, input, conv.weight, conv.bias)
        if not sound(data, weight, bias, conv, residual):
            return None
        padding = conv_padding(conv)
        assert padding is not None  # the matcher leaves such convolutions alone
        scale, shift = vectors_of(conv, bn, statistics_dtype(data.dtype))
        return torch.ops.resnet_fused.conv_bn_act(
            data, weight, scale, shift, residual,
            list(conv.stride), padding, list(conv.dilation), conv.groups,
            self.after.act, self.after.negative_slope,
        )  # fmt: skip


def records_on_gpu(input: Tensor, *norms: nn.BatchNorm2d | None) -> bool:
    """Whether gradients are recorded on a GPU, and size decides who does it.

    Not where a batch norm gathers over processes: all of them have to gather the same.
    """
    return (
        support.on_gpu(input)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(bn is None or process_group(bn) is None for bn in norms)
    )


def _goes_with(conv: nn.Conv2d, data: Tensor) -> bool:
    weight = conv._parameters.get("weight")  # FSDP1 puts a plain tensor in its place
    return weight is not None and weight.dtype == data.dtype


def _output_bytes(input: Tensor, conv: nn.Conv2d) -> int:
    """Of the convolution's output, about."""
    vertical, horizontal = conv.stride
    return input.nbytes * conv.out_channels // (conv.in_channels * vertical * horizontal)


def any_requires_grad(
    input: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, residual: Tensor | None
) -> bool:
    """Whether autograd would record a step that runs on these."""
    tensors = [input, residual, conv.weight, conv.bias]
    if bn is not None:
        tensors += [bn.weight, bn.bias]
    return any(t is not None and t.requires_grad for t in tensors)


def sound(
    input: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, residual: Tensor | None
) -> bool:
    """Whether the arguments fit together without promotion, broadcasting or an error."""
    if input.dim() != 4 or input.numel() == 0 or input.shape[1] != conv.in_channels:
        return False
    for t in (input, weight, bias, residual):
        if t is not None and not (
            t.dtype == input.dtype and t.device == input.device and t.layout == torch.strided
        ):
            return False
    padding = conv_padding(conv)
    assert padding is not None
    size = conv_output_size(input.shape, weight, conv.stride, padding, conv.dilation)
    return min(size) > 0 and (residual is None or tuple(residual.shape) == size)


def _convolve(input: Tensor, conv: nn.Conv2d) -> Tensor:
    # With weights in channels_last oneDNN takes 1.7 times as long for an image's three channels
    # (16x3x112x112, 7x7: 7.4 ms against 4.4). The output's layout follows the input either way.
    if conv.in_channels <= 4 and input.is_cpu and is_channels_last(input):
        return conv._conv_forward(input, conv.weight.contiguous(), conv.bias)
    return conv(input)


def _convolve_deferred(input: Deferred, conv: nn.Conv2d) -> Tensor:
    z, weight, bias = cast_for_autocast(input.z.device, input.z, conv.weight, conv.bias)
    padding = conv_padding(conv)
    assert padding is not None  # the matcher leaves such convolutions alone
    if z.dtype != input.z.dtype or weight.dtype != z.dtype or z.shape[1] != conv.in_channels:
        return conv(input.tensor())
    return input.conv(
        weight, bias, (tuple(conv.stride), tuple(padding), tuple(conv.dilation), conv.groups)
    )
