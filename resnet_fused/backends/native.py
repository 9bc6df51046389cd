"""Loads the compiled CPU kernels, or says why there are none.

Set ``RESNET_FUSED_NO_NATIVE=1`` to do without them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from resnet_fused.ops import schema

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".so", ".pyd", ".dylib")


def _load() -> str | None:
    """Load the library; None, or what stands in the way."""
    if os.environ.get("RESNET_FUSED_NO_NATIVE") == "1":
        return "switched off by RESNET_FUSED_NO_NATIVE=1"
    libraries = sorted(p for p in _PACKAGE.glob("_C_cpu*") if p.suffix in _SUFFIXES)
    if not libraries:
        reason = f"not built: no _C_cpu library in {_PACKAGE}"
    else:
        try:
            torch.ops.load_library(str(libraries[0]))
            return None
        except OSError as error:
            reason = f"failed to load {libraries[0].name}: {error}"
    warnings.warn(
        "resnet_fused runs without its compiled CPU kernels, as plain PyTorch operators: correct, "
        f"but not faster than eager on the CPU ({reason}). Build them with a C++ compiler and "
        "`pip install --no-build-isolation -e .` in a checkout, or set RESNET_FUSED_NO_NATIVE=1 "
        "to do without",
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
    return getattr(torch.ops, schema.NAMESPACE)._cpu_isa()
