"""Weights with batch norm folded in, kept as long as nothing they were made from has changed.

A fold is keyed on the identity, the version counter, the address and the dtype of every tensor it
was made from. So ``load_state_dict``, an optimizer step, assigning a parameter, ``.to()`` and any
in-place change outdate it. Writing through ``tensor.data`` or a NumPy view hides from the version
counter, here as in autograd.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused import fold
from resnet_fused.backends import onednn
from resnet_fused.ops.schema import conv_output_size, is_channels_last

T = TypeVar("T")

_MOST_SHAPES = 8  # input shapes whose reordered weights are remembered for one convolution


def conv_padding(conv: nn.Conv2d) -> list[int] | None:
    """Padding in pixels; None where the two sides of the image are padded differently."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


class Kept(Generic[T]):
    """A value made from tensors, kept as long as they and its options have not changed.

    Safe to share between threads. A copy (deepcopy, pickle) starts empty.
    """

    def __init__(self) -> None:
        # The tensors are kept alive with it, so that no other one can take an identity.
        self._kept: tuple[tuple[object, ...], Sequence[Tensor | None], T] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return type(self), ()

    def get(
        self,
        options: tuple[object, ...],
        sources: Sequence[Tensor | None],
        make: Callable[[], T],
    ) -> T:
        """The value for these tensors, made now if need be."""
        key = (options, *map(_state, sources))
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[2]
        with self._lock, torch.no_grad():
            value = make()
            self._kept = key, sources, value
        return value


def _state(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    try:
        return id(tensor), tensor._version, tensor.data_ptr()
    except RuntimeError:
        return object()  # an inference tensor has no version: nothing made from it is kept


def statistics_and_affine(bn: nn.BatchNorm2d | None) -> tuple[Tensor | None, ...]:
    """What BN with fixed statistics computes from: mean, variance, weight and bias."""
    if bn is None:
        return ()
    buffers, parameters = bn._buffers, bn._parameters  # getattr costs more than the whole key
    return (
        buffers["running_mean"],
        buffers["running_var"],
        parameters["weight"],
        parameters["bias"],
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    weight: Tensor  # in oneDNN's own layout
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Packed:
    folded: onednn.Folded
    prepared: dict[torch.Size, _Prepared | None] = field(default_factory=dict)

    def for_shape(self, input: Tensor) -> _Prepared | None:
        """The weights for inputs of this shape; None where another path has to take them."""
        shape = input.shape
        if shape not in self.prepared:
            if len(self.prepared) >= _MOST_SHAPES:
                self.prepared.clear()
            self.prepared[shape] = self._prepare(input)
        return self.prepared[shape]

    def _prepare(self, input: Tensor) -> _Prepared | None:
        folded = self.folded
        if (
            input.dim() != 4
            or input.numel() == 0
            or input.shape[1] != folded.weight.shape[1] * folded.groups
            or onednn.is_small(input, folded.weight, folded.groups)
        ):
            return None
        size = conv_output_size(
            input, folded.weight, folded.stride, folded.padding, folded.dilation
        )
        if min(size) < 1:
            return None
        weight = onednn.reorder(folded, input.shape)
        for known in self.prepared.values():
            if known is not None and _same_layout(known.weight, weight):
                weight = known.weight
        return _Prepared(weight, size)


class PackedConv(Kept[_Packed]):
    """The fold of one convolution and one batch norm (or none) in oneDNN's layout."""

    def __call__(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None,
        act: str,
        negative_slope: float,
    ) -> Tensor | None:
        """act(bn(conv(input)) [+ residual]) with fixed statistics, without gradients.

        Input or weights are channels_last, and so is the output. None if they are not (oneDNN then
        copies to a layout of its own and back, which costs more than fusing saves), if the
        arguments do not fit together, or if eager PyTorch would not call oneDNN either.
        """
        weights = conv._parameters["weight"], conv._parameters["bias"]
        if not is_channels_last(input) and not is_channels_last(conv.weight):
            return None
        options = (
            input.dtype, conv.stride, conv.padding, conv.dilation, conv.groups,
            None if bn is None else bn.eps,
        )  # fmt: skip
        packed = self.get(
            options,
            (*weights, *statistics_and_affine(bn)),
            lambda: _pack(conv, bn, input.dtype),
        )
        prepared = packed.for_shape(input)
        if prepared is None or not (
            residual is None
            or (
                residual.shape == prepared.output_shape
                and residual.dtype == input.dtype
                and residual.is_cpu
                and residual.layout == torch.strided
            )
        ):
            return None
        return onednn.convolve(
            packed.folded,
            prepared.weight,
            onednn.channels_last(input),
            None if residual is None else onednn.channels_last(residual),
            act,
            negative_slope,
            output_shape=prepared.output_shape,
            carry_bounds=True,
        )


def _same_layout(a: Tensor, b: Tensor) -> bool:
    describe = torch.ops.mkldnn._get_mkldnn_serialized_md
    return a.is_mkldnn and b.is_mkldnn and torch.equal(describe(a), describe(b))


def _pack(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> _Packed:
    padding = conv_padding(conv)
    assert padding is not None  # the matcher leaves such convolutions alone
    scale, shift = None, conv.bias
    if bn is not None:
        assert bn.running_mean is not None and bn.running_var is not None
        scale, shift = fold.scale_and_shift(
            bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
            conv_bias=conv.bias, dtype=torch.float64,
        )  # fmt: skip
    folded = onednn.fold(
        conv.weight, scale, shift,
        list(conv.stride), padding, list(conv.dilation), conv.groups, dtype=dtype,
    )  # fmt: skip
    return _Packed(folded)
