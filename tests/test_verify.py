"""`resnet_fused.verify`: what it measures, what decides a miss, and that it changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from block_zoo import build, example
from torch import Tensor, nn

import resnet_fused


@pytest.mark.parametrize("training", [False, True])
def test_verify_measures_the_model(training: bool) -> None:
    name = "sequential_bottleneck"
    result = resnet_fused.verify(resnet_fused.fuse(build(name)), *example(name), training=training)
    assert result.ok
    assert 0 <= result.relative_error <= result.budget
    assert 0 < result.eager_relative_error < 1e-5


@pytest.mark.parametrize(
    ("off", "training", "ok", "calls"),
    [
        ([1], False, True, 1),
        ([3], False, True, 10),
        ([3] * 10, False, False, 10),
        ([100], False, False, 1),
        ([math.nan], False, False, 1),
        ([99] * 4, True, True, 10),
        ([9] * 6, True, False, 10),
    ],
)
def test_verify_holds_a_miss_to_more_inputs(
    monkeypatch: pytest.MonkeyPatch, off: list[float], training: bool, ok: bool, calls: int
) -> None:
    """A budget is one rounding where eager PyTorch is exact; `off` so many are a call's results."""
    eps, seen = torch.finfo(torch.float32).eps, []

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Off(Scale):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            roundings = off[len(seen) - 1] if len(seen) <= len(off) else 0
            return super().forward(x) * (1 + roundings * eps)

    monkeypatch.setattr(resnet_fused.api, "fuse", lambda model: Off())
    monkeypatch.setattr(resnet_fused.api, "unfuse", lambda model: Scale())
    x = torch.tensor([1.0, -2.0, 0.0, math.inf])
    x = x[:1] if training else x
    result = resnet_fused.verify(Scale(), x, training=training)
    assert (result.ok, len(seen)) == (ok, calls)
    assert torch.equal(seen[0], x)
    assert all((1 - v[0] / x[0]).abs() <= 1 / 20 and v[0] != x[0] for v in seen[1:])


def test_verify_counts_no_gradient_twice() -> None:
    """Those that the caller's model has already are no part of the step."""
    model = build("biased_block")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    result = resnet_fused.verify(model, *example("biased_block"), training=True)
    assert result.ok and result.eager_relative_error > 1e-9
    assert all((p.grad == 1e6).all() for p in model.parameters())


def test_verify_changes_nothing() -> None:
    model = resnet_fused.fuse(build("biased_block")).train()
    before = copy.deepcopy(model.state_dict())
    resnet_fused.verify(model, *example("biased_block"), training=True)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
