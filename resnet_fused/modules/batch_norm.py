"""What nn.BatchNorm2d does beside its arithmetic: which statistics it uses, and keeping them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fused.backends import gpu_kernels, native
from resnet_fused.ops.schema import statistics_dtype


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether this module normalises by the batch, as nn.BatchNorm2d.forward decides it."""
    buffers = bn._buffers  # nn.Module's getattr is slow, and this runs at every call
    return bn.training or (buffers["running_mean"] is None and buffers["running_var"] is None)


def process_group(bn: nn.BatchNorm2d) -> Any:
    """The processes whose batches a module normalises as one, if it does; as nn.SyncBatchNorm.

    nn.SyncBatchNorm without other processes, or in evaluation, is nn.BatchNorm2d.
    """
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def check_input(bn: nn.BatchNorm2d, input: Tensor) -> None:
    """Raise what eager PyTorch raises for an input that this module does not take."""
    bn._check_input_dim(input)
    if input.shape[1] != bn.num_features:
        raise ValueError(
            f"input: expected {bn.num_features} channels for batch norm, "
            f"got shape {tuple(input.shape)}"
        )
    for name, vector in (*bn._buffers.items(), *bn._parameters.items()):
        if vector is None or name == "num_batches_tracked":
            continue
        if vector.shape != (bn.num_features,):
            raise ValueError(
                f"{name}: expected shape ({bn.num_features},), got {tuple(vector.shape)}"
            )
        if vector.device != input.device:
            raise ValueError(f"input: expected {name}'s device {vector.device}, got {input.device}")
    alone = process_group(bn) is None
    if alone and uses_batch_statistics(bn) and input.shape.numel() == input.shape[1]:
        raise ValueError(
            "input: expected more than 1 value per channel when training, "
            f"got shape {tuple(input.shape)}"
        )


def update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    r"""Move the running statistics towards a batch's, exactly as nn.BatchNorm2d in training.

    .. math:: running = (1 - momentum) \cdot running + momentum \cdot batch

    Args:
        bn: the module; nothing happens unless it trains and tracks, nor when gradient
            checkpointing runs a forward again (eager PyTorch counts such a batch twice).
        mean, var: the batch's mean and biased variance; the running variance is unbiased.
        count: values per channel in the batch. With momentum None the mean over all batches is
            kept.
    """
    compiling = torch.compiler.is_compiling()
    recomputing = not compiling and torch._C._current_graph_task_id() != -1
    if not (bn.training and bn.track_running_stats) or recomputing:
        return
    if not compiling and gpu_kernels.compiled(mean):
        update_all_running_statistics([bn], [mean, var], [count])
    else:
        _update(bn, mean, var, count)


def _update(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """The same by plain PyTorch, of a module that trains and tracks."""
    with torch.no_grad():
        momentum: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:
                momentum = 1.0 / bn.num_batches_tracked
        if bn.running_mean is None or bn.running_var is None:
            return
        unbiased = var * (count / max(count - 1, 1))
        for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
            if isinstance(momentum, float) and running.dtype == batch.dtype:
                running.mul_(1 - momentum).add_(batch, alpha=momentum)
            else:
                running.copy_(batch * momentum + running.to(batch.dtype) * (1 - momentum))


def update_all_running_statistics(
    norms: Sequence[nn.BatchNorm2d], statistics: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """:func:`update_running_statistics` of several modules, in one call where they are alike.

    Args:
        statistics: mean and biased variance of each in turn.
    """
    momentum = norms[0].momentum
    counters = [bn._buffers["num_batches_tracked"] for bn in norms]
    running = [bn._buffers[name] for bn in norms for name in ("running_mean", "running_var")]
    kind = statistics[0].device.type
    any_dtype = gpu_kernels.compiled(statistics[0])
    compiled = any_dtype or (kind == "cpu" and native.available)
    if torch._C._current_graph_task_id() != -1:
        return  # gradient checkpointing runs the forward again
    alike = (
        (compiled or kind == "cuda")
        and momentum is not None
        and len(set(map(id, norms))) == len(norms)
        and len({id(t) for t in (*running, *counters)}) == len(running) + len(counters)
        and all(c is not None and c.device.type == kind for c in counters)
        and all(
            r is not None
            and r.device == b.device
            and (any_dtype or r.dtype == b.dtype)
            and r.is_contiguous()
            for r, b in zip(running, statistics, strict=True)
        )
        and all(bn.training and bn.track_running_stats and bn.momentum == momentum for bn in norms)
    )
    if not alike:
        for i, bn in enumerate(norms):
            if bn.training and bn.track_running_stats:
                _update(bn, statistics[2 * i], statistics[2 * i + 1], counts[i])
        return
    factors = [f for n in counts for f in (1.0, n / max(n - 1, 1))]
    if not compiled:
        _update_by_few_launches(running, counters, statistics, factors, momentum)
        return
    changed = [t for t in (*running, *counters) if t is not None]
    try:
        torch.ops.resnet_fused._update_running_statistics.default(
            running, counters, statistics, factors, momentum
        )
    finally:
        # Compiled operators don't. In C, as an interrupt would come before a function of Python's,
        # and leave a fold that looks fresh.
        torch._C._increment_version(changed)


@torch.no_grad()
def _update_by_few_launches(
    running: Any,
    counters: Any,
    statistics: Sequence[Tensor],
    factors: Sequence[float],
    momentum: Any,
) -> None:
    """For a GPU without compiled kernels: a launch for all vectors, not five for each norm."""
    batch: Any = torch._foreach_mul(list(statistics), [momentum * f for f in factors])
    torch._foreach_mul_(running, 1 - momentum)
    torch._foreach_add_(running, batch)
    torch._foreach_add_(counters, 1)


def affine(bn: nn.BatchNorm2d, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """BN's weight and bias in the dtype that statistics have beside `input`."""
    dtype = statistics_dtype(input.dtype)
    weight, bias = bn._parameters["weight"], bn._parameters["bias"]
    return (
        weight if weight is None or weight.dtype == dtype else weight.to(dtype),
        bias if bias is None or bias.dtype == dtype else bias.to(dtype),
    )
