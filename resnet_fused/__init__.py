"""Residual networks, faster in PyTorch: ``resnet_fused.fuse(model)``."""

from resnet_fused import functional, models
from resnet_fused.api import (
    Entry,
    Explanation,
    FusionError,
    Verification,
    explain,
    fuse,
    unfuse,
    verify,
)
from resnet_fused.policy import precision

__all__ = [
    "Entry",
    "Explanation",
    "FusionError",
    "Verification",
    "explain",
    "functional",
    "fuse",
    "models",
    "precision",
    "unfuse",
    "verify",
]
