"""conv → BN with fixed statistics → (+ residual) → activation on a GPU, with weights folded once.

What a call costs before anything is launched decides small batches. So what follows from weights
and shapes is kept: a call looks whether they are the same, and makes two launches (PyTorch's
convolution, and one pass over its output) or one, where eager PyTorch makes three or four.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import fold
from resnet_fused.backends.triton import support
from resnet_fused.conv_choice import LIBRARY
from resnet_fused.kept import Kept
from resnet_fused.ops import gpu, gpu_choice
from resnet_fused.ops.autograd import cast_for_autocast
from resnet_fused.ops.schema import conv_output_size, statistics_dtype
from resnet_fused.packing import conv_padding, statistics_and_affine

_MOST_SHAPES = 64  # input shapes that are remembered for one convolution


class _Way(NamedTuple):
    """What runs inputs of one shape."""

    size: torch.Size  # of the output
    geometry: Any  # stride, padding, dilation, groups
    algorithm: str


@dataclass(slots=True, eq=False)
class _Folded:
    """One convolution's weights as its launches take them."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    ways: dict[tuple[object, ...], _Way | None] = field(default_factory=dict)

    def way(self, data: Tensor, conv: nn.Conv2d) -> _Way | None:
        """For this input; None where eager PyTorch has to raise or to handle it."""
        precision = gpu_choice.precision(data.dtype)
        key = (
            data.shape, conv.stride, conv.padding, conv.dilation, conv.groups,
            gpu_choice.generation, precision,
        )  # fmt: skip
        try:
            return self.ways[key]
        except KeyError:
            if len(self.ways) >= _MOST_SHAPES:
                self.ways.clear()
            self.ways[key] = way = self._choose(data, conv)
            return way

    def _choose(self, data: Tensor, conv: nn.Conv2d) -> _Way | None:
        weight, padding = self.weight, conv_padding(conv)
        assert padding is not None  # the matcher leaves such convolutions alone
        if data.dim() != 4 or data.numel() == 0 or data.shape[1] != weight.shape[1] * conv.groups:
            return None
        geometry = (list(conv.stride), padding, list(conv.dilation), conv.groups)
        size = torch.Size(conv_output_size(data.shape, weight, *geometry[:3]))
        if min(size) < 1:
            return None
        algorithm = gpu_choice.choose("inference", data, weight, *geometry)
        return _Way(size, geometry, algorithm)


@dataclass(slots=True)
class ConvOnGpu:
    """Equivalent to ``act(bn(conv(input)) + residual)`` where nothing needs a gradient."""

    _folded: Kept[_Folded | None] = field(default_factory=Kept, compare=False)

    def __call__(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None,
        act: str,
        negative_slope: float,
    ) -> Tensor | None:
        """The output; None for what only eager PyTorch takes, or refuses."""
        data, casts = input, torch.is_autocast_enabled(input.device.type)
        if casts:
            (data,) = cast_for_autocast(input.device, input)
        if support.unusable(data) is not None or data.layout != torch.strided:
            return None
        own = conv._parameters  # nn.Module's getattr is slow
        sources = (own["weight"], own["bias"], *statistics_and_affine(bn))
        channels_last = data.is_contiguous(memory_format=torch.channels_last)
        eps = None if bn is None else bn.eps
        folded = self._folded.get(
            (data.dtype, data.device, channels_last, casts, eps), sources,
            lambda: _fold(data, conv, bn, channels_last),
        )  # fmt: skip
        way = None if folded is None else folded.way(data, conv)
        if folded is None or way is None:
            return None
        if residual is not None and not (
            residual.shape == way.size
            and residual.dtype == data.dtype
            and residual.device == data.device
            and residual.layout == torch.strided
        ):
            return None
        weight, rest = folded.weight, (folded.scale, folded.shift, residual)
        if way.algorithm == LIBRARY:
            z = torch.conv2d(data, weight, None, *way.geometry)
            if act == "none" and rest == (None, None, None):
                return z
            if gpu.unseen(z):
                gpu.kernels("scale_shift_act").scale_shift_act(
                    z, *rest, act, negative_slope, output=z
                )
            else:
                torch.ops.resnet_fused._finish_conv_(z, *rest, act, negative_slope)
            return z
        arguments: Any = (data, weight, *rest, *way.geometry, act, negative_slope)
        if gpu.unseen(data):
            return gpu.run_conv(way.algorithm, *arguments)
        return torch.ops.resnet_fused.conv_bn_act(*arguments)


def _fold(
    data: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, channels_last: bool
) -> _Folded | None:
    """None where the parameters do not go with the data."""
    weight, bias = cast_for_autocast(data.device, conv.weight, conv.bias)
    for t in (weight, bias):
        if t is not None and not (
            t.dtype == data.dtype and t.device == data.device and t.layout == torch.strided
        ):
            return None
    scale, shift = vectors_of(conv, bn, statistics_dtype(data.dtype))
    if channels_last:  # or every call would bring them into this form
        weight = weight.contiguous(memory_format=torch.channels_last)
    return _Folded(weight, scale, shift)


def vectors_of(
    conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of what follows a convolution without its bias."""
    if bn is None:
        return None, None if conv.bias is None else conv.bias.to(dtype)
    assert bn.running_mean is not None and bn.running_var is not None
    return fold.scale_and_shift(
        bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
        conv_bias=conv.bias, dtype=dtype,
    )  # fmt: skip
