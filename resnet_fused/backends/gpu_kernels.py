"""Whether this package has kernels for a GPU's tensor: the compiled ones, or else Triton's."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.backends import native_cuda
from resnet_fused.backends.triton import support


def compiled(tensor: Tensor) -> bool:
    """Whether the operators on this tensor are the compiled ones for a GPU. A test puts their
    emulation in the GPU's place here.
    """
    return native_cuda.available and tensor.is_cuda


def unusable(input: Tensor) -> str | None:
    """Why neither can take this input, or None if the operators on it run by kernels."""
    if not compiled(input):
        return support.unusable(input)
    if input.dtype not in support.DTYPES:
        return f"the kernels for a GPU have no {input.dtype}"
    return native_cuda.unusable(input.get_device())
