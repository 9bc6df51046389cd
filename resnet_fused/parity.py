"""How far a result is from the truth: the one definition of error, for verify, bench and tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(actual: Tensor, reference: Tensor) -> float:
    r"""Largest error relative to the largest value: :math:`\max|a - r| / \max|r|`, in float64.

    Args:
        actual: the tensor to judge, any dtype and device.
        reference: the truth, of the same shape, as a rule computed in float64.

    Returns:
        A number without unit, 0 for equal tensors. Values that are not finite must stand in the
        same places with the same sign, otherwise the error is infinite; they are left out of the
        rest. Where the reference is all zero the absolute error is returned.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(
            f"actual: expected the reference's shape {tuple(reference.shape)}, "
            f"got {tuple(actual.shape)}"
        )
    if reference.numel() == 0:
        return 0.0
    a = actual.detach().to(device="cpu", dtype=torch.float64)
    r = reference.detach().to(device="cpu", dtype=torch.float64)
    finite = r.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return math.inf
    odd_a, odd_r = a[~finite], r[~finite]
    if not torch.equal(odd_a.nan_to_num(0, 1, -1), odd_r.nan_to_num(0, 1, -1)):
        return math.inf
    a, r = a[finite], r[finite]
    if r.numel() == 0:
        return 0.0
    worst, largest = (a - r).abs().max().item(), r.abs().max().item()
    return worst / largest if largest > 0 else worst


def error_budget(eager_error: float, dtype: torch.dtype) -> float:
    """What a fused result may be off: twice eager PyTorch's own error, and one rounding."""
    return 2 * eager_error + torch.finfo(dtype).eps
