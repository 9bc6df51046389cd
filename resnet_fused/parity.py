"""How far a result is from the truth: the one definition of error, for verify, bench and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Promise = Literal["parity", "default", "strict", "exact"]
"""What holds for a result: parity with eager PyTorch, what a precision policy says, or its bits."""

EAGER_FACTOR = 2.0
"""Parity: twice eager PyTorch's own error, and one rounding."""

DEFAULT_ERROR = 3e-6
"""What the policy "default" admits in float32: Winograd's F(4×4) stays below it."""

STRICT_FACTOR = 1.25
"""What the policy "strict" admits, in eager PyTorch's own error."""

DOUBLE_ROUNDINGS = 64
"""What a float64 result may be off, in roundings of float64: there the reference is eager itself,
no better than what it judges, and sums run in another order. A single step in float32 costs five
hundred million of them.
"""

MORE_DRAWS = 9
"""Of what misses its budget. One draw decides nothing where rounding does: of two computations that
are as exact on average one is sometimes off more than twice as far as the other.
"""


class Comparison(NamedTuple):
    """The errors of a result and of eager PyTorch's, and what the first may be."""

    error: float
    eager_error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether the error is in the budget; NaN is not."""
        return self.error <= self.budget

    @property
    def used(self) -> float:
        """How much of the budget is used up, 1 for all of it."""
        if self.budget > 0:
            return self.error / self.budget
        return 0.0 if self.error == 0 else math.inf

    @property
    def hopeless(self) -> bool:
        """Whether no mean with other draws can be in the budget."""
        return not self.used <= 1 + MORE_DRAWS


def mean(draws: Sequence[Comparison]) -> Comparison:
    """What decides of several draws."""
    return Comparison(*(sum(side) / len(draws) for side in zip(*draws, strict=True)))


def median(draws: Sequence[Comparison]) -> Comparison:
    """What decides where one draw may be off by any factor, in eager PyTorch as often: a ReLU near
    its corner passes a gradient or does not.
    """
    return sorted(draws, key=lambda draw: draw.used)[len(draws) // 2]


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
        TypeError: one is not a tensor of real numbers.
        ValueError: the shapes differ.
    """
    found = _finite(actual, reference)
    if found is None:
        return math.inf
    a, r = found
    if r.numel() == 0:
        return 0.0
    worst, largest = (a - r).abs().max().item(), r.abs().max().item()
    return worst / largest if largest > 0 else worst


def root_mean_square_error(actual: Tensor, reference: Tensor) -> float:
    r"""All errors beside all values: :math:`\sqrt{\sum (a - r)^2 / \sum r^2}`, in float64.

    What precision policies are defined by: of many roundings the largest is a matter of luck.
    Arguments, values that are not finite and errors as for :func:`relative_error`.
    """
    found = _finite(actual, reference)
    if found is None:
        return math.inf
    a, r = found
    error, size = (a - r).norm().item(), r.norm().item()
    return error / size if size > 0 else error


def _finite(actual: Tensor, reference: Tensor) -> tuple[Tensor, Tensor] | None:
    """What is finite in float64; None where not the same values are, or the others differ."""
    for name, value in (("actual", actual), ("reference", reference)):
        if not isinstance(value, Tensor) or value.is_complex() or value.is_quantized:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor of real numbers, got {kind}")
    if actual.shape != reference.shape:
        raise ValueError(
            f"actual: expected the reference's shape {tuple(reference.shape)}, "
            f"got {tuple(actual.shape)}"
        )
    a = actual.detach().to(device="cpu", dtype=torch.float64)
    r = reference.detach().to(device="cpu", dtype=torch.float64)
    finite = r.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return None
    odd_a, odd_r = a[~finite], r[~finite]
    if not torch.equal(odd_a.nan_to_num(0, 1, -1), odd_r.nan_to_num(0, 1, -1)):
        return None
    return a[finite], r[finite]


def error_budget(eager_error: float, dtype: torch.dtype, promise: Promise = "parity") -> float:
    """What a fused result of a dtype may be off, beside eager PyTorch's own error.

    Both are :func:`relative_error`, for what a policy promises :func:`root_mean_square_error`.
    """
    rounding = torch.finfo(dtype).eps
    if promise == "exact":
        return 0.0
    if dtype == torch.float64:  # eager's error is 0, unless it ran in another way
        return max(DOUBLE_ROUNDINGS * rounding, EAGER_FACTOR * eager_error + rounding)
    if promise == "parity":
        return EAGER_FACTOR * eager_error + rounding
    rounding /= 12**0.5  # the root mean square of what lies anywhere between two numbers
    if promise == "strict":
        return STRICT_FACTOR * eager_error + rounding
    return max(DEFAULT_ERROR, EAGER_FACTOR * eager_error + rounding)
