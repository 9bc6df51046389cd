"""The end of a classifier: global average pool → flatten → linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn


def head(
    module: nn.Module, linear: fx.Node, reason: Callable[[nn.Module], str | None]
) -> list[fx.Node]:
    """The nodes of a head that ends with a call of a linear layer; empty if there is none.

    Args:
        module: the traced module.
        reason: why a module's call may not be swallowed, or None if it may.
    """
    flatten = _only_source(linear)
    pool = None if flatten is None else _only_source(flatten)
    if flatten is None or pool is None or not _only_source(pool, shared=True):
        return []
    kinds = (nn.AdaptiveAvgPool2d, None, nn.Linear)
    for node, kind in zip((pool, flatten, linear), kinds, strict=True):
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if called is not None and reason(called) is not None:
            return []
        if kind is not None and type(called) is not kind:
            return []
        if kind is None and not _flattens(node, called):
            return []
        if isinstance(called, nn.AdaptiveAvgPool2d) and called.output_size not in (1, (1, 1)):
            return []
    return [pool, flatten, linear]


def _only_source(node: fx.Node, *, shared: bool = False) -> fx.Node | None:
    """What a node reads, if that is one value and nobody else reads it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.all_input_nodes != [source]:
        return None
    return source if shared or len(source.users) == 1 else None


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node turns [N, C, 1, 1] to [N, C]."""
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target not in (torch.flatten, "flatten"):
        return False
    options = {**dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)), **node.kwargs}
    return options in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})
