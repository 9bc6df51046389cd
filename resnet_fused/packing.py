"""Weights with batch norm folded in, kept as long as nothing they were made from has changed.

A fold is keyed on the identity, the version counter, the address and the dtype of every tensor it
was made from. So ``load_state_dict``, an optimizer step, assigning a parameter, ``.to()`` and any
in-place change outdate it. Writing through ``tensor.data`` or a NumPy view hides from the version
counter, here as in autograd.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_fused import fold
from resnet_fused.backends import onednn
from resnet_fused.ops.schema import is_channels_last

_EAGER_IS_CONTIGUOUS = "_resnet_fused_eager_is_contiguous"  # on a channels_last output
_MOST_SHAPES = 8  # input shapes whose reordered weights are remembered for one convolution


def conv_padding(conv: nn.Conv2d) -> list[int] | None:
    """Padding in pixels; None where the two sides of the image are padded differently."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


@dataclass(slots=True)
class _Fold:
    key: tuple[object, ...]
    sources: tuple[Tensor | None, ...]  # kept alive, so that no other tensor can take an identity
    folded: onednn.Folded
    reordered: dict[torch.Size, Tensor] = field(default_factory=dict)


class PackedConv:
    """The fold of one convolution and one batch norm (or none), made at its first use.

    Safe to share between threads. A copy (deepcopy, pickle) starts empty.
    """

    def __init__(self) -> None:
        self._fold: _Fold | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PackedConv], tuple[()]]:
        return PackedConv, ()

    def __call__(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None,
        act: str,
        negative_slope: float,
        *,
        free_layout: bool,
    ) -> Tensor:
        """act(bn(conv(input)) [+ residual]) with fixed statistics, without gradients.

        Computes in channels_last. The output has the layout that eager PyTorch gives, unless
        `free_layout`: then it stays as it is, and tells its reader what eager's would be.
        """
        fold = self._current(conv, bn, input.dtype)
        weight = fold.reordered.get(input.shape)
        if weight is None:
            weight = self._reorder(fold, input.shape)
        output = onednn.convolve(
            fold.folded,
            weight,
            onednn.channels_last(input),
            None if residual is None else onednn.channels_last(residual),
            act,
            negative_slope,
            carry_bounds=True,
        )
        like_input = is_channels_last(input) and not hasattr(input, _EAGER_IS_CONTIGUOUS)
        if like_input or is_channels_last(conv.weight):
            return output
        if not free_layout:
            return onednn.contiguous(output)
        setattr(output, _EAGER_IS_CONTIGUOUS, True)
        return output

    def _current(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> _Fold:
        sources = (
            (conv.weight, conv.bias)
            if bn is None
            else (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        key = (dtype, None if bn is None else bn.eps, *map(_state, sources))
        fold = self._fold
        if fold is not None and fold.key == key:
            return fold
        with self._lock:
            self._fold = fold = _Fold(key, sources, _fold(conv, bn, dtype))
        return fold

    def _reorder(self, fold: _Fold, shape: torch.Size) -> Tensor:
        with self._lock:
            weight = onednn.reorder(fold.folded, shape)
            for known in fold.reordered.values():
                if _same_layout(known, weight):
                    weight = known
                    break
            if len(fold.reordered) >= _MOST_SHAPES:
                fold.reordered.clear()
            fold.reordered[shape] = weight
        return weight


def _state(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    if tensor.is_inference():
        return object()  # it has no version, and nothing made from it is kept
    return id(tensor), tensor._version, tensor.data_ptr()


def _same_layout(a: Tensor, b: Tensor) -> bool:
    describe = torch.ops.mkldnn._get_mkldnn_serialized_md
    return a.is_mkldnn and b.is_mkldnn and torch.equal(describe(a), describe(b))


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> onednn.Folded:
    padding = conv_padding(conv)
    assert padding is not None  # the matcher leaves such convolutions alone
    scale, shift = None, conv.bias
    if bn is not None:
        assert bn.running_mean is not None and bn.running_var is not None
        scale, shift = fold.scale_and_shift(
            bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
            conv_bias=conv.bias, dtype=torch.float64,
        )  # fmt: skip
    return onednn.fold(
        conv.weight, scale, shift,
        list(conv.stride), padding, list(conv.dilation), conv.groups, dtype=dtype,
    )  # fmt: skip
