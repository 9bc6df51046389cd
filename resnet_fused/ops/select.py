"""Which backend runs an operator: `auto` may choose, a named one never falls back silently."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.backends.triton import support

BACKENDS = ("auto", "native", "triton", "reference")


def uses_reference(backend: str, input: Tensor) -> bool:
    """Whether plain PyTorch is to run the operator for this input.

    Raises:
        ValueError: `backend` is not a backend's name.
        RuntimeError: `backend` names one that cannot run here; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    unusable = {"native": native_unusable, "triton": support.unusable}.get(backend)
    reason = unusable and unusable(input)
    if reason:
        raise RuntimeError(f"backend: {backend!r} cannot run this: {reason}")
    return backend == "reference"


def native_unusable(input: Tensor) -> str | None:
    """Why the compiled kernels cannot take this input, or None if they can."""
    if input.device.type != "cpu":
        return f"the compiled kernels run on cpu, the input is on {input.device}"
    return native.reason
