"""Tuning for a GPU from end to end: what is timed, what is kept, what then runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton_case import DEVICE, INTERPRETED, gpus_place, launches, needs_kernels

from resnet_fused import fuse, tuning_cache
from resnet_fused.backends.triton import conv_bn_act
from resnet_fused.benchmark import gpu_algorithms
from resnet_fused.benchmark.gpu_algorithms import tune
from resnet_fused.benchmark.measure import Timing
from resnet_fused.conv_choice import LIBRARY
from resnet_fused.models.blocks import Bottleneck
from resnet_fused.ops import gpu_choice

pytestmark = [needs_kernels, pytest.mark.usefixtures(gpus_place.__name__)]


@pytest.fixture(autouse=True)
def own_cache(gpus_place: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Choices of this test's own, read whenever they are asked for."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_choice, "machine", lambda device: "a GPU")
    read = functools.cache(lambda device: tuning_cache.read("a GPU"))
    monkeypatch.setattr(gpu_choice, "_measured", read)
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(gpu_algorithms, "recorded", lambda call, device: call)
        monkeypatch.setattr(gpu_algorithms, "_cache_bytes", lambda device: 1 << 14)
    gpu_choice._chosen.cache_clear()
    yield
    gpu_choice._chosen.cache_clear()


def timed(monkeypatch: pytest.MonkeyPatch, **prefixes: float) -> None:
    """Have everything take 2 ms but what begins with one of these."""

    def interleave(calls: Mapping[str, Any], **_: Any) -> dict[str, Timing]:
        found = {}
        for name, call in calls.items():
            call()
            ms = next((v for p, v in prefixes.items() if name.startswith(p)), 2.0)
            found[name] = Timing(ms, ms, ms, 1)
        return found

    monkeypatch.setattr(gpu_algorithms, "interleave", interleave)


def block_and_image() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    block = Bottleneck(64, 16).to(DEVICE, torch.float16, memory_format=torch.channels_last)
    x = torch.randn(1, 64, 4, 4).to(DEVICE, torch.float16, memory_format=torch.channels_last)
    return block.eval(), x


def silent(done: int, total: int, what: str) -> None:
    """No progress bar."""


def test_what_is_fastest_is_kept_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, triton=1.0)
    block, x = block_and_image()
    with torch.no_grad():
        fused = fuse(block)
        before = fused(x)
        tuned = tune(block, x, repeats=1, progress=silent)
        with launches(monkeypatch) as names:
            after = fused(x)
    assert all(t.chosen.startswith("triton") for t in tuned) and len(tuned) == 3
    assert names == ["conv_kernel"] * 3
    assert torch.allclose(before, after, atol=2e-2)


def test_the_library_stays_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, library=1.0)
    block, x = block_and_image()
    tuned = tune(block, x, repeats=1, progress=silent)
    assert {t.chosen for t in tuned} == {LIBRARY}


def test_a_limit_leaves_the_rest_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, triton=1.0)
    block, x = block_and_image()
    tuned = tune(block, x, repeats=1, progress=silent, limit_s=0.0)
    assert len(tuned) == 1 and tuned[0].layers == ("conv2",)  # the most multiplications


def test_training_has_choices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, triton=1.0)
    block, x = block_and_image()
    tuned = tune(block, x, repeats=1, progress=silent, training=True)
    kinds = sorted(t.problem.split()[0] for t in tuned)
    kinds = [kind for kind in kinds if kind != "train_tensor_input"]  # compiled kernels' alone
    assert kinds == ["train_behind_norm"] * 2 + ["train_input"] * 2 + ["train_output"]
    with torch.no_grad(), launches(monkeypatch) as names:
        fuse(block)(x)
    assert "conv_kernel" not in names


def test_triton_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, triton=1.0)
    block, x = block_and_image()
    tuned = tune(block, x, repeats=1, progress=silent, triton=False)
    assert tuned and not any(n.startswith("triton") for t in tuned for n in t.milliseconds)


def test_a_wrong_kernel_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = conv_bn_act.conv_bn_act

    def wrong(*args: Any) -> Tensor:
        return right(*args) * 1.05

    monkeypatch.setattr(conv_bn_act, "conv_bn_act", wrong)
    timed(monkeypatch, triton=1.0)
    block, x = block_and_image()
    for t in tune(block, x, repeats=1, progress=silent):
        assert t.chosen == LIBRARY
        assert not any(name.startswith("triton") for name in t.milliseconds)


def test_a_kernel_that_fails_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(conv_bn_act, "conv_bn_act", failing)
    timed(monkeypatch, triton=1.0)
    block, x = block_and_image()
    tuned = tune(block, x, repeats=1, progress=silent)
    assert all(LIBRARY in t.milliseconds for t in tuned)
