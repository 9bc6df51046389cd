"""The operators on CUDA tensors that the compiled library lacks: by Triton's kernels where they can
run, else plain PyTorch. Without that library, all of them.

Registered straight for the dispatch key: one Python call between dispatcher and launch. In
torch.compile the two operators of evaluation are taken apart instead, so that Inductor sees a
convolution with the formula behind it, which it fuses and tunes itself, or the Triton kernel that
was measured to be faster, which it inlines; so AOTInductor's packages need no Python. torch.export
keeps the operators.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.backends import cuda_conv, gpu_kernels, native_cuda, reference
from resnet_fused.backends.triton import configs, support
from resnet_fused.conv_choice import LIBRARY
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.schema import (
    NAMESPACE,
    conv_output_size,
    is_channels_last,
    statistics_dtype,
)

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


@functools.cache
def kernels(file: str) -> Any:
    """A file of backends/triton. It imports Triton, which takes a second: not before it is used."""
    return importlib.import_module(f"resnet_fused.backends.triton.{file}")


def unseen(tensor: Tensor) -> bool:
    """Whether nothing wants to see operators, so that a kernel may be called without one."""
    return type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


@functools.cache
def _implementation(name: str, file: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.resnet_fused, name).default
    names = [a.name for a in operator._schema.arguments]
    place = names.index("input")
    vectors = [i for i, n in enumerate(names) if n in _PER_CHANNEL]
    images = [i for i, n in enumerate(names) if n in _LIKE_OUTPUT]
    plain = getattr(reference, name)

    def run(*args: Any) -> Any:
        input = args[place]
        if support.unusable(input) is not None:
            return plain(*args)
        fitting = list(args)
        for i in vectors:
            fitting[i] = _vector(names[i], args[i], input.shape[1], input)
        for i in images:
            _demand_image(names[i], args[i], input.shape, input)
        return getattr(kernels(file), name)(*fitting)

    return run


def _vector(name: str, vector: Tensor | None, channels: int, input: Tensor) -> Tensor | None:
    """An argument that a kernel may read; length, dtype and device are looked at every time."""
    if vector is None:
        return None
    wide = statistics_dtype(input.dtype)
    if (
        vector.shape != (channels,)
        or vector.dtype not in (wide, input.dtype)
        or vector.device != input.device
    ):
        raise ValueError(f"{name}: expected {wide}, {_expected((channels,), input)}{_got(vector)}")
    return vector if vector.is_contiguous() else vector.contiguous()


def _demand_image(name: str, image: Tensor | None, size: Sequence[int], input: Tensor) -> None:
    """The same of one that has the shape of the operator's output."""
    if image is None:
        return
    if image.shape != size or image.dtype != input.dtype or image.device != input.device:
        raise ValueError(f"{name}: expected {input.dtype}, {_expected(size, input)}{_got(image)}")


def _expected(size: Sequence[int], input: Tensor) -> str:
    return f"shape {tuple(size)}, on {input.device}"


def _got(value: Tensor) -> str:
    return f", got {value.dtype}, shape {tuple(value.shape)}, on {value.device}"


def finish_conv(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    negative_slope: float,
) -> None:
    """The operator ``_finish_conv_``: z = act(z · scale + shift + residual)."""
    _demand_image("residual", residual, z.shape, z)
    channels = z.shape[1]
    scale, shift = _vector("scale", scale, channels, z), _vector("shift", shift, channels, z)
    kernels("scale_shift_act").scale_shift_act(
        z, scale, shift, residual, act, negative_slope, output=z
    )


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
    if gpu_kernels.unusable(input) is not None:
        return reference.conv_bn_act(*tensors, *geometry, act, negative_slope)
    name = gpu_choice.choose("inference", input, weight, *geometry)
    if name in configs.BY_NAME and _triton_is_left_out.get():
        name = LIBRARY
    return run_conv(name, *tensors, *geometry, act, negative_slope)


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
    """:func:`conv_bn_act` by what is named."""
    geometry = (stride, padding, dilation, groups)
    if name in cuda_conv.BY_NAME and act in cuda_conv.ACTIVATIONS:
        packed = cuda_conv.Packed.of(weight, groups, name)
        return packed(input, scale, shift, residual, stride, padding, dilation, act, negative_slope)
    if name not in configs.BY_NAME:
        z = torch.conv2d(input, weight, None, *geometry)
        if not (scale is None and shift is None and residual is None and act == "none"):
            finish = _finish_compiled if gpu_kernels.compiled(z) else finish_conv
            finish(z, scale, shift, residual, act, negative_slope)
        return z
    _demand_convolution(input, weight, groups)
    size = torch.Size(conv_output_size(input.shape, weight, stride, padding, dilation))
    scale, shift = _vector("scale", scale, size[1], input), _vector("shift", shift, size[1], input)
    _demand_image("residual", residual, size, input)
    y: Tensor = kernels("conv_bn_act").conv_bn_act(
        input, weight, scale, shift, residual, *geometry, act, negative_slope,
        configs.BY_NAME[name], gpu_choice.precision(input.dtype),
    )  # fmt: skip
    return y if is_channels_last(input) or is_channels_last(weight) else y.contiguous()


def implementations() -> dict[str, Callable[..., Any]]:
    """What runs each operator."""
    own = {name: _implementation(name, file) for name, file in _FILES.items()}
    return {**own, "conv_bn_act": conv_bn_act, "_finish_conv_": finish_conv}


for _name, _function in implementations().items():
    # The compiled library's own come first.
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{_name}", "CUDA"):
        _library.impl(_name, _function, "CUDA")

_triton_is_left_out: ContextVar[bool] = ContextVar("triton_is_left_out", default=False)
_compiled_is_left_out: ContextVar[bool] = ContextVar("compiled_is_left_out", default=False)
_finish_compiled = torch.ops.resnet_fused._finish_conv_.default


class _Triton(TorchDispatchMode):
    """In here operators run by Triton's kernels, though the compiled library has some as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = func.namespace == NAMESPACE and func._opname in _FILES
        if own:
            return _implementation(func._opname, _FILES[func._opname])(*args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def only_triton() -> Iterator[None]:
    """In here everything is Triton's: for who names it as the backend."""
    compiled = native_cuda.available and not torch.compiler.is_compiling()
    token = _compiled_is_left_out.set(compiled)
    try:
        with gpu_choice.only_triton(), _Triton() if compiled else contextlib.nullcontext():
            yield
    finally:
        _compiled_is_left_out.reset(token)


@contextlib.contextmanager
def no_triton() -> Iterator[None]:
    """In here nothing is Triton's: for who names compiled code as the backend."""
    token = _triton_is_left_out.set(True)
    try:
        yield
    finally:
        _triton_is_left_out.reset(token)


def leaves_out_compiled() -> bool:
    """Whether this runs in :func:`only_triton` with a compiled library there."""
    return _compiled_is_left_out.get()


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
