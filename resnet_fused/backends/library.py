"""Finds and loads a compiled library of this package. Which there are, setup.py says."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# The libraries implement what is defined there.
from resnet_fused.ops import schema  # noqa: F401

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".so", ".pyd", ".dylib")


def load(name: str, switch: str) -> str | None:
    """Load the library; None, or what stands in the way.

    Args:
        name: without the suffix, as "_C_cpu".
        switch: the environment variable that is "1" where it is not wanted.
    """
    if os.environ.get(switch) == "1":
        return f"switched off by {switch}=1"
    found = sorted(p for p in _PACKAGE.glob(f"{name}*") if p.suffix in _SUFFIXES)
    if not found:
        return f"not built: no {name} library in {_PACKAGE}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"failed to load {found[0].name}: {error}"
    return None
