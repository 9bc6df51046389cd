"""Every operator of the library: its schema and what it does to shapes, dtypes and strides.

This file needs torch and nothing else. Backends only implement what is defined here:

* ``csrc/cpu`` registers the CPU kernels when the compiled library is loaded,
* ``backends/reference.py`` registers plain PyTorch for every device without a kernel of its own.

``act`` is one of :data:`ACTIVATIONS`; ``negative_slope`` is read by ``leaky_relu`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

NAMESPACE = "resnet_fused"

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")

_library = torch.library.Library(NAMESPACE, "DEF")

# y = act(conv(x, w) * scale + shift [+ residual])
_library.define(
    "conv_bn_act(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "str act, float negative_slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# y = act(x * scale + shift [+ residual]), scale and shift one number per channel
_library.define(
    "scale_shift_act(Tensor input, Tensor scale, Tensor shift, Tensor? residual, "
    "str act, float negative_slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# y = act((x - mean) / sqrt(var + eps) * weight + bias [+ residual]) with the batch's own mean and
# biased variance, which are returned: updating running statistics is the caller's business.
_library.define(
    "bn_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
    "str act, float negative_slope) -> (Tensor output, Tensor mean, Tensor var)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The mask of a piecewise linear activation comes from `output`; without a residual it is recomputed
# from `input`, and `output` is not needed. The others recompute their argument and need `residual`.
_library.define(
    "bn_act_backward(Tensor grad_output, Tensor input, Tensor? residual, Tensor? output, "
    "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
    "str act, float negative_slope, bool has_residual) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The halves of bn_act: what runs between them, a convolution or a collective, needs only the one.
_library.define(
    "batch_statistics(Tensor input) -> (Tensor mean, Tensor var)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "normalize_act(Tensor input, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, float eps, str act, float negative_slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The halves of bn_act_backward. grad_residual is grad_output * act'(.), empty without a residual,
# and goes into the second half in place of grad_output, with act "none". `count` values a channel
# are what the statistics and the gradients of weight and bias were taken over.
_library.define(
    "bn_act_backward_sums(Tensor grad_output, Tensor input, Tensor? residual, Tensor? output, "
    "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
    "str act, float negative_slope, bool has_residual) "
    "-> (Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "bn_act_backward_input(Tensor grad_output, Tensor input, Tensor mean, Tensor var, "
    "Tensor? weight, Tensor? bias, Tensor grad_weight, Tensor grad_bias, float eps, "
    "str act, float negative_slope, int count) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# input = act(input * scale + shift [+ residual]): what follows the library's convolution on a GPU
_library.define(
    "_finish_conv_(Tensor(a!) input, Tensor? scale, Tensor? shift, Tensor? residual, "
    "str act, float negative_slope) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# conv_bn_act by a kernel of csrc/cuda, of weights that were packed for it (backends/cuda_conv.py);
# `geometry` is kernel size, stride, padding and dilation, two numbers each.
_library.define(
    "_cuda_conv(Tensor input, Tensor weights, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int out_channels, int[] geometry, int groups, str act, float negative_slope, str algorithm) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# A convolution's weight (K, C / groups, R, S) as those kernels read it, for tiles of `columns`
# outputs: [column tile][chunk][tap][8][column][16 bytes of channels], float32 rounded to TF32.
# `turned` packs weight.transpose(0, 1).flip(2, 3): the convolution that makes the input's gradient.
_library.define(
    "_cuda_pack(Tensor weight, int groups, int columns, bool turned) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# A convolution in training by such a kernel, and the mean and biased variance of its output's
# channels: conv(act(bn(input))), or conv(input) without `vectors` (those of _train_pool below).
# `geometry` is stride, padding and dilation, two numbers each.
_library.define(
    "_cuda_train_conv(Tensor input, Tensor[] vectors, float eps, str act, float negative_slope, "
    "Tensor weight, Tensor? bias, int[] geometry, int groups, str algorithm) "
    "-> (Tensor output, Tensor mean, Tensor var)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of act(bn(z)) where its convolution, of stride 1 and one group, has gradient `grad`,
# plus the residual; and those of bn's weight and bias.
_library.define(
    "_cuda_train_conv_input(Tensor grad, Tensor z, Tensor[] vectors, float eps, str act, "
    "float negative_slope, Tensor weight, Tensor? residual, int[] geometry, str algorithm) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Max-pooling of channels_last images; `window` is kernel_size, stride, padding and dilation, two
# numbers each, and `positions` are places in it, kernel width · row + column, uint8.
_library.define(
    "_max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# max-pool(act(bn(input))); `vectors` are mean, var, weight and bias, of the last two one that is
# empty for none. CUDA also takes no vectors at all: max-pool(input).
_library.define(
    "_train_pool(Tensor input, Tensor[] vectors, float eps, str act, float negative_slope, "
    "int[] window) -> (Tensor output, Tensor positions)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradients of its weight and bias.
_library.define(
    "_train_pool_sums(Tensor grad, Tensor positions, Tensor input, Tensor[] vectors, float eps, "
    "str act, float negative_slope, int[] window) -> (Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of its input from those; CUDA's alone.
_library.define(
    "_train_pool_input(Tensor grad, Tensor positions, Tensor input, Tensor[] vectors, "
    "Tensor grad_weight, Tensor grad_bias, float eps, str act, float negative_slope, "
    "int[] window, int count) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of what was pooled; of `input` only shape and dtype are read.
_library.define(
    "_max_unpool(Tensor grad, Tensor positions, Tensor input, int[] window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# running = (1 - momentum) running + momentum factor batch,   counter += 1
_library.define(
    "_update_running_statistics(Tensor(a!)[] running, Tensor(b!)[] counters, Tensor[] batch, "
    "float[] factors, float momentum) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-channel vectors beside data of `dtype`: float32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def conv_output_size(
    input: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """The shape of ``conv2d(input, weight)`` for an input of this shape."""
    height, width = (
        (input[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    )
    return input[0], weight.shape[0], height, width


def groups_together(groups: int, outputs: int, columns: int) -> int | None:
    """How many groups of so many outputs share the inputs of a tile of `columns` outputs, so that
    they fill whole tiles or are all there are; None where tiles would cut groups.
    """
    together = 1
    while together < groups and together * outputs % columns:
        together += 1
    return together if groups % together == 0 else None


def is_channels_last(tensor: Tensor) -> bool:
    """Whether eager PyTorch gives an operator's output channels_last strides for this input.

    The rule of ATen's ``suggest_memory_format`` for four dimensions, as every call needs it: going
    from channels outwards no stride is smaller than what lies inside it.
    """
    if tensor.dim() != 4 or tensor.numel() == 0:
        return False
    _, channels, height, width = tensor.shape
    images, c, y, x = tensor.stride()
    return c != 0 and images >= y * height != c and y >= x * width and x >= c * channels


def fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers what an operator does to shapes, dtypes and strides.

    It is also what runs as soon as one argument is a meta tensor. Data in another place would be
    left unread then, and an output there unwritten.
    """

    def register(shapes: Callable[..., Any]) -> None:
        def on_one_device(*args: Any) -> Any:
            flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
            devices = {t.device for t in flat if isinstance(t, Tensor)}
            if len(devices) > 1:
                names = " and ".join(sorted(map(str, devices)))
                raise RuntimeError(
                    f"{NAMESPACE}::{name}: all tensors must be on one device, got {names}"
                )
            return shapes(*args)

        torch.library.register_fake(f"{NAMESPACE}::{name}", on_one_device, lib=_library)

    return register


