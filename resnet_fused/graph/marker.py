"""What tells a fused instance from others, for those who look and those who change."""

from __future__ import annotations

from torch import nn


class FusedModule:
    """Among the bases of every fused instance's class, before its original class."""


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of an instance before it was fused."""
    classes = iter(type(module).__mro__)
    if isinstance(module, FusedModule):
        while next(classes) is not FusedModule:
            pass
    return next(classes)
