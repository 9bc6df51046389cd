"""Whether Triton kernels can run on a tensor. Triton itself is not imported here."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LEAST_ARCH = 80  # bfloat16 and TF32 matrix instructions, asynchronous copies


LEAST_BLOCK_BYTES = 16 << 20
LEAST_STEP_BYTES = 64 << 20
"""With smaller activations, what records gradients runs as eager PyTorch does: a block of several
convolutions in one function, and a step by itself. Forward and backward, a convolution with batch
norm takes 65 µs of Python in the one and 230 µs in the other (benchmarks/bench_host.py), and makes
some twenty passes over activations; over these a GPU of 4 TB/s takes as long. Above, it waits for
its memory and not for Python. An estimate, not measured on a GPU.
"""


@functools.cache
def missing() -> str | None:
    """Why there are no Triton kernels in this process, or None."""
    if os.environ.get("RESNET_FUSED_NO_TRITON") == "1":
        return "switched off by RESNET_FUSED_NO_TRITON=1"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is where these kernels are meant for. A test puts Triton's interpreter in
    the GPU's place here.
    """
    return tensor.is_cuda


def unusable(input: Tensor) -> str | None:
    """Why Triton kernels cannot take this input, or None if they can."""
    if not on_gpu(input):
        return f"Triton kernels run on cuda, the input is on {input.device}"
    if input.dtype not in DTYPES:
        return f"Triton kernels have no {input.dtype}"
    return missing() or _unsupported(input.get_device())


@functools.cache
def architecture(device: int) -> int:
    """Compute capability as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _unsupported(device: int) -> str | None:
    if torch.version.cuda is None:
        return "Triton kernels are made for NVIDIA GPUs"
    if architecture(device) < _LEAST_ARCH:
        return f"Triton kernels need compute capability 8.0, device {device} has less"
    return None
