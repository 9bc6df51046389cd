"""CPU tensors in the place of CUDA ones, so that modules run the compiled kernels without a GPU.

They take the same way through modules and operators; the emulator's kernels (cuda_on_cpu) are what
the operators find.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from cuda_case import HAS_GPU, operators

from resnet_fused.backends import gpu_kernels, native, native_cuda
from resnet_fused.backends.triton import support
from resnet_fused.benchmark.measure import tensor_float_32
from resnet_fused.ops import gpu, gpu_choice

COMPILED = (
    "scale_shift_act", "_finish_conv_", "normalize_act", "batch_statistics", "bn_act",
    "bn_act_backward", "bn_act_backward_sums", "bn_act_backward_input", "_max_pool2d",
    "_train_pool", "_train_pool_sums", "_train_pool_input", "_max_unpool",
    "_update_running_statistics",
)  # fmt: skip
"""Operators of the compiled library that other backends have as well."""

CONVOLUTIONS = ("_cuda_conv", "_cuda_pack", "_cuda_train_conv", "_cuda_train_conv_input")


@pytest.fixture
def compiled_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each operator has run since; small tensors count as large ones."""
    monkeypatch.setattr(support, "LEAST_BLOCK_BYTES", 0)
    monkeypatch.setattr(support, "LEAST_STEP_BYTES", 0)
    calls: dict[str, int] = dict.fromkeys(COMPILED + CONVOLUTIONS, 0)
    if HAS_GPU:
        with tensor_float_32(False):
            yield calls
        return
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(support, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(gpu_kernels, "compiled", lambda tensor: True)
    monkeypatch.setattr(native_cuda, "unusable", lambda device: None)
    monkeypatch.setattr(support, "_unsupported", lambda device: None)
    monkeypatch.setattr(support, "architecture", lambda device: 90)
    monkeypatch.setattr(gpu_choice, "_measured", lambda device: {})
    library = torch.library.Library("resnet_fused", "IMPL")

    def counted(name: str) -> object:
        operator = getattr(operators(), name).default

        def run(*args: object) -> object:
            calls[name] += 1
            return operator(*args)

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one kernel in another's place is what is wanted
        for name in calls:
            library.impl(name, counted(name), "CPU", allow_override=True)
        library.impl("conv_bn_act", gpu.conv_bn_act, "CPU", allow_override=True)
    yield calls
    library._destroy()
