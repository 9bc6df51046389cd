"""Two training steps that don't keep the activation between them.

Eager PyTorch keeps, for ``conv2(act(bn(z)))``, both z and the activation a = act(bn(z)): a is
conv2's input, needed for its weight's gradient. But a follows from z and two vectors in one pass.
These functions keep z only and compute a again in backward. They are for what is in no block
(``train_block.py``) and no stem (``train_stem.py``): pre-activation, several modules in between.

Paper: Chen et al., *Training Deep Nets with Sublinear Memory Cost* (2016); Rota Bulò et al.,
*In-Place Activated BatchNorm* (2018) for the same saving by inversion instead of recomputation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.ops import max_pool, train_conv
from resnet_fused.ops.first_derivative import first_derivative_only
from resnet_fused.ops.schema import is_channels_last
from resnet_fused.ops.train_conv import Conv, Gradient, Normalised, Pooled, Sums

_ops = torch.ops.resnet_fused


class BatchNormAct(NamedTuple):
    """What act(bn(·)) is made of, beside its input: options, not tensors."""

    eps: float
    act: str
    negative_slope: float


class BatchNormActConv(torch.autograd.Function):
    """conv(act(bn(z))) with batch statistics → (output, mean, var)."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        norm: BatchNormAct,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _ops.batch_statistics(z)
        source = Normalised(z, mean, var, bn_weight, bn_bias, *norm)
        output, _, _ = train_conv.forward(source, Conv(weight, bias, *options))
        ctx.norm, ctx.options = norm, options
        ctx.save_for_backward(z, mean, var, bn_weight, bn_bias, weight, bias)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        *normalisation, weight, bias = ctx.saved_tensors
        source = Normalised(*normalisation, *ctx.norm)
        needs_z = any(ctx.needs_input_grad[:3])
        grad_a, grad_weight, sums = train_conv.backward(
            grad, source, Conv(weight, bias, *ctx.options),
            residual=None, needs_input=needs_z, needs_weight=ctx.needs_input_grad[3],
        )  # fmt: skip
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
        grads = (None,) * 3 if grad_a is None else _norm_grads(grad_a, source, sums)
        return *grads, grad_weight, grad_bias, None, None


class BatchNormActMaxPool(torch.autograd.Function):
    """max_pool2d(act(bn(z))) with batch statistics → (output, mean, var)."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        norm: BatchNormAct,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        *pairs, ceil_mode = options
        window = tuple(n for pair in pairs for n in pair)
        ctx.window = list(window) if not ceil_mode and max_pool.on_gpu(z, window) else None
        if ctx.window:
            mean, var = _ops.batch_statistics(z)
            vectors = Normalised(z, mean, var, bn_weight, bn_bias, *norm).vectors()
            output, indices = _ops._train_pool(z, vectors, *norm, ctx.window)
        else:
            a, mean, var = _ops.bn_act(z, None, bn_weight, bn_bias, *norm)
            output, indices = torch.ops.aten.max_pool2d_with_indices(a, *options)
        ctx.norm, ctx.options = norm, options
        ctx.save_for_backward(z, mean, var, bn_weight, bn_bias, indices)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        *normalisation, indices = ctx.saved_tensors
        # The pool's own input is read for its shape only, which is z's.
        z = normalisation[0]
        value = Normalised(*normalisation, *ctx.norm)
        if ctx.window:
            sums = Sums(
                *_ops._train_pool_sums(grad, indices, z, value.vectors(), *ctx.norm, ctx.window)
            )
            pooled = Pooled(indices, ctx.window)
            return *_norm_grads(grad, value, sums, pooled), None, None
        scatter = torch.ops.aten.max_pool2d_with_indices_backward
        if native.available and z.is_cpu and is_channels_last(z):
            # The largest gradient of the network: fresh memory would cost more than the scattering.
            grad_a = _ops._pool_zeros(z.shape, z.dtype)
            scatter.grad_input(grad, z, *ctx.options, indices, grad_input=grad_a)
        else:
            grad_a = scatter(grad, z, *ctx.options, indices)
        return *_norm_grads(grad_a, value, None), None, None


def _norm_grads(
    grad: Tensor, value: Normalised, sums: Sums | None, pooled: Pooled | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of z, weight and bias from that of act(bn(z)), or of its max-pool."""
    known = value.sums(grad, None, None, False) if sums is None else sums
    count = value.z.numel() // value.z.shape[1]
    return (
        Gradient(grad, value, known, count, pooled).tensor(),
        None if value.weight is None else known.grad_weight,
        None if value.bias is None else known.grad_bias,
    )
