"""The compiled CUDA kernel that updates the running statistics of several batch norms at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_case import DEVICE, needs_cuda_kernels, operators
from test_functional import DTYPES, noise
from tolerance import assert_all_parity
from torch import Tensor

pytestmark = needs_cuda_kernels

MOMENTUM = 0.1
LENGTHS = (1, 7, 64, 300, 2048)


def arguments(dtype: torch.dtype, batch_dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    running = [noise(n, seed=n).to(dtype).to(DEVICE) for n in LENGTHS]
    batch = [noise(n, seed=n + 1).to(batch_dtype).to(DEVICE) for n in LENGTHS]
    counters = [torch.tensor(i, device=DEVICE) for i in range(3)]
    return running, counters, batch, [1.0, 8 / 7, 1.0, 1.25, 1.0]


def update(running: Any, batch: Any, factors: Any, dtype: torch.dtype) -> list[Tensor]:
    """The formula in a dtype, rounded once."""
    return [
        (r.to(dtype) * (1 - MOMENTUM) + b.to(dtype) * f * MOMENTUM).to(r.dtype)
        for r, b, f in zip(running, batch, factors, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    for batch_dtype in (torch.float32, torch.float64):
        running, counters, batch, factors = arguments(dtype, batch_dtype)
        wide = torch.promote_types(dtype, batch_dtype)
        eager = update(running, batch, factors, wide)
        exact = update([r.double() for r in running], batch, factors, torch.float64)
        operators()._update_running_statistics(running, counters, batch, factors, MOMENTUM)
        assert_all_parity(running, eager, exact)
        assert [int(c) for c in counters] == [1, 2, 3]


def test_more_vectors_than_one_launch_takes() -> None:
    running = [torch.full((3,), float(i), device=DEVICE) for i in range(150)]
    batch = [r + 1 for r in running]
    counters = [torch.tensor(i, device=DEVICE) for i in range(75)]
    operators()._update_running_statistics(running, counters, batch, [1.0] * 150, 1.0)
    assert all(torch.equal(r, b) for r, b in zip(running, batch, strict=True))
    assert [int(c) for c in counters] == list(range(1, 76))
    operators()._update_running_statistics([], counters, [], [], 1.0)
    assert int(counters[-1]) == 76


def test_what_is_not_finite_stays() -> None:
    running = [torch.tensor([1.0, float("nan"), 2.0], device=DEVICE)]
    batch = [torch.tensor([float("inf"), 1.0, float("nan")], device=DEVICE)]
    operators()._update_running_statistics(running, [], batch, [1.0], MOMENTUM)
    assert running[0].isinf().tolist() == [True, False, False]
    assert running[0].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [1.0]}, "equally many, got 2, 2 and 1"),
        ({"batch": [torch.zeros(3), torch.zeros(4)]}, "batch must have the shape of running"),
        ({"running": [torch.ones(3), torch.ones(6)[::2]]}, "running must be dense"),
        ({"counters": [torch.tensor([0, 0])]}, "counters must be int64 scalars"),
        ({"batch": [torch.zeros(3), torch.zeros(3).half()]}, "batch must be float32 or float64"),
        ({"running": [torch.zeros(3, dtype=torch.int32)] * 2}, "running must be float32"),
        ({"counters": [torch.tensor(1.0)]}, "counters must be int64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "running": [torch.ones(3), torch.ones(3)], "counters": [torch.tensor(0)],
        "batch": [torch.zeros(3), torch.zeros(3)], "factors": [1.0, 1.0],
    }  # fmt: skip
    given = {
        name: [v.to(DEVICE) if isinstance(v, Tensor) else v for v in values]
        for name, values in (given | change).items()
    }
    with pytest.raises(RuntimeError, match=message):
        operators()._update_running_statistics(*given.values(), MOMENTUM)
    assert all(bool((t == 1).all()) for t in given["running"] if "running" not in change)
