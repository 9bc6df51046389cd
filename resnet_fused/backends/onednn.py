"""Convolution + scale + shift + residual + activation as one oneDNN primitive with post-operations.

PyTorch ships oneDNN and reaches its post-operations through ``torch.ops.mkldnn``. Two things keep
that from being a drop-in for eager PyTorch, and both are mended here:

* oneDNN's relu, clip and gelu drop NaN (and gelu makes NaN of infinity). A NaN can only arise from
  a value that is not finite, so the post-operation is used where none can occur: from a bound on
  ``max |x|`` and the largest row sum of ``|w|`` follows a bound on every partial sum of the output.
  Each output carries its bound to the next layer; only when the chain of bounds grows past the
  dtype's range is a tensor read (``_max_abs``) to start a new one. Everything else takes the slow
  path: the convolution alone, then one pass of the epilogue kernel, which keeps NaN.
* Every output of the library call is freshly mapped memory, whose page faults cost 12 to 25 % of a
  ResNet-50 forward at batch 16. Large outputs therefore come from the library's pool, and the
  convolution accumulates into them.

Paper of the primitive: Georganas et al., *Anatomy of High-Performance Deep Learning Convolutions on
SIMD Architectures* (2018).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused import policy
from resnet_fused.backends import native, reference
from resnet_fused.ops.schema import NAMESPACE, conv_output_size, is_channels_last

_POST_OPERATIONS: dict[str, tuple[str, str]] = {  # act -> (oneDNN's name, its algorithm)
    "none": ("none", ""),
    "relu": ("relu", ""),
    "relu6": ("hardtanh", ""),
    "leaky_relu": ("leaky_relu", ""),
    "silu": ("swish", ""),
    "hardswish": ("hardswish", ""),
    "gelu": ("gelu", "none"),
}
_NEEDS_FINITE = ("relu", "relu6", "gelu")
_SAFE_BOUND = 1e37  # float32's and bfloat16's largest number is 3.4e38
_ROUNDING = 1.01  # growth of a bound by the rounding of one layer, generous for bfloat16
_POOL_BYTES = 32 << 20  # glibc's malloc recycles what is smaller (M_MMAP_THRESHOLD's maximum)
_MARK = "_resnet_fused_bound"  # on a tensor: (its version, a bound on max |x|)


def unusable(dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused convolution cannot run for a dtype on this machine, or None if it can."""
    if not torch.backends.mkldnn.enabled:
        return "PyTorch's oneDNN is switched off (torch.backends.mkldnn.enabled)"
    return _unusable(dtype)


@functools.cache
def _unusable(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this PyTorch has no mkldnn._convolution_pointwise"
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return None if supported else "the processor has no bfloat16 for oneDNN"
    return f"oneDNN's fused convolution is not used for {dtype}"


def is_small(dtype: torch.dtype, input_shape: Sequence[int], weight: Tensor, groups: int) -> bool:
    """Whether eager PyTorch leaves a convolution to its own im2col instead of oneDNN.

    So does this library: on such sizes oneDNN sums in one long chain, at several times the error.
    The rule is ATen's (use_mkldnn in native/Convolution.cpp).
    """
    return (
        dtype == torch.float32
        and input_shape[0] == 1
        and groups == 1
        and min(weight.shape[2:]) <= 3
        and math.prod(input_shape) <= 20480
    )


def is_product(
    dtype: torch.dtype,
    batch: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether eager PyTorch, on one thread, makes a 1x1 convolution a matrix product by BLAS.

    That adds up long sums in more parts than oneDNN does, at 0.6 of its error with 1024 channels.
    The rule is ATen's, too.
    """
    return (
        dtype == torch.float32
        and batch < 16
        and tuple(kernel) == (1, 1) == tuple(stride) == tuple(dilation)
        and torch.get_num_threads() == 1
    )


@dataclass(frozen=True, slots=True)
class Folded:
    """A convolution's weights with the scale folded in, and what bounds its output."""

    weight: Tensor  # (K, C / groups, R, S), or oneDNN's opaque layout of it
    bias: Tensor  # (K,)
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    gain: float  # max over k of the sum of |w[k]|
    offset: float  # max |bias|


def fold(
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *,
    dtype: torch.dtype,
) -> Folded:
    """Fold a scale into the weights: conv(x, w)·scale + shift = conv(x, w·scale) + shift.

    The products are made in the scale's dtype: float64 rounds each weight once.
    """
    with torch.no_grad():
        if scale is None:
            weight = weight.detach().to(dtype)
        else:
            product = torch.empty_like(weight, dtype=dtype)
            weight = torch.mul(weight, scale.view(-1, 1, 1, 1), out=product)
        # oneDNN reads it as if it had no gaps.
        bias = (
            weight.new_zeros(weight.shape[0])
            if shift is None
            else shift.detach().to(dtype).contiguous()
        )
        gain = torch.linalg.vector_norm(weight, 1, (1, 2, 3), dtype=torch.float32).max().item()
        offset = bias.float().abs().max().item()
    return Folded(
        weight, bias, list(stride), list(padding), list(dilation), groups, gain, offset
    )  # fmt: skip


def reorder(folded: Folded, input_shape: Sequence[int]) -> Tensor:
    """The weights in the layout that oneDNN wants for inputs of this shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        folded.weight, folded.padding, folded.stride, folded.dilation, folded.groups,
        list(input_shape),
    )  # fmt: skip


def _max_abs(input: Tensor) -> float:
    if native.available:
        return torch.ops.resnet_fused._max_abs.default(input)
    return input.abs().max().item()


def _bound(input: Tensor, *, trust: bool) -> float:
    """A bound on max |x|: the one that the tensor carries, if it may be trusted, else the value."""
    # The version counter says whether the tensor was written to since; tensors made in inference
    # mode have none, and are read each time.
    tracked = not input.is_inference()
    mark = getattr(input, _MARK, None) if tracked and trust else None
    if mark is not None and mark[0] == input._version:
        return mark[1]
    bound = _max_abs(input)
    if tracked:
        setattr(input, _MARK, (input._version, bound))
    return bound


def _output_bound(folded: Folded, input: Tensor, residual: Tensor | None, *, trust: bool) -> float:
    bound = (folded.gain * _bound(input, trust=trust) + folded.offset) * _ROUNDING
    return bound if residual is None else bound + _bound(residual, trust=trust)


def convolve(
    folded: Folded,
    weight: Tensor,
    input: Tensor,
    residual: Tensor | None,
    act: str,
    negative_slope: float,
    *,
    output_shape: Sequence[int],
    carry_bounds: bool,
) -> Tensor:
    """act(conv(input, weight) + bias [+ residual]), all of them channels_last and dense.

    `weight` is folded's or a reordered copy. `carry_bounds` says that nobody writes to input,
    residual and output behind the version counter's back, so that bounds may travel on them.
    """
    bound = math.nan
    fits = act not in _NEEDS_FINITE
    if not fits:
        bound = _output_bound(folded, input, residual, trust=carry_bounds)
        if carry_bounds and not bound < _SAFE_BOUND:
            bound = _output_bound(folded, input, residual, trust=False)
        fits = bound < _SAFE_BOUND
    # The library adds in the primitive for groups = 1 only, and activates nothing but relu then.
    adds = residual is None or (folded.groups == 1 and act in ("none", "relu"))
    if fits and adds:
        output = _run(folded, weight, input, residual, act, negative_slope, output_shape)
    else:
        output = _run(folded, weight, input, None, "none", negative_slope, output_shape)
        one = torch.ones(output.shape[1])
        output = torch.ops.resnet_fused.scale_shift_act(
            output, one, torch.zeros_like(one), residual, act, negative_slope
        )
    if carry_bounds and fits and bound < _SAFE_BOUND and not output.is_inference():
        setattr(output, _MARK, (output._version, min(bound, 6.0) if act == "relu6" else bound))
    return output


def _run(
    folded: Folded,
    weight: Tensor,
    input: Tensor,
    residual: Tensor | None,
    act: str,
    negative_slope: float,
    output_shape: Sequence[int],
) -> Tensor:
    options = (folded.padding, folded.stride, folded.dilation, folded.groups)
    if act in ("none", "relu") and folded.groups == 1:
        unary = None if act == "none" else act
        output = _pooled_output(output_shape, input, residual)
        if output is not None:
            torch.ops.mkldnn._convolution_pointwise_.binary(
                output, input, weight, folded.bias, *options, "add", None, unary, [], None
            )
            return output
        if residual is not None:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                input, residual, weight, folded.bias, *options, "add", None, unary, [], None
            )
    name, algorithm = _POST_OPERATIONS[act]
    scalars = {"leaky_relu": [negative_slope], "relu6": [0.0, 6.0]}.get(act, [])
    return torch.ops.mkldnn._convolution_pointwise.default(
        input, weight, folded.bias, *options, name, scalars, algorithm
    )


def _pooled_output(shape: Sequence[int], input: Tensor, residual: Tensor | None) -> Tensor | None:
    """A recycled output for the convolution to add to: zeros or the residual; None if too small."""
    if math.prod(shape) * input.element_size() < _POOL_BYTES or not native.available:
        return None
    if residual is None:
        return torch.ops.resnet_fused._pool_zeros(shape, input.dtype)
    return torch.ops.resnet_fused._pool_clone(residual)


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    negative_slope: float,
) -> Tensor:
    """The operator on a CPU: folds on every call. Modules keep the fold, see packing.py."""
    if native.available:
        torch.ops.resnet_fused._check_conv.default(
            input, weight, scale, shift, residual, stride, padding, dilation, groups
        )
    fast = is_channels_last(input) or is_channels_last(weight)
    exact = policy.current() == "strict" and is_product(
        input.dtype, input.shape[0], weight.shape[2:], stride, dilation
    )
    small = is_small(input.dtype, input.shape, weight, groups)
    if not fast or exact or small or unusable(input.dtype):
        z = torch.conv2d(input, weight, None, stride, padding, dilation, groups)
        scale, shift = reference.scale_and_shift_or_identity(z, scale, shift)
        return torch.ops.resnet_fused.scale_shift_act(
            z, scale, shift, residual, act, negative_slope
        )
    folded = fold(weight, scale, shift, stride, padding, dilation, groups, dtype=input.dtype)
    return convolve(
        folded,
        folded.weight,
        channels_last(input),
        None if residual is None else channels_last(residual),
        act,
        negative_slope,
        output_shape=conv_output_size(input.shape, weight, stride, padding, dilation),
        carry_bounds=False,
    )


def convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution's input and weight by PyTorch, as far as they are wanted.

    On a CPU those of a 1×1 kernel with a stride are taken of the pixels that it reads: oneDNN's own
    way to leave out the others writes beyond its memory (torch 2.13: few channels on AVX2, more of
    them with several threads on AVX-512).
    """
    whole, step = input, tuple(stride)
    point = tuple(weight.shape[2:]) == (1, 1) and not any(padding)
    last = is_channels_last(input) or is_channels_last(weight)  # PyTorch's rule as well
    skips = point and step != (1, 1) and input.is_cpu and last
    if skips:
        input, stride = channels_last(input[..., :: step[0], :: step[1]]), (1, 1)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups,
        [*wanted, False],
    )  # fmt: skip
    if skips and grad_input is not None:
        read, grad_input = grad_input, torch.zeros_like(whole)
        grad_input[..., :: step[0], :: step[1]] = read
    return grad_input, grad_weight


def channels_last(tensor: Tensor) -> Tensor:
    """The same values with channels innermost and no gaps.

    In the strides of dimensions of one too, which are any number in a view and in PyTorch's eyes
    right: the library goes by them, and reads and writes elsewhere.
    """
    _, c, h, w = tensor.shape
    strides = c * h * w, 1, c * w, c
    if tensor.stride() == strides:
        return tensor
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


_library = torch.library.Library(NAMESPACE, "IMPL")
_library.impl("conv_bn_act", conv_bn_act, "CPU")
