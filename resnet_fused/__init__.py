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
from resnet_fused.capture import Captured, capture
from resnet_fused.policy import precision

__all__ = [
    "Captured",
    "Entry",
    "Explanation",
    "FusionError",
    "Verification",
    "capture",
    "explain",
    "functional",
    "fuse",
    "models",
    "precision",
    "unfuse",
    "verify",
]