@fake("conv_bn_act")
def _(input, weight, scale, shift, residual, stride, padding, dilation, groups, act, slope):
    channels_last = torch.channels_last in map(suggest_memory_format, (input, weight))
    return input.new_empty(
        conv_output_size(input.shape, weight, stride, padding, dilation),
    ).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@fake("scale_shift_act")
def _(input, scale, shift, residual, act, slope):
    return _like(input)


@fake("_finish_conv_")
def _(input, scale, shift, residual, act, slope):
    return None


@fake("_cuda_conv")
def _(input, weights, scale, shift, residual, out_channels, geometry, *rest):
    kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    like = torch.empty(out_channels, 1, *kernel, device="meta")
    size = conv_output_size(input.shape, like, stride, padding, dilation)
    return input.new_empty(size).contiguous(memory_format=torch.channels_last)


@fake("_cuda_pack")
def _(weight, groups, columns, turned):
    outputs, channels, height, width = weight.shape
    if turned:
        outputs, channels = channels, outputs
    together = groups_together(groups, outputs // groups, columns)
    if together is None:
        raise RuntimeError(f"_cuda_pack: groups must fill tiles of {columns} outputs")
    piece = 16 // weight.element_size()
    chunks = -(-together * channels // (8 * piece))
    return weight.new_empty(-(-outputs // columns), chunks, height * width, 8, columns, piece)


@fake("_cuda_train_conv")
def _(input, vectors, eps, act, slope, weight, bias, geometry, groups, algorithm):
    size = conv_output_size(input.shape, weight, *(geometry[i : i + 2] for i in (0, 2, 4)))
    output = input.new_empty(size).contiguous(memory_format=torch.channels_last)
    mean = output.new_empty(size[1], dtype=statistics_dtype(input.dtype))
    return output, mean, torch.empty_like(mean)


@fake("_cuda_train_conv_input")
def _(grad, z, vectors, eps, act, slope, weight, residual, geometry, algorithm):
    sums = z.new_empty(z.shape[1], dtype=statistics_dtype(z.dtype))
    grad_input = z.new_empty(z.shape).contiguous(memory_format=torch.channels_last)
    return grad_input, sums, torch.empty_like(sums)


@fake("bn_act")
def _(input, residual, weight, bias, eps, act, slope):
    mean = input.new_empty(input.shape[1], dtype=statistics_dtype(input.dtype))
    return _like(input), mean, torch.empty_like(mean)


@fake("bn_act_backward")
def _(grad, input, residual, output, mean, var, weight, bias, eps, act, slope, has_residual):
    grad_residual = _like(input) if has_residual else input.new_empty(0)
    return _like(input), grad_residual, torch.empty_like(mean), torch.empty_like(mean)


@fake("batch_statistics")
def _(input):
    mean = input.new_empty(input.shape[1], dtype=statistics_dtype(input.dtype))
    return mean, torch.empty_like(mean)


@fake("normalize_act")
def _(input, residual, mean, var, weight, bias, eps, act, slope):
    return _like(input)


@fake("bn_act_backward_sums")
def _(grad, input, residual, output, mean, var, weight, bias, eps, act, slope, has_residual):
    grad_residual = _like(input) if has_residual else input.new_empty(0)
    return grad_residual, torch.empty_like(mean), torch.empty_like(mean)


@fake("bn_act_backward_input")
def _(grad, input, mean, var, weight, bias, grad_weight, grad_bias, eps, act, slope, count):
    return _like(input)


@fake("_max_pool2d")
def _(input, kernel_size, stride, padding, dilation):
    return _pooled(input, kernel_size, stride, padding, dilation)


@fake("_train_pool")
def _(input, vectors, eps, act, slope, window):
    output = _pooled(input, *(window[i : i + 2] for i in (0, 2, 4, 6)))
    return output, torch.empty_like(output, dtype=torch.uint8)


@fake("_train_pool_sums")
def _(grad, positions, input, vectors, eps, act, slope, window):
    sums = input.new_empty(input.shape[1], dtype=statistics_dtype(input.dtype))
    return sums, torch.empty_like(sums)


@fake("_train_pool_input")
def _(grad, positions, input, vectors, grad_weight, grad_bias, eps, act, slope, window, count):
    return input.new_empty(input.shape).contiguous(memory_format=torch.channels_last)


@fake("_max_unpool")
def _(grad, positions, input, window):
    return input.new_empty(input.shape).contiguous(memory_format=torch.channels_last)


@fake("_update_running_statistics")
def _(running, counters, batch, factors, momentum):
    return None


def _pooled(input, kernel, stride, padding, dilation):
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    size = (input.shape[0], input.shape[1], height, width)
    return input.new_empty(size).contiguous(memory_format=torch.channels_last)


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))
