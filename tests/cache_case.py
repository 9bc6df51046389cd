"""A cache of measured choices of a test's own, and what may stand in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_fused import packing, tuning_cache

MACHINE = "a processor, avx512, torch 2"
CHOICES = {"fp32 1x64": "winograd4", "fp32 2x64": "direct"}
FILE = "conv_algorithms.json"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private cache directory of this test's own."""
    place = tmp_path / "cache"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(place))
    monkeypatch.setattr(tuning_cache, "_complained", set())
    packing.forget_measured()
    yield place
    packing.forget_measured()


def good() -> dict[str, object]:
    """What the library writes."""
    return {"format": 1, "machines": {MACHINE: dict(CHOICES)}}


def write(directory: Path, text: str | bytes) -> Path:
    """Put a file where the library looks for it."""
    file = directory / FILE
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o600)
    return file
