"""conv → BN → activation → max-pool in training as one autograd function.

The activation is the largest tensor of a residual network. Eager PyTorch keeps it, the
convolution's output and the pool's int64 indices; this function keeps the convolution's output and
one byte for each of the pool's, and computes the activation, and in backward its gradient, a few
images at a time (``csrc/cpu/train_pool.cpp``). On a GPU neither exists (``csrc/cuda/max_pool.cu``,
``train_pool.cu``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import gpu_kernels, native_conv
from resnet_fused.ops import max_pool, train_conv
from resnet_fused.ops.first_derivative import first_derivative_only
from resnet_fused.ops.schema import is_channels_last
from resnet_fused.ops.train_conv import ConvNorm, Gradient, Pooled, Sums

_ops = torch.ops.resnet_fused


class TrainStem(NamedTuple):
    """A stem; its window is kernel_size, stride, padding and dilation, two numbers each."""

    options: ConvNorm
    window: tuple[int, ...]

    def runs(self, input: Tensor) -> bool:
        """Whether there are kernels for it."""
        if gpu_kernels.compiled(input):
            return gpu_kernels.unusable(input) is None and max_pool.on_gpu(input, self.window)
        return (
            input.is_cpu
            and native_conv.unusable(input.dtype) is None
            and is_channels_last(input)
            and self.window[0] * self.window[1] <= max_pool.MOST_POSITIONS
        )

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pool's output, and mean and biased variance of the convolution's."""
        return _StemFunction.apply(self, input, weight, bias, bn_weight, bn_bias)


class _StemFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stem: TrainStem,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, var = train_conv.forward(input, stem.options.conv(weight, bias))
        value = stem.options.normalised(z, mean, var, bn_weight, bn_bias)
        options = (value.eps, value.act, value.negative_slope, list(stem.window))
        output, positions = _ops._train_pool(z, value.vectors(), *options)
        ctx.stem = stem
        ctx.save_for_backward(input, weight, bias, z, mean, var, bn_weight, bn_bias, positions)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return None, *((None,) * 5 if grad is None else _backward(ctx, grad))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, needs_weight, needs_bias, *needs_norm = ctx.needs_input_grad[1:]
    stem: TrainStem = ctx.stem
    input, weight, bias, *normalisation, positions = ctx.saved_tensors
    value = stem.options.normalised(*normalisation)
    options = (value.eps, value.act, value.negative_slope, list(stem.window))
    sums = Sums(*_ops._train_pool_sums(grad, positions, value.z, value.vectors(), *options))
    pooled = Pooled(positions, list(stem.window))
    count = value.z.numel() // value.z.shape[1]
    grad_input, grad_weight, _ = train_conv.backward(
        Gradient(grad, value, sums, count, pooled), input, stem.options.conv(weight, bias),
        residual=None, needs_input=needs_input, needs_weight=needs_weight,
    )  # fmt: skip
    return (
        grad_input,
        grad_weight,
        sums.grad_of_conv_bias(bias) if needs_bias else None,
        sums.grad_weight if needs_norm[0] else None,
        sums.grad_bias if needs_norm[1] else None,
    )
