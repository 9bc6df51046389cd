"""The only comparator of the test suite.

A result is right when its error against a float64 computation is at most twice the error that plain
PyTorch makes in the same dtype, plus one rounding of that dtype. Errors are relative to the largest
magnitude of the reference. NaN and infinities have to be where plain PyTorch has them. Nothing here
takes a looser budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.parity import DEFAULT_ERROR, DOUBLE_ROUNDINGS, EAGER_FACTOR, STRICT_FACTOR


def one_rounding(dtype: torch.dtype) -> float:
    """The relative spacing of `dtype`: what storing a result once may cost."""
    return torch.finfo(dtype).eps


def relative_error(actual: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """max|actual - reference| / scale in float64; `scale` is max|reference| unless given."""
    if actual.numel() == 0:
        return 0.0
    actual, reference = actual.detach().double(), reference.detach().double()
    difference = (actual - reference).abs().max().item()
    if difference == 0.0:
        return 0.0
    if scale is None:
        scale = reference.abs().max().item()
    return difference / scale if scale > 0.0 else float("inf")


def _special(tensor: Tensor) -> Tensor:
    """1 where NaN, 2 where +inf, 3 where -inf, else 0."""
    codes = torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device)
    codes[tensor.isnan()] = 1
    codes[tensor == float("inf")] = 2
    codes[tensor == float("-inf")] = 3
    return codes


def assert_parity(
    actual: Tensor,
    eager: Tensor,
    reference64: Tensor,
    *,
    what: str = "result",
    scale: float | None = None,
) -> None:
    """Hold `actual` to the budget that `eager` (the same dtype) and `reference64` set.

    `scale` is for a quantity that is zero but for rounding (a bias in front of a batch
    normalisation has no gradient): the size of the terms that cancel, for which max|reference64|
    says nothing.
    """
    _hold(measured(actual, eager, reference64, what=what, scale=scale), actual, what)


class Measured(NamedTuple):
    """The relative errors of a result and of eager PyTorch's, and what the first may be."""

    error: float
    eager_error: float
    budget: float


def measured(
    actual: Tensor,
    eager: Tensor,
    reference64: Tensor,
    *,
    what: str = "result",
    scale: float | None = None,
) -> Measured:
    """What `assert_parity` compares; that the results agree in all else is asserted."""
    assert actual.shape == eager.shape, (
        f"{what}: shape {tuple(actual.shape)}, eager {tuple(eager.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager {eager.dtype}"
    assert actual.device == eager.device, f"{what}: device {actual.device}, eager {eager.device}"
    assert reference64.shape == eager.shape, (
        f"{what}: the reference has shape {tuple(reference64.shape)}"
    )
    actual, eager, reference64 = actual.detach(), eager.detach(), reference64.detach()
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, eager), f"{what}: {actual} is not {eager}"
        return Measured(0.0, 0.0, 0.0)
    special, special_eager = _special(actual), _special(eager)
    wrong = special != special_eager
    assert not wrong.any(), (
        f"{what}: NaN or Inf differ from eager's at {int(wrong.sum())} of {wrong.numel()} places, "
        f"first at {tuple(wrong.nonzero()[0].tolist())}: got {actual[wrong][0].item()}, "
        f"eager {eager[wrong][0].item()}"
    )
    finite = (special_eager == 0) & reference64.isfinite()
    kept = reference64[finite]
    if scale is None and kept.numel():
        scale = kept.double().abs().max().item()
    error = relative_error(actual[finite], kept, scale)
    eager_error = relative_error(eager[finite], kept, scale)
    budget = EAGER_FACTOR * eager_error + one_rounding(actual.dtype)
    if actual.dtype == torch.float64:  # eager's error is 0, unless it ran in another way
        budget = max(budget, DOUBLE_ROUNDINGS * one_rounding(torch.float64))
    return Measured(error, eager_error, budget)


def assert_mean_parity(draws: Sequence[Sequence[Tensor]], *, what: str = "result") -> None:
    """Hold the mean error of several draws of a result to the budget that eager's mean error sets.

    For what lies many layers deep and is a few numbers only. There an error is whichever way some
    roundings fell: of two computations that are equally exact on average, one is off more than
    twice as far as the other in one of 300 single draws. Means of 3 draws stay below 0.75 of the
    budget (24 draws of four blocks' gradients, in Triton's interpreter with the errors of a GPU's
    approximations put in), so that a kernel that is worse than eager is found sooner.

    Args:
        draws: of each what `assert_parity` takes: actual, eager and float64's.
    """
    rows = [measured(*draw, what=f"{what}, draw {i}") for i, draw in enumerate(draws)]
    assert_mean(rows, draws[0][0], what=what)


