"""Which backend runs an operator: `auto` may choose, a named one never falls back silently."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.backends import native, native_cuda
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
    return backend == "reference" or (
        # Compiled operators on a GPU that they have no code for.
        backend == "auto"
        and input.is_cuda
        and native_cuda.available
        and native_cuda.unusable(input.get_device()) is not None
    )


def native_unusable(input: Tensor) -> str | None:
    """Why the compiled kernels cannot take this input, or None if they can."""
    if input.is_cuda:
        return native_cuda.unusable(input.get_device())
    if input.device.type != "cpu":
        return f"the compiled kernels run on cpu and cuda, the input is on {input.device}"
    return native.reason
