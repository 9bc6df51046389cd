"""Every variant of every operator that this machine can run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from . import blocks, conv, gpu, passes
from .draw import DTYPES
from .measure import Variant


def every(device: str = "cpu", dtypes: Collection[str] = tuple(DTYPES)) -> list[Variant]:
    """All variants on a device.

    Args:
        device: "cpu", or a GPU's name. There small blocks are eager PyTorch's, and none is shown.
        dtypes: those of :data:`DTYPES` to restrict them to.
    """
    on_gpu = device != "cpu"
    found = [v for d in dtypes for v in (_on_gpu(d, device) if on_gpu else _on_cpu(d))]
    order = list(dict.fromkeys(v.operator for v in found))
    return sorted(found, key=lambda v: order.index(v.operator))


def _on_cpu(dtype: str) -> Iterator[Variant]:
    yield from conv.evaluation(dtype)
    yield from conv.training(dtype)
    yield from passes.affine(dtype, "cpu")
    yield from passes.pools(dtype, "cpu")
    for of_block in (dtype, *(("autocast",) if dtype == "bfloat16" else ())):
        yield from blocks.evaluation(of_block)
        yield from blocks.training(of_block)
        yield from blocks.fuzzed(of_block)


def _on_gpu(dtype: str, device: str) -> Iterator[Variant]:
    if dtype != "float64":  # that is eager PyTorch's there
        yield from gpu.convolutions(dtype, device)
        yield from passes.affine(dtype, device)
        yield from passes.pools(dtype, device)