def assert_mean(rows: Sequence[Measured], actual: Tensor, *, what: str = "result") -> Measured:
    """Hold the mean error to the mean budget; `actual` is one of the results. Returns the means."""
    mean = Measured(*(sum(side) / len(rows) for side in zip(*rows, strict=True)))
    _hold(mean, actual, f"{what}, mean of {len(rows)} draws")
    return mean


def _hold(row: Measured, actual: Tensor, what: str) -> None:
    assert row.error <= row.budget, (
        f"{what}: relative error {row.error:.3e} is over the budget {row.budget:.3e} "
        f"(eager's own error {row.eager_error:.3e}, {actual.dtype}, shape {tuple(actual.shape)})"
    )


def assert_all_parity(
    actual: Iterable[Tensor],
    eager: Iterable[Tensor],
    reference64: Iterable[Tensor],
    *,
    what: str = "result",
) -> None:
    """`assert_parity` for each of several tensors."""
    rows = list(zip(actual, eager, reference64, strict=True))
    for i, (a, e, r) in enumerate(rows):
        assert_parity(a, e, r, what=f"{what}[{i}]")


def assert_same_layout(actual: Tensor, eager: Tensor, *, what: str = "result") -> None:
    """Strides as eager's; a dimension of size 0 or 1 has no stride that matters."""
    assert actual.shape == eager.shape, (
        f"{what}: shape {tuple(actual.shape)}, eager {tuple(eager.shape)}"
    )
    if actual.numel() == 0:
        return
    for size, stride, wanted in zip(actual.shape, actual.stride(), eager.stride(), strict=True):
        assert size == 1 or stride == wanted, (
            f"{what}: strides {actual.stride()}, eager {eager.stride()}"
        )


def to_double(value: Any) -> Any:
    """`value` with every floating tensor in it copied to float64, leaves with the same
    requires_grad.
    """
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            return value.clone()
        return value.detach().double().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(to_double(v) for v in value)
    if isinstance(value, dict):
        return {k: to_double(v) for k, v in value.items()}
    return value


def double_model(model: nn.Module) -> nn.Module:
    """A float64 copy of `model`, the oracle's side of a comparison."""
    return copy.deepcopy(model).double()


def flatten(value: Any) -> list[Tensor]:
    """The tensors in `value`, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (tuple, list)) or not isinstance(value, (int, float, str, type(None))):
        return [t for v in value for t in flatten(v)]
    return []


def assert_function_parity(
    tested: Callable[..., Any],
    plain: Callable[..., Any],
    *args: Any,
    what: str = "result",
    same_layout: bool = False,
    **kwargs: Any,
) -> Any:
    """Hold `tested(*args)` to `plain(*args)`, which is also run in float64; returns what `tested`
    returned.
    """
    actual, eager = tested(*args, **kwargs), plain(*args, **kwargs)
    reference = plain(*to_double(args), **to_double(kwargs))
    assert_all_parity(flatten(actual), flatten(eager), flatten(reference), what=what)
    if same_layout:
        for a, e in zip(flatten(actual), flatten(eager), strict=True):
            assert_same_layout(a, e, what=what)
    return actual


def assert_within_policy(
    actual: Tensor,
    eager: Tensor,
    reference64: Tensor,
    policy: str,
    *,
    what: str = "result",
    scale: float | None = None,
) -> None:
    """Hold a float32 result to what a precision policy promises; NaN and Inf where eager has them.

    "default": an error of 3e-6, or what `assert_parity` allows if that is more. "strict": 1.25
    times eager's own error plus one rounding. `scale` is the size of what went into an activation
    that bounds its output (relu6), for which max|reference64| says nothing.
    """
    row = measured_by_policy(actual, eager, reference64, policy, what=what, scale=scale)
    _hold(row, actual, f"{what}, policy {policy}")


def measured_by_policy(
    actual: Tensor,
    eager: Tensor,
    reference64: Tensor,
    policy: str,
    *,
    what: str = "result",
    scale: float | None = None,
) -> Measured:
    """What `assert_within_policy` compares."""
    finite = reference64.isfinite() & eager.isfinite()
    assert torch.equal(_special(actual), _special(eager)), f"{what}: NaN or Inf not as in eager"
    if scale is None and finite.any():
        scale = reference64[finite].abs().max().item()
    error = relative_error(actual[finite], reference64[finite], scale)
    eager_error = relative_error(eager[finite], reference64[finite], scale)
    rounding = one_rounding(actual.dtype)
    budget = (
        max(DEFAULT_ERROR, EAGER_FACTOR * eager_error + rounding)
        if policy == "default"
        else STRICT_FACTOR * eager_error + rounding
    )
    return Measured(error, eager_error, budget)
