"""The operators on CUDA tensors: Triton's kernels where they can run, else plain PyTorch.

Registered straight for the dispatch key: one Python call between dispatcher and launch. In
torch.compile the two operators of evaluation are taken apart instead, so that Inductor sees a
convolution with the formula behind it, which it fuses and tunes itself, or the Triton kernel that
was measured to be faster, which it inlines; so AOTInductor's packages need no Python. torch.export
keeps the operators.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from resnet_fused.backends import reference
from resnet_fused.backends.triton import configs, support
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.schema import NAMESPACE, conv_output_size, statistics_dtype

_FILES = {
    "scale_shift_act": "scale_shift_act",
    "normalize_act": "scale_shift_act",
    "batch_statistics": "batch_statistics",
    "bn_act": "bn_act",
    "bn_act_backward": "bn_act",
    "bn_act_backward_sums": "bn_act",
    "bn_act_backward_input": "bn_act",
}
"""Where the kernels of each operator are, in backends/triton."""

_PER_CHANNEL = {"scale", "shift", "mean", "var", "weight", "bias", "grad_weight", "grad_bias"}
_LIKE_OUTPUT = {"residual", "output", "grad_output"}

_library = torch.library.Library(NAMESPACE, "IMPL")


def kernels(file: str) -> Any:
    """A file of backends/triton. It imports Triton, which takes a second: not before it is used."""
    return importlib.import_module(f"resnet_fused.backends.triton.{file}")


def _implementation(name: str, file: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.resnet_fused, name).default
    names = tuple(a.name for a in operator._schema.arguments)
    place = names.index("input")
    plain = getattr(reference, name)

    def run(*args: Any) -> Any:
        input = args[place]
        if support.unusable(input) is not None:
            return plain(*args)
        fitting = (_fitting(n, v, input.shape, input) for n, v in zip(names, args, strict=True))
        return getattr(kernels(file), name)(*fitting)

    return run


def _fitting(name: str, value: Any, size: Sequence[int], input: Tensor) -> Any:
    """An argument that a kernel may read: lengths, dtypes and devices are looked at every time.

    Args:
        size: of the operator's output.
    """
    if not isinstance(value, Tensor) or name not in _PER_CHANNEL | _LIKE_OUTPUT:
        return value
    each = name in _PER_CHANNEL
    wanted = (size[1],) if each else tuple(size)
    dtypes = (statistics_dtype(input.dtype), input.dtype) if each else (input.dtype,)
    if tuple(value.shape) != wanted or value.dtype not in dtypes or value.device != input.device:
        raise ValueError(
            f"{name}: expected shape {wanted}, {dtypes[0]}, on {input.device}, got "
            f"{tuple(value.shape)}, {value.dtype}, on {value.device}"
        )
    return value.contiguous() if each else value


for _name, _file in _FILES.items():
    _library.impl(_name, _implementation(_name, _file), "CUDA")


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
    """The operator of this name, by what :func:`gpu_choice.choose` names."""
    geometry = (stride, padding, dilation, groups)
    tensors = (input, weight, scale, shift, residual)
    if support.unusable(input) is not None:
        return reference.conv_bn_act(*tensors, *geometry, act, negative_slope)
    name = gpu_choice.choose("inference", input, weight, *geometry)
    return run_conv(name, *tensors, *geometry, act, negative_slope)


_library.impl("conv_bn_act", conv_bn_act, "CUDA")


def run_conv(
    name: str,
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
    """:func:`conv_bn_act` by what is named, or as by default where cuDNN has nothing for it."""
    geometry = (stride, padding, dilation, groups)
    own = name in configs.BY_NAME
    by_cudnn = name == gpu_choice.CUDNN and scale is None and act == "relu"
    if own or by_cudnn:
        _demand_convolution(input, weight, groups)
        size = torch.Size(conv_output_size(input.shape, weight, stride, padding, dilation))
    else:
        z = torch.conv2d(input, weight, None, *geometry)
        if scale is None and shift is None and residual is None and act == "none":
            return z
        size = z.shape
    scale, shift, residual = (
        _fitting(n, v, size, input)
        for n, v in (("scale", scale), ("shift", shift), ("residual", residual))
    )
    if own:
        return kernels("conv_bn_act").conv_bn_act(
            input, weight, scale, shift, residual, *geometry, act, negative_slope,
            configs.BY_NAME[name], gpu_choice.precision(input.dtype),
        )  # fmt: skip
    if by_cudnn:
        return _cudnn(input, weight, shift, residual, *geometry)
    run = kernels("scale_shift_act").scale_shift_act
    return run(z, scale, shift, residual, act, negative_slope, output=z)


def _cudnn(
    input: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """relu(conv(input) + shift (+ residual)) in one call of cuDNN."""
    bias = None if shift is None else shift.to(input.dtype)
    options = (bias, stride, padding, dilation, groups)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(input, weight, *options)
    return torch.ops.aten.cudnn_convolution_add_relu(input, weight, residual, 1.0, *options)


def _demand_convolution(input: Tensor, weight: Tensor, groups: int) -> None:
    if (
        input.dim() != 4
        or weight.dim() != 4
        or input.shape[1] != weight.shape[1] * groups
        or weight.dtype != input.dtype
        or weight.device != input.device
    ):
        raise ValueError(
            f"weight: expected input's {input.shape[1]} channels in {groups} groups, "
            f"{input.dtype}, on {input.device}, got {tuple(weight.shape)}, {weight.dtype}, on "
            f"{weight.device}"
        )


# --- inside torch.compile -----------------------------------------------------------------------


def _conv_traced(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
    stride, padding, dilation, groups = args[3:7]
    name = gpu_choice.choose("inference", input, weight, stride, padding, dilation, groups)
    if name not in configs.BY_NAME:
        return reference.conv_bn_act(input, weight, *args)
    config = replace(configs.BY_NAME[name], tma=False)  # descriptors cannot be traced
    with kernels("launch").tracing():
        return kernels("conv_bn_act").conv_bn_act(
            input, weight, *args, config, gpu_choice.precision(input.dtype)
        )


def _exporting() -> bool:
    from torch.export._trace import custom_triton_ops_decomposition_disabled  # a second to import

    return custom_triton_ops_decomposition_disabled()


def _take_apart(name: str, formula: Callable[..., Tensor]) -> None:
    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not args[0].is_cuda or _exporting():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return formula(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(
        f"{NAMESPACE}::{name}", FunctionalTensorMode, rule, lib=_library
    )


_take_apart("conv_bn_act", _conv_traced)
_take_apart("scale_shift_act", reference.scale_shift_act)
