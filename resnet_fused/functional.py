"""The operators as functions: arguments are checked here, once, and then one operator is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused import checks, fold
from resnet_fused.backends import reference
from resnet_fused.ops import autograd as _autograd  # noqa: F401  (registers the formulas)
from resnet_fused.ops import gpu  # also registers the CUDA kernels
from resnet_fused.ops.schema import conv_output_size
from resnet_fused.ops.select import uses_reference


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    r"""Convolution, batch norm with fixed statistics, residual addition and activation in one.

    .. math:: y = act(conv(x, w) \cdot scale + shift + residual)

    Equivalent to ``act(conv2d(input, weight, None, stride, padding, dilation, groups)
    * scale[:, None, None] + shift[:, None, None] + residual)``.

    Args:
        input: (N, C, H, W), float32, float64, bfloat16 or float16, contiguous or channels_last.
        weight: (K, C / groups, R, S), input's dtype.
        scale, shift: (K,), input's dtype or float32, or None for 1 and 0;
            :func:`resnet_fused.fold.scale_and_shift` makes them from batch-norm statistics.
        residual: (N, K, H', W'), the output's shape and dtype, or None.
        stride, padding, dilation: in pixels, one number or (vertical, horizontal).
        groups: number of groups that input and output channels are split into.
        act: "none", "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: of leaky_relu, >= 0.
        backend: "auto", "native" (compiled C++), "triton" (a GPU) or "reference" (plain
            PyTorch).

    Returns:
        (N, K, H', W') in input's dtype, with the strides eager PyTorch gives: channels_last if
        input or weight is. Differentiable; backward computes the convolution again.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend cannot run this.

    Paper: He et al., *Deep Residual Learning for Image Recognition* (2015), section 3.
    """
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    checks.tensor("residual", residual, optional=True)
    checks.rank("input", input, at_least=4, at_most=4)
    checks.rank("weight", weight, at_least=4, at_most=4)
    checks.same("weight", weight, input)
    checks.same("residual", residual, input)
    checks.activation(act, negative_slope)
    stride = checks.pair("stride", stride, least=1)
    padding = checks.pair("padding", padding, least=0)
    dilation = checks.pair("dilation", dilation, least=1)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"groups: expected an integer >= 1, got {groups!r}")
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups: expected a divisor of weight's {weight.shape[0]} channels, got {groups}"
        )
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels (weight {tuple(weight.shape)}, "
            f"groups {groups}), got {input.shape[1]}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight: expected no empty dimension, got {tuple(weight.shape)}")
    size = conv_output_size(input.shape, weight, stride, padding, dilation)
    if size[2] < 1 or size[3] < 1:
        raise ValueError(
            f"input: expected an image no smaller than the kernel {tuple(weight.shape[2:])} with "
            f"dilation {dilation} and padding {padding}, got {tuple(input.shape[2:])}"
        )
    checks.shape("residual", residual, size)
    scale = checks.channel_vector("scale", scale, weight.shape[0], input)
    shift = checks.channel_vector("shift", shift, weight.shape[0], input)
    run = (
        reference.conv_bn_act
        if uses_reference(backend, input)
        else torch.ops.resnet_fused.conv_bn_act
    )
    with _by(backend):
        return run(
            input, weight, scale, shift, residual,
            stride, padding, dilation, groups, act, float(negative_slope),
        )  # fmt: skip


def scale_shift_act(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    act: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    r"""Per-channel scale and shift, residual addition and activation in one pass over memory.

    .. math:: y = act(x \cdot scale_c + shift_c + residual)

    Equivalent to ``act(input * scale[:, None, None] + shift[:, None, None] + residual)``.

    Args:
        input: (N, C, ...), float32, float64, bfloat16 or float16.
        scale, shift: (C,), input's dtype or float32.
        residual: input's shape and dtype, or None.
        act, negative_slope, backend: as in :func:`conv_bn_act`.

    Returns:
        A tensor like input, in its memory format.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`conv_bn_act`.
    """
    _check_normalised(input, residual, act, negative_slope)
    if scale is None or shift is None:
        raise TypeError(f"{'scale' if scale is None else 'shift'}: expected a tensor, got None")
    vectors = (
        checks.channel_vector("scale", scale, input.shape[1], input),
        checks.channel_vector("shift", shift, input.shape[1], input),
    )
    run: Callable[..., Tensor] = (
        reference.scale_shift_act
        if uses_reference(backend, input)
        else torch.ops.resnet_fused.scale_shift_act
    )
    with _by(backend):
        return run(input, *vectors, residual, act, float(negative_slope))


def bn_act(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Batch norm, residual addition and activation in one.

    .. math:: y = act\left(\frac{x - mean}{\sqrt{var + eps}} \cdot weight + bias + residual\right)

    Equivalent to ``act(batch_norm(input, running_mean, running_var, weight, bias, training,
    0.0, eps) + residual)``, except that running statistics are never changed: the caller gets
    the batch's and updates them.

    Args:
        input: (N, C, ...), float32, float64, bfloat16 or float16.
        running_mean, running_var: (C,); used, and required, unless `training`.
        weight, bias: (C,), or None for 1 and 0.
        residual: input's shape and dtype, or None.
        training: normalise by the batch's own mean and biased variance.
        eps: added to the variance, >= 0.
        act, negative_slope, backend: as in :func:`conv_bn_act`.

    Returns:
        ``(output, mean, var)``: the output like input, and the statistics it was normalised by,
        detached, shape (C,), float32 (float64 for float64 data); var is biased (divided by n).
        For backward the training form keeps the input and per-channel vectors, and with a
        residual the output (for silu, hardswish and gelu the residual instead).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`conv_bn_act`; ValueError also for a
        training batch with one value per channel, as eager PyTorch.

    Paper: Ioffe and Szegedy, *Batch Normalization* (2015), algorithms 1 and 2.
    """
    _check_normalised(input, residual, act, negative_slope)
    checks.epsilon(eps)
    channels = input.shape[1]
    weight = checks.channel_vector("weight", weight, channels, input)
    bias = checks.channel_vector("bias", bias, channels, input)
    running_mean = checks.channel_vector("running_mean", running_mean, channels, input)
    running_var = checks.channel_vector("running_var", running_var, channels, input)
    if not training:
        for name, value in (("running_mean", running_mean), ("running_var", running_var)):
            if value is None:
                raise ValueError(f"{name}: expected a tensor unless training=True, got None")
        assert running_mean is not None and running_var is not None
        scale, shift = fold.scale_and_shift(
            running_mean, running_var, weight, bias, eps, dtype=running_mean.dtype
        )
        output = scale_shift_act(
            input, scale, shift, residual,
            act=act, negative_slope=negative_slope, backend=backend,
        )  # fmt: skip
        return output, running_mean.detach().clone(), running_var.detach().clone()
    if input.shape.numel() == channels:
        raise ValueError(
            "input: expected more than 1 value per channel when training, "
            f"got shape {tuple(input.shape)}"
        )
    run = reference.bn_act if uses_reference(backend, input) else torch.ops.resnet_fused.bn_act
    with _by(backend):
        output, mean, var = run(
            input, residual, weight, bias, float(eps), act, float(negative_slope)
        )
    return output, mean.detach(), var.detach()


def _by(backend: str) -> contextlib.AbstractContextManager[None]:
    if backend == "native":
        return gpu.no_triton()
    return gpu.only_triton() if backend == "triton" else contextlib.nullcontext()


def _check_normalised(
    input: Tensor, residual: Tensor | None, act: str, negative_slope: float
) -> None:
    checks.tensor("input", input)
    checks.tensor("residual", residual, optional=True)
    checks.rank("input", input, at_least=2)
    checks.same("residual", residual, input)
    checks.shape("residual", residual, input.shape)
    checks.activation(act, negative_slope)
