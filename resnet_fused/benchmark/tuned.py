"""What tuning found for one convolution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuned:
    """One convolution's shape, and what each algorithm took."""

    problem: str
    layers: tuple[str, ...]
    expected: str  # without measuring
    chosen: str
    milliseconds: dict[str, float]
