"""Fused is faster than eager channels_last: a ratio, both sides interleaved in one process.

The thresholds are half of the gain that is expected (the other half is room for noise), and any of
three tries will do: a busy machine must not fail this, a fused path that is not taken must.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import fuse, models
from resnet_fused.backends import native_conv

TRIES = 3


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """Median of slow/fast over interleaved rounds, after two untimed ones."""
    for _ in range(2):
        slow()
        fast()
    pairs = [(seconds(slow), seconds(fast)) for _ in range(rounds)]
    return statistics.median(s / f for s, f in pairs)


def assert_faster(
    slow: Callable[[], object], fast: Callable[[], object], at_least: float, rounds: int
) -> None:
    found: list[float] = []
    for _ in range(TRIES):
        found.append(ratio(slow, fast, rounds))
        if found[-1] >= at_least:
            return
    pytest.fail(
        f"fused is {', '.join(f'{r:.3f}' for r in found)} times as fast as eager; wanted {at_least}"
    )


def pair(name: str, training: bool) -> tuple[nn.Module, nn.Module]:
    plain = getattr(models, name)().train(training).to(memory_format=torch.channels_last)
    return plain, fuse(plain)


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    return call


@pytest.mark.parametrize(
    ("name", "batch", "size", "at_least"),
    [("resnet18", 1, 224, 1.5), ("resnet50", 4, 128, 1.25)],  # expected: 2.2 and 1.6
)
def test_inference(name: str, batch: int, size: int, at_least: float) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN, which the fused convolutions use")
    if native_conv.unusable(torch.float32):
        pytest.skip(f"expected of the library's own kernels: {native_conv.unusable(torch.float32)}")
    plain, fused = pair(name, training=False)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    assert_faster(inference(plain, x), inference(fused, x), at_least, rounds=7)


@pytest.mark.parametrize(("name", "at_least"), [("resnet18", 1.35), ("resnet50", 1.12)])
def test_training(name: str, at_least: float) -> None:
    if native_conv.unusable(torch.float32):
        pytest.skip(f"expected of the library's own kernels: {native_conv.unusable(torch.float32)}")
    plain, fused = pair(name, training=True)
    x = torch.randn(16, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    # Expected: 1.75 and 1.3.
    assert_faster(step(plain, x), step(fused, x), at_least, rounds=5)


def test_first_call_is_quick() -> None:
    """Packing the weights of a whole network takes less than a second."""
    x = torch.randn(1, 3, 64, 64)
    first = []
    for _ in range(TRIES):
        _, fused = pair("resnet50", training=False)
        first.append(seconds(inference(fused, x)))
        if first[-1] < 1.0:
            return
    pytest.fail(f"the first fused call took {', '.join(f'{f:.2f}' for f in first)} s")


def test_memory_held_for_backward() -> None:
    """What autograd keeps of a training step beside eager's, tensors counted once per storage."""

    def held(model: nn.Module) -> int:
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        assert output.requires_grad
        return sum(kept.values())

    plain, fused = pair("resnet18", training=True)
    eager = held(plain)
    assert held(fused) <= 0.78 * eager
    assert held(fuse(plain, memory="low")) <= 0.6 * eager
