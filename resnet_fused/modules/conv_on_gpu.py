"""conv → BN with fixed statistics → (+ residual) → activation on a GPU, with weights folded once.

What a call costs before anything is launched decides small batches. So what follows from weights
and shapes is kept: a call looks whether they are the same, for all blocks that follow one another
at once, and makes two launches a step (PyTorch's convolution, and one pass over its output) or one,
where eager PyTorch makes three or four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import fold
from resnet_fused.backends import cuda_conv, gpu_kernels
from resnet_fused.backends.native_conv import Wired
from resnet_fused.conv_choice import LIBRARY
from resnet_fused.kept import Kept
from resnet_fused.ops import gpu, gpu_choice
from resnet_fused.ops.autograd import cast_for_autocast
from resnet_fused.ops.schema import conv_output_size, is_channels_last, statistics_dtype
from resnet_fused.packing import conv_padding, state_of

_MOST_SHAPES = 64  # input shapes that are remembered for one convolution


class Data(NamedTuple):
    """All that is asked of an input before its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    autocast: bool

    @classmethod
    def of(cls, input: Tensor) -> tuple[Tensor, Data] | None:
        """The input as autocast has it, and this of it; None if no kernel takes it."""
        autocast = torch.is_autocast_enabled(input.device.type)
        data = cast_for_autocast(input.device, input)[0] if autocast else input
        if gpu_kernels.unusable(data) is not None or data.layout != torch.strided:
            return None
        return data, cls(data.shape, data.dtype, data.device, is_channels_last(data), autocast)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedConv:
    """One step for inputs of one shape, ready to be launched."""

    weight: Tensor | cuda_conv.Packed
    scale: Tensor | None
    shift: Tensor | None
    geometry: tuple[list[int], list[int], list[int], int]
    output: Data
    algorithm: str
    act: str
    negative_slope: float
    bare: bool  # nothing but a residual follows the convolution

    def __call__(self, data: Tensor, residual: Tensor | None) -> Tensor:
        """act(conv(data) · scale + shift + residual); the residual must fit."""
        if isinstance(self.weight, cuda_conv.Packed):
            return self.weight(
                data, self.scale, self.shift, residual, *self.geometry[:3], self.act,
                self.negative_slope,
            )  # fmt: skip
        if self.algorithm != LIBRARY:
            arguments: Any = (
                data, self.weight, self.scale, self.shift, residual, *self.geometry,
                self.act, self.negative_slope,
            )  # fmt: skip
            if gpu.unseen(data):
                return gpu.run_conv(self.algorithm, *arguments)
            return torch.ops.resnet_fused.conv_bn_act(*arguments)
        z = torch.conv2d(data, self.weight, None, *self.geometry)
        if self.bare and residual is None:
            return z
        rest = (self.scale, self.shift, residual, self.act, self.negative_slope)
        if not gpu_kernels.compiled(z) and gpu.unseen(z):
            gpu.kernels("scale_shift_act").scale_shift_act(z, *rest, output=z)
        else:
            torch.ops.resnet_fused._finish_conv_.default(z, *rest)
        return z

    def adds(self, residual: Tensor) -> bool:
        """Whether a residual fits."""
        return (
            isinstance(residual, Tensor)
            and residual.shape == self.output.shape
            and residual.dtype == self.output.dtype
            and residual.device == self.output.device
            and residual.layout == torch.strided
        )


