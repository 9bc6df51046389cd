"""All faults, by area."""

from __future__ import annotations

from dataclasses import dataclass

from mutation import caches, cpu, cuda, graph, modules, triton
from mutation.fault import Fault


@dataclass(frozen=True)
class Area:
    """Faults whose files are built and tested in the same way."""

    faults: tuple[Fault, ...]
    build: tuple[str, ...] = ()  # what Python is given to build what has changed
    environment: tuple[tuple[str, str], ...] = ()


AREAS = {
    "cpu": Area(
        cpu.FAULTS,
        ("setup.py", "-q", "build_ext", "--inplace"),
        (("RESNET_FUSED_NO_CUDA_BUILD", "1"), ("RESNET_FUSED_OPTIMIZE", "1")),
    ),
    "cuda": Area(cuda.FAULTS, ("tests/cuda_on_cpu/build.py",)),
    "graph": Area((*graph.FAULTS, *modules.FAULTS)),
    "triton": Area(
        triton.FAULTS,
        environment=(("TRITON_INTERPRET", "1"), ("RESNET_FUSED_NO_NATIVE", "1")),
    ),
    "caches": Area(caches.FAULTS),
}
"""The slowest first: each is worked off by one worker."""
