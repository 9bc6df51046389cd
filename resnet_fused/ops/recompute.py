"""Two training steps that don't keep the activation between them.

Eager PyTorch keeps, for ``conv2(act(bn(z)))``, both z and the activation a = act(bn(z)): a is
conv2's input, needed for its weight's gradient. But a follows from z and two vectors in one pass.
These functions keep z only and compute a again in backward. Per basic block that is 3 of 4 kept
tensors; per stem (conv-bn-relu-max-pool) it saves the largest activation of the network.

Paper: Chen et al., *Training Deep Nets with Sublinear Memory Cost* (2016); Rota Bulò et al.,
*In-Place Activated BatchNorm* (2018) for the same saving by inversion instead of recomputation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resnet_fused.backends import native
from resnet_fused.fold import scale_and_shift
from resnet_fused.ops.schema import is_channels_last

_ops = torch.ops.resnet_fused


class BatchNormAct(NamedTuple):
    """What act(bn(·)) is made of, beside its input: options, not tensors."""

    eps: float
    act: str
    negative_slope: float

    def forward(
        self, z: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.bn_act(z, None, weight, bias, *self)

    def again(
        self, z: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        vectors = scale_and_shift(mean, var, weight, bias, self.eps, dtype=mean.dtype)
        return _ops.scale_shift_act(z, *vectors, None, self.act, self.negative_slope)

    def backward(
        self,
        grad: Tensor,
        z: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        grad_z, _, grad_weight, grad_bias = _ops.bn_act_backward(
            grad, z, None, None, mean, var, weight, bias, *self, False
        )
        return (
            grad_z,
            None if weight is None else grad_weight,
            None if bias is None else grad_bias,
        )


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
        options: tuple[list[int], list[int], list[int], int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, mean, var = norm.forward(z, bn_weight, bn_bias)
        output = torch.conv2d(a, weight, bias, *options)
        ctx.norm, ctx.options, ctx.biased = norm, options, bias is not None
        ctx.save_for_backward(z, mean, var, bn_weight, bn_bias, weight)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        *normalisation, weight = ctx.saved_tensors
        a = ctx.norm.again(*normalisation)
        stride, padding, dilation, groups = ctx.options
        needs_z = any(ctx.needs_input_grad[:3])
        mask = [needs_z, ctx.needs_input_grad[3], ctx.biased and ctx.needs_input_grad[4]]
        grad_a, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, a, weight, [weight.shape[0]] if ctx.biased else None,
            stride, padding, dilation, False, [0, 0], groups, mask,
        )  # fmt: skip
        grads = ctx.norm.backward(grad_a, *normalisation) if needs_z else (None, None, None)
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
        a, mean, var = norm.forward(z, bn_weight, bn_bias)
        output, indices = torch.ops.aten.max_pool2d_with_indices(a, *options)
        ctx.norm, ctx.options = norm, options
        ctx.save_for_backward(z, mean, var, bn_weight, bn_bias, indices)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        *normalisation, indices = ctx.saved_tensors
        # The pool's own input is read for its shape only, which is z's.
        z = normalisation[0]
        scatter = torch.ops.aten.max_pool2d_with_indices_backward
        if native.available and z.is_cpu and is_channels_last(z):
            # The largest gradient of the network: fresh memory would cost more than the scattering.
            grad_a = torch.ops.resnet_fused._pool_zeros(z.shape, z.dtype)
            scatter.grad_input(grad, z, *ctx.options, indices, grad_input=grad_a)
        else:
            grad_a = scatter(grad, z, *ctx.options, indices)
        return *ctx.norm.backward(grad_a, *normalisation), None, None
