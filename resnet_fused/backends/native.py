"""Loads the compiled CPU kernels, or says why there are none.

Set ``RESNET_FUSED_NO_NATIVE=1`` to do without them.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from resnet_fused.backends import library
from resnet_fused.ops import schema

_SWITCH = "RESNET_FUSED_NO_NATIVE"


def _load() -> str | None:
    """Load the library; None, or what stands in the way."""
    reason = library.load("_C_cpu", _SWITCH)
    if reason is not None and os.environ.get(_SWITCH) != "1":
        warnings.warn(
            "resnet_fused runs without its compiled CPU kernels, as plain PyTorch operators: "
            f"correct, but not faster than eager on the CPU ({reason}). Build them with a C++ "
            "compiler and `pip install --no-build-isolation -e .` in a checkout, or set "
            f"{_SWITCH}=1 to do without",
            stacklevel=2,
        )
    return reason


reason: str | None = _load()
"""Why the compiled kernels cannot be used, or None if they can."""

available: bool = reason is None
"""Whether the compiled kernels are loaded."""


def isa() -> str:
    """The instruction set the kernels run with: avx512, avx2 or baseline.

    Raises:
        RuntimeError: the library is not loaded, or RESNET_FUSED_CPU_ISA names an instruction set
            that is unknown or that this CPU lacks.
    """
    if reason is not None:
        raise RuntimeError(f"the compiled CPU kernels are not loaded: {reason}")
    return _isa()


@functools.cache
def _isa() -> str:
    # Once: PyTorch (2.13) never frees a string that an operator returns.
    return getattr(torch.ops, schema.NAMESPACE)._cpu_isa()
