"""The derivative of every operator, the plain PyTorch kernels behind them, and autocast.

What is kept for backward is stated at each formula. Statistics that an operator returns carry no
gradient; a second derivative exists where backward is made of differentiable PyTorch operators
(``conv_bn_act``, ``scale_shift_act``) and is a clear error for ``bn_act``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import onednn, reference
from resnet_fused.ops import gpu
from resnet_fused.ops.schema import NAMESPACE, statistics_dtype

PIECEWISE_LINEAR = ("none", "relu", "relu6", "leaky_relu")
"""Activations whose derivative can be read off their output."""

_ops = torch.ops.resnet_fused
_library = torch.library.Library(NAMESPACE, "IMPL")


def _of_a_tensor(name: str) -> Callable[..., Any]:
    """The reference's formula; the dispatcher lets None for the first tensor through."""
    formula = getattr(reference, name)

    def run(first: Any, *args: Any) -> Any:
        if not isinstance(first, Tensor):
            raise TypeError(f"{NAMESPACE}::{name}: expected a tensor first, got {first!r}")
        return formula(first, *args)

    return run


for _name in (
    "conv_bn_act", "scale_shift_act", "bn_act", "bn_act_backward",
    "batch_statistics", "normalize_act", "bn_act_backward_sums", "bn_act_backward_input",
):  # fmt: skip
    _library.impl(_name, _of_a_tensor(_name), "CompositeExplicitAutograd")


def cast_for_autocast(device: torch.device, *tensors: Any) -> list[Any]:
    """What autocast does to a convolution's arguments, tensors or None: float64 alone stays."""
    if not torch.is_autocast_enabled(device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    stays = (dtype, torch.float64)
    return [
        t if t is None or t.dtype in stays or not t.is_floating_point() else t.to(dtype)
        for t in tensors
    ]


def _conv_bn_act_autocast(input, weight, scale, shift, residual, *options):
    input, weight, residual = cast_for_autocast(input.device, input, weight, residual)
    with torch.autocast(input.device.type, enabled=False):
        return _ops.conv_bn_act(input, weight, scale, shift, residual, *options)


for _device in ("CPU", "CUDA"):
    _library.impl("conv_bn_act", _conv_bn_act_autocast, f"Autocast{_device}")


# --- scale_shift_act: keeps input, scale, shift and the residual ------------------------------


def _scale_shift_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, scale, shift, residual, ctx.act, ctx.slope = inputs
    ctx.save_for_backward(input, scale, shift, residual)


def _scale_shift_grads(
    ctx: Any, grad: Tensor, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dtype = statistics_dtype(input.dtype)
    dims = [d for d in range(input.dim()) if d != 1]
    x = input.to(dtype)
    argument = x * reference.per_channel(scale, x) + reference.per_channel(shift, x)
    if residual is not None:
        argument = argument + residual.to(dtype)
    grad = reference.activation_backward(grad.to(dtype), argument, None, ctx.act, ctx.slope)
    grad_input = (grad * reference.per_channel(scale, x)).to(input.dtype)
    grad_residual = None if residual is None else grad.to(residual.dtype)
    return grad_input, (grad * x).sum(dims), grad.sum(dims), grad_residual


def _scale_shift_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_scale_shift_grads(ctx, grad, *ctx.saved_tensors), None, None


torch.library.register_autograd(
    f"{NAMESPACE}::scale_shift_act",
    _scale_shift_backward,
    setup_context=_scale_shift_setup,
    lib=_library,
)


# --- conv_bn_act: keeps its inputs, and convolves again ---------------------------------------


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, scale, shift, residual, *ctx.options, ctx.act, ctx.slope = inputs
    ctx.save_for_backward(input, weight, scale, shift, residual)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, scale, shift, residual = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.options
    z = torch.conv2d(input, weight, None, stride, padding, dilation, groups)
    vectors = reference.scale_and_shift_or_identity(z, scale, shift)
    grad_z, grad_scale, grad_shift, grad_residual = _scale_shift_grads(
        ctx, grad, z, *vectors, residual
    )
    grad_input, grad_weight = onednn.convolution_backward(
        grad_z, input, weight, stride, padding, dilation, groups, ctx.needs_input_grad[:2]
    )
    return (
        grad_input,
        grad_weight,
        None if scale is None else grad_scale,
        None if shift is None else grad_shift,
        grad_residual,
        *[None] * 6,
    )


torch.library.register_autograd(
    f"{NAMESPACE}::conv_bn_act", _conv_backward, setup_context=_conv_setup, lib=_library
)


# --- bn_act: keeps input and statistics; with a residual also the output (or the residual) ------


def _bn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, bias, ctx.eps, ctx.act, ctx.slope = inputs
    y, mean, var = output
    ctx.has_residual = residual is not None
    ctx.only_triton = gpu.leaves_out_compiled()
    reads_output = ctx.has_residual and ctx.act in PIECEWISE_LINEAR and ctx.act != "none"
    reads_residual = ctx.has_residual and ctx.act not in PIECEWISE_LINEAR
    ctx.save_for_backward(
        input,
        residual if reads_residual else None,
        y if reads_output else None,
        mean,
        var,
        weight,
        bias,
    )
    ctx.set_materialize_grads(False)


def _bn_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # read once: checkpointing gives them once
    weight, bias = saved[5:]
    with gpu.only_triton() if ctx.only_triton else contextlib.nullcontext():
        grad_input, grad_residual, grad_weight, grad_bias = _ops.bn_act_backward(
            grad, *saved, ctx.eps, ctx.act, ctx.slope, ctx.has_residual
        )
    return (
        grad_input,
        grad_residual if ctx.has_residual else None,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None, None, None,
    )  # fmt: skip


torch.library.register_autograd(
    f"{NAMESPACE}::bn_act", _bn_backward, setup_context=_bn_setup, lib=_library
)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "resnet_fused::bn_act has no second derivative: unfuse the model (resnet_fused.unfuse) "
        "to differentiate its gradients"
    )


torch.library.register_autograd(
    f"{NAMESPACE}::bn_act_backward",
    _no_double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=_library,
)
