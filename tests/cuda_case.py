"""Where the compiled CUDA kernels are tested: on a GPU, or on CPU tensors by the emulator.

Without a GPU the same files are compiled as C++ (cuda_on_cpu/build.py), and their operators take
CPU tensors, in a namespace of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cuda_on_cpu import build

from resnet_fused.backends import native_cuda

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
MISSING = native_cuda.reason if HAS_GPU else build.missing()

needs_cuda_kernels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@functools.cache
def operators() -> Any:
    """The operators, by the names that ops/schema.py gives them."""
    return torch.ops.resnet_fused if HAS_GPU else build.load()
