"""How far every variant is from float64, beside eager PyTorch on the same numbers."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resnet_fused.parity import (
    MORE_DRAWS,
    Comparison,
    Promise,
    error_budget,
    mean,
    median,
    relative_error,
    root_mean_square_error,
)
from resnet_fused.policy import POLICIES, precision

DRAWS = 3
"""Of each case; the worst is shown, and what misses its budget is held by the mean of more."""

Results = dict[str, Sequence[Tensor]]
"""What an operator gives, by name; of a block's gradients there are several of a kind."""

Run = Callable[..., Results]

Progress = Callable[[int, int, str], None]


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """In here PyTorch's convolutions on the CPU are its others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # on setting what was set before
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@dataclass(frozen=True)
class Draw:
    """One draw of a case's numbers, computed three ways."""

    ours: Results
    eager: Sequence[Results]
    """Plain PyTorch's in each memory format that it may use; the largest error counts."""
    truth: Results


class Case(Protocol):
    """One problem of a variant."""

    @property
    def shape(self) -> str:
        """Sizes and options, for people."""

    @property
    def cornered(self) -> bool:
        """Whether rounding may decide a derivative: one such value makes an error of any size, in
        eager PyTorch as often.
        """

    def draw(self, number: int, in_force: AbstractContextManager[object]) -> Draw:
        """Draw `number`; `in_force` is entered where the library runs."""


@dataclass(frozen=True)
class OperatorCase:
    """A problem that two functions of the same arguments compute."""

    shape: str
    make: Callable[[], Sequence[Any]]
    """Draws the arguments: tensors, modules and what is not a number."""
    ours: Run
    plain: Run
    """Plain PyTorch, in the dtype of its arguments: eager's side, and in float64 the truth."""
    cornered: bool = False

    def draw(self, number: int, in_force: AbstractContextManager[object]) -> Draw:
        """All that is random follows from the number."""
        with torch.random.fork_rng(devices=[]):  # numbers are drawn on the CPU
            torch.manual_seed(number)
            arguments = self.make()
        truth = self.plain(*(_double(a) for a in arguments))
        with in_force:
            ours = self.ours(*(_own(a) for a in arguments))
        return Draw(ours, [self._eager(arguments, truth)], truth)

    def _eager(self, arguments: Sequence[Any], truth: Results) -> Results:
        """What eager PyTorch gives.

        On processors with AMX oneDNN reads memory that it has not written where bfloat16 images are
        narrow (torch 2.13), and NaN may be there: PyTorch's other convolution stands in.
        """
        found = self.plain(*(_own(a) for a in arguments))
        pairs = ((a, t) for name in found for a, t in zip(found[name], truth[name], strict=True))
        if all(math.isfinite(relative_error(a, t)) for a, t in pairs):
            return found
        with without_onednn():
            return self.plain(*(_own(a) for a in arguments))


@dataclass(frozen=True)
class Variant:
    """One way to compute one operator in one dtype."""

    operator: str
    name: str
    dtype: str
    promise: Promise
    """What it is held to. A precision policy is in force while it runs, and its errors are root
    mean squares, by which policies are defined; others are the largest.
    """
    cases: Sequence[Case]


@dataclass(frozen=True)
class Row:
    """The worst case of one result of a variant."""

    operator: str
    result: str
    variant: str
    dtype: str
    promise: str
    shape: str
    error: float
    eager_error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether the error is in the budget."""
        return self._comparison.ok

    @property
    def ratio(self) -> float | None:
        """The error in eager PyTorch's, None where that has none."""
        return self.error / self.eager_error if self.eager_error > 0 else None

    @property
    def used(self) -> float:
        """How much of the budget is used up, 1 for all of it."""
        return self._comparison.used

    @property
    def _comparison(self) -> Comparison:
        return Comparison(self.error, self.eager_error, self.budget)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it: an error without bounds becomes null."""
        values = {**asdict(self), "ratio": self.ratio, "ok": self.ok}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """A row that :meth:`to_dict` wrote."""
        named = {f.name: values[f.name] for f in fields(cls)}
        own: dict[str, Any] = {k: math.inf if v is None else v for k, v in named.items()}
        return cls(**own)


def measure(
    variants: Sequence[Variant], *, draws: int = DRAWS, progress: Progress = lambda *_: None
) -> list[Row]:
    """A row for each result of each variant, in their order: its worst case."""
    rows: list[Row] = []
    for done, variant in enumerate(variants):
        progress(done, len(variants), f"measuring {variant.operator}")
        worst: dict[str, tuple[Comparison, str]] = {}
        for case in variant.cases:
            for name, measured in _measure(variant.promise, case, draws).items():
                if name not in worst or measured.used > worst[name][0].used:
                    worst[name] = measured, case.shape
        rows += [
            Row(
                variant.operator, name, variant.name, variant.dtype, variant.promise, shape,
                *measured,
            )
            for name, (measured, shape) in worst.items()
        ]  # fmt: skip
    progress(len(variants), len(variants), "done")
    return rows


def _measure(promise: Promise, case: Case, draws: int) -> dict[str, Comparison]:
    """Of each result the worst tensor in its worst draw; of those that miss their budget in the
    mean of more draws, where there are corners in the median.
    """
    found = [_errors(promise, case, number) for number in range(draws)]
    worst = {name: _worst(found, name, lambda every: max(every, key=_used)) for name in found[0]}
    if all(measured.ok for measured in worst.values()):
        return worst
    found += [_errors(promise, case, number) for number in range(draws, draws + MORE_DRAWS)]
    for name in [name for name, measured in worst.items() if not measured.ok]:
        worst[name] = _worst(found, name, median if case.cornered else mean)
    return worst


def _worst(
    draws: Sequence[dict[str, list[Comparison]]],
    name: str,
    decides: Callable[[Sequence[Comparison]], Comparison],
) -> Comparison:
    """The worst tensor of a result, each by what decides of its draws."""
    of_tensors = zip(*(draw[name] for draw in draws), strict=True)
    return max((decides(every) for every in of_tensors), key=_used)


def _used(measured: Comparison) -> float:
    return measured.used


def _errors(promise: Promise, case: Case, number: int) -> dict[str, list[Comparison]]:
    """One draw's, of each tensor."""
    of_policy = promise in POLICIES
    error_of = root_mean_square_error if of_policy else relative_error
    draw = case.draw(number, precision(promise) if of_policy else contextlib.nullcontext())
    found: dict[str, list[Comparison]] = {}
    for name, tensors in draw.ours.items():
        found[name] = every = []
        for i, ours in enumerate(tensors):
            truth = draw.truth[name][i]
            eager = max(error_of(results[name][i], truth) for results in draw.eager)
            judged = math.isfinite(eager)  # nothing is right beside what is itself no number
            budget = error_budget(eager, ours.dtype, promise) if judged else 0.0
            every.append(Comparison(error_of(ours, truth), eager, budget))
    return found


def _own(argument: Any) -> Any:
    """A module may be changed by who runs it."""
    return copy.deepcopy(argument) if isinstance(argument, nn.Module) else argument


def _double(argument: Any) -> Any:
    if isinstance(argument, nn.Module):
        return copy.deepcopy(argument).double()
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument
