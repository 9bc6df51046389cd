"""Batch norm over all processes of a group: nn.SyncBatchNorm's statistics and gradients.

One collective a direction. PyTorch's own module does the same with CUDA kernels and refuses tensors
on the CPU; this runs wherever the group's backend does, gloo included. Processes may have different
numbers of images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.ops.first_derivative import first_derivative_only
from resnet_fused.ops.train_conv import Gradient, Normalised, Sums

_ops = torch.ops.resnet_fused


def statistics(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, int]:
    r"""Mean, biased variance and values a channel over all processes, from each one's own.

    .. math:: mean = \sum_r n_r m_r / n, \quad var = \sum_r n_r (v_r + (m_r - mean)^2) / n

    Raises:
        ValueError: if no process has any, in all of them.
    """
    own = torch.cat([mean.double(), var.double(), mean.new_tensor([count], dtype=torch.float64)])
    gathered = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather_into_tensor(gathered, own[None], group=group)
    means, variances = gathered[:, :-1].chunk(2, dim=1)
    counts = gathered[:, -1:]
    total = counts.sum()
    if total == 0:
        raise ValueError(
            "input: expected images in at least one process, got an empty batch in all"
        )
    exact = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - exact).square())).sum(0) / total
    return exact.to(mean.dtype), spread.to(var.dtype), int(total)


def sums(own: Sums, group: Any) -> Sums:
    """The gradients of a batch norm's weight and bias over all processes."""
    both = torch.stack([own.grad_weight, own.grad_bias])
    dist.all_reduce(both, group=group)
    return Sums(both[0], both[1], own.grad_residual)


class SyncBatchNormAct(torch.autograd.Function):
    """act(bn(x) [+ residual]) over all processes → (output, mean, var, count)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple[float, str, float],
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = _ops.batch_statistics(input)
        mean, var, count = statistics(mean, var, input.numel() // input.shape[1], group)
        output = Normalised(input, mean, var, weight, bias, *options).tensor(residual)
        ctx.options, ctx.group, ctx.count = options, group, count
        ctx.save_for_backward(input, mean, var, weight, bias, residual)
        values = torch.tensor(count)
        ctx.mark_non_differentiable(mean, var, values)
        ctx.set_materialize_grads(False)
        return output, mean, var, values

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *normalisation, residual = ctx.saved_tensors
        value = Normalised(*normalisation, *ctx.options)
        if grad is None:  # the others wait for this process's part
            grad = torch.zeros_like(value.z)
        adds = residual is not None
        own = value.sums(grad, residual, None, adds)
        if adds:
            assert own.grad_residual is not None
            grad, value = own.grad_residual, value._replace(act="none")
        grad_input = Gradient(grad, value, sums(own, ctx.group), ctx.count).tensor()
        return (
            grad_input,
            own.grad_residual,
            None if value.weight is None else own.grad_weight,
            None if value.bias is None else own.grad_bias,
            None, None,
        )  # fmt: skip
