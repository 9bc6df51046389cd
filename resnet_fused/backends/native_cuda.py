"""Loads the compiled CUDA kernels, or says why there are none.

Set ``RESNET_FUSED_NO_CUDA=1`` to do without them. Where torch has no CUDA nothing is loaded.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from resnet_fused.backends import library
from resnet_fused.ops import schema

_SWITCH = "RESNET_FUSED_NO_CUDA"


def _load() -> str | None:
    """Load the library; None, or what stands in the way."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    reason = library.load("_C_cuda", _SWITCH)
    # device_count() asks the driver's library, and starts no CUDA: a fork stays possible.
    if reason is not None and os.environ.get(_SWITCH) != "1" and torch.cuda.device_count() > 0:
        warnings.warn(
            f"resnet_fused runs without its compiled CUDA kernels ({reason}); on a GPU it has "
            "Triton's. Build them where nvcc is with `pip install --no-build-isolation -e .` in a "
            f"checkout, or set {_SWITCH}=1 to do without",
            stacklevel=2,
        )
    return reason


reason: str | None = _load()
"""Why the compiled kernels cannot be used, or None if they can."""

available: bool = reason is None
"""Whether the compiled kernels are loaded."""


@functools.cache
def unusable(device: int) -> str | None:
    """Why the kernels cannot run on this GPU (no code for it, an old driver), or None."""
    if reason is not None:
        return f"the compiled CUDA kernels are not loaded: {reason}"
    try:
        architecture(device)
    except RuntimeError as error:
        return f"the compiled CUDA kernels do not run on device {device}: {error}"
    return None


def architecture(device: int) -> int:
    """What the code that runs on this GPU was compiled for: 90 for compute capability 9.0.

    Raises:
        RuntimeError: the library is not loaded, or has no code for this GPU.
    """
    if reason is not None:
        raise RuntimeError(f"the compiled CUDA kernels are not loaded: {reason}")
    return getattr(torch.ops, schema.NAMESPACE)._cuda_architecture(device)


@functools.cache
def code_for(capability: int) -> int:
    """What runs on this machine's GPUs of a compute capability: the same, less, or 0 for nothing.

    A library that was built for 8.0 alone runs on 9.0 as well, without what 9.0 has more.
    """
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor == capability:
            return 0 if unusable(device) is not None else min(architecture(device), capability)
    return capability
