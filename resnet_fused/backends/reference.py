"""Every operator as plain PyTorch: the oracle of the tests, and the backend of last resort.

Each function is the formula of its operator and nothing more. Low-precision data is lifted to the
dtype of its statistics for the arithmetic and rounded once at the end, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops.schema import statistics_dtype


def activation(name: str, negative_slope: float) -> Callable[[Tensor], Tensor]:
    """The activation called `name` as a function of one tensor."""
    if name == "leaky_relu":
        return lambda x: F.leaky_relu(x, negative_slope)
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """View a vector of one number per channel so that it broadcasts over (N, C, ...)."""
    return vector.view([1, -1] + [1] * (like.dim() - 2))


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
    """y = act(conv2d(input, weight) · scale + shift [+ residual])."""
    y = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    scale, shift = scale_and_shift_or_identity(y, scale, shift)
    return scale_shift_act(y, scale, shift, residual, act, negative_slope)


def scale_and_shift_or_identity(
    data: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ones for a scale that is None, zeros for a shift that is None."""
    ones = data.new_ones(data.shape[1], dtype=statistics_dtype(data.dtype))
    return (ones if scale is None else scale, torch.zeros_like(ones) if shift is None else shift)


def scale_shift_act(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    negative_slope: float,
) -> Tensor:
    """y = act(input · scale[c] + shift[c] [+ residual])."""
    dtype = statistics_dtype(input.dtype)
    y = input.to(dtype) * per_channel(scale, input) + per_channel(shift, input)
    if residual is not None:
        y = y + residual.to(dtype)
    return activation(act, negative_slope)(y).to(input.dtype)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over all other dimensions."""
    dims = [d for d in range(input.dim()) if d != 1]
    if input.numel() == 0:
        empty = input.new_zeros(input.shape[1], dtype=statistics_dtype(input.dtype))
        return empty, empty.clone()
    var, mean = torch.var_mean(input.to(statistics_dtype(input.dtype)), dims, correction=0)
    return mean, var


def bn_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((input − mean) / √(var + eps) · weight + bias [+ residual]), and mean, var."""
    mean, var = batch_statistics(input)
    y = normalize_act(input, residual, mean, var, weight, bias, eps, act, negative_slope)
    return y, mean, var


def normalize_act(
    input: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
) -> Tensor:
    """y = act((input − mean) / √(var + eps) · weight + bias [+ residual])."""
    xhat = normalised(input, mean, (var + eps).rsqrt())
    y = activation(act, negative_slope)(affine_and_add(xhat, weight, bias, residual))
    return y.to(input.dtype)


def normalised(input: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(input − mean) · rstd in the statistics' dtype."""
    return (input.to(mean.dtype) - per_channel(mean, input)) * per_channel(rstd, input)


def affine_and_add(
    xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """xhat · weight + bias [+ residual]: the activation's argument."""
    y = xhat
    if weight is not None:
        y = y * per_channel(weight, xhat)
    if bias is not None:
        y = y + per_channel(bias, xhat)
    return y if residual is None else y + residual.to(xhat.dtype)


def activation_backward(
    grad: Tensor,
    argument: Tensor,
    output: Tensor | None,
    act: str,
    negative_slope: float,
) -> Tensor:
    """grad · act′(argument); a piecewise linear act′ is read off `output` where that is given."""
    if output is not None and act in ("relu", "relu6", "leaky_relu"):
        argument = output.to(grad.dtype)
    aten = torch.ops.aten
    if act == "none":
        return grad
    if act == "relu":
        return aten.threshold_backward(grad, argument, 0)
    if act == "relu6":
        return aten.hardtanh_backward(grad, argument, 0, 6)
    if act == "leaky_relu":
        return aten.leaky_relu_backward(grad, argument, negative_slope, False)
    if act == "silu":
        gate = torch.sigmoid(argument)
        return grad * gate * (1 + argument * (1 - gate))
    if act == "hardswish":
        return aten.hardswish_backward(grad, argument)
    return aten.gelu_backward(grad, argument)


def bn_act_backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`bn_act` by input, residual (empty without one), weight and bias."""
    grad_residual, grad_weight, grad_bias = bn_act_backward_sums(
        grad_output, input, residual, output, mean, var, weight, bias, eps, act, negative_slope,
        has_residual,
    )  # fmt: skip
    count = max(input.numel() // max(input.shape[1], 1), 1)
    grad, act = (grad_residual, "none") if has_residual else (grad_output, act)
    grad_input = bn_act_backward_input(
        grad, input, mean, var, weight, bias, grad_weight, grad_bias, eps, act, negative_slope,
        count,
    )  # fmt: skip
    return grad_input, grad_residual, grad_weight, grad_bias


def bn_act_backward_sums(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`bn_act` by residual (empty without one), weight and bias."""
    dims = [d for d in range(input.dim()) if d != 1]
    xhat = normalised(input, mean, (var + eps).rsqrt())
    argument = affine_and_add(xhat, weight, bias, residual)
    grad = activation_backward(grad_output.to(xhat.dtype), argument, output, act, negative_slope)
    grad_residual = torch.empty_like(input).copy_(grad) if has_residual else input.new_empty(0)
    return grad_residual, (grad * xhat).sum(dims), grad.sum(dims)


def bn_act_backward_input(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
    count: int,
) -> Tensor:
    """The gradient of :func:`bn_act` by its input, from those of weight and bias."""
    rstd = (var + eps).rsqrt()
    xhat = normalised(input, mean, rstd)
    argument = affine_and_add(xhat, weight, bias, None)
    grad = activation_backward(grad_output.to(xhat.dtype), argument, None, act, negative_slope)
    mean_grad, mean_product = (per_channel(g / count, input) for g in (grad_bias, grad_weight))
    scale = rstd if weight is None else rstd * weight
    return ((grad - mean_grad - xhat * mean_product) * per_channel(scale, input)).to(input.dtype)