@dataclass(slots=True, eq=False)
class _Folded:
    """One convolution's weights as its launches take them, and what runs each shape."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    prepared: dict[tuple[object, ...], PreparedConv | None] = field(default_factory=dict)
    packed: dict[str, Kept[cuda_conv.Packed]] = field(default_factory=dict)

    def prepare(
        self, data: Data, conv: nn.Conv2d, act: str, negative_slope: float
    ) -> PreparedConv | None:
        """For this input; None where eager PyTorch has to raise or to handle it."""
        padding = conv_padding(conv)
        assert padding is not None  # the matcher leaves such convolutions alone
        shape, weight = data.shape, self.weight
        if len(shape) != 4 or 0 in shape or shape[1] != weight.shape[1] * conv.groups:
            return None
        geometry = (list(conv.stride), padding, list(conv.dilation), conv.groups)
        size = torch.Size(conv_output_size(shape, weight, *geometry[:3]))
        if min(size) < 1:
            return None
        layout = torch.channels_last if data.channels_last else torch.contiguous_format
        like = torch.empty(shape, dtype=data.dtype, device="meta", memory_format=layout)
        algorithm = gpu_choice.choose("inference", like, weight, *geometry)
        ready: Tensor | cuda_conv.Packed = weight
        if algorithm in cuda_conv.BY_NAME:
            if act in cuda_conv.ACTIVATIONS:
                ready = self._pack(algorithm, conv.groups)
            else:
                algorithm = LIBRARY
        channels_last = data.channels_last or is_channels_last(weight)
        output = data._replace(shape=size, channels_last=channels_last)
        bare = self.scale is None and self.shift is None and act == "none"
        return PreparedConv(
            ready, self.scale, self.shift, geometry, output, algorithm, act, negative_slope, bare
        )

    def _pack(self, algorithm: str, groups: int) -> cuda_conv.Packed:
        """The weight as a compiled kernel reads it; the same for all shapes."""
        kept = self.packed.setdefault(algorithm, Kept())
        return kept.get(
            (), [self.weight], lambda: cuda_conv.Packed.of(self.weight, groups, algorithm)
        )


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
        found = Data.of(input)
        if found is None:
            return None
        data, like = found
        prepared = self.prepare(like, conv, bn, act, negative_slope)
        if prepared is None or not (residual is None or prepared.adds(residual)):
            return None
        return prepared(data, residual)

    def prepare(
        self,
        data: Data,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        act: str,
        negative_slope: float,
    ) -> PreparedConv | None:
        """What runs an input like this; kept until a parameter or a choice is another one."""
        own = conv._parameters  # nn.Module's getattr is slow
        if "weight" not in own:  # FSDP1 puts a plain tensor in its place
            return None
        sources = (own["weight"], own["bias"], *state_of(bn))
        eps = None if bn is None else bn.eps
        folded = self._folded.get((data[1:], eps), sources, lambda: _fold(data, conv, bn))
        if folded is None:
            return None
        key = (data.shape, *conv_options(conv), *gpu_choice.state(data.dtype))
        try:
            return folded.prepared[key]
        except KeyError:
            if len(folded.prepared) >= _MOST_SHAPES:
                folded.prepared.clear()
            prepared = folded.prepare(data, conv, act, negative_slope)
            folded.prepared[key] = prepared
            return prepared


def conv_options(conv: nn.Conv2d) -> tuple[object, ...]:
    """What decides a convolution's output beside tensors."""
    return conv.stride, conv.padding, conv.dilation, conv.groups


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """The steps of blocks that follow one another, without a look at anything between them."""

    blocks: Sequence[Sequence[tuple[PreparedConv, Wired]]]

    def __call__(self, data: Tensor) -> Tensor:
        for block in self.blocks:
            values: list[Any] = [data, None]
            for conv, wired in block:
                residual = None if wired.residual < 0 else values[wired.residual]
                values.append(conv(values[wired.input], residual))
            data = values[-1]
        return data


def _fold(data: Data, conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> _Folded | None:
    """None where the parameters do not go with the data."""
    weight, bias = conv.weight, conv.bias
    if data.autocast:
        weight, bias = cast_for_autocast(data.device, weight, bias)
    for t in (weight, bias):
        if t is not None and not (
            t.dtype == data.dtype and t.device == data.device and t.layout == torch.strided
        ):
            return None
    scale, shift = vectors_of(conv, bn, statistics_dtype(data.dtype))
    if data.channels_last:  # or every call would bring them into this form
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
