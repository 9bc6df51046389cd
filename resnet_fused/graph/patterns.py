"""The shapes that are looked for, as data: what is an activation, an addition, a write."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn


class Activation(NamedTuple):
    """An activation by its name in the operators, with leaky_relu's slope."""

    act: str
    negative_slope: float = 0.01


def _hardtanh(module: nn.Hardtanh) -> Activation | None:
    return Activation("relu6") if (module.min_val, module.max_val) == (0, 6) else None


def _gelu(approximate: str) -> Activation | None:
    return Activation("gelu") if approximate == "none" else None


def _leaky(slope: float) -> Activation | None:
    return Activation("leaky_relu", float(slope)) if slope >= 0 else None


_MODULES: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.ReLU: lambda m: Activation("relu"),
    nn.ReLU6: lambda m: Activation("relu6"),
    nn.Hardtanh: _hardtanh,
    nn.LeakyReLU: lambda m: _leaky(m.negative_slope),
    nn.SiLU: lambda m: Activation("silu"),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.GELU: lambda m: _gelu(m.approximate),
}

_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_ADDITION_METHODS = ("add", "add_")


def activation(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """The activation that a node computes of its first argument; `module` is what it calls."""
    if module is not None:
        read = _MODULES.get(type(module))
        return read(module) if read is not None else None
    if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        act = _METHODS.get(str(node.target))
        return Activation(act) if act else None
    if node.op != "call_function" or not node.args or node.target not in _FUNCTIONS:
        return None
    act = _FUNCTIONS[node.target]
    names = ("negative_slope", "inplace") if act == "leaky_relu" else ("inplace",)
    options: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if act == "gelu":
        return _gelu(options.get("approximate", "none"))
    if act == "leaky_relu":
        return _leaky(options.get("negative_slope", 0.01))
    return Activation(act)


class Addition(NamedTuple):
    """left + right; in place means that left is overwritten."""

    left: fx.Node
    right: fx.Node
    inplace: bool


def addition(node: fx.Node) -> Addition | None:
    """The two operands of a node that adds two traced values, with alpha 1."""
    method = node.op == "call_method" and node.target in _ADDITION_METHODS
    function = node.op == "call_function" and node.target in _ADDITIONS
    if not (method or function) or node.kwargs.get("alpha", 1) != 1:
        return None
    operands = [*node.args, *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs)]
    nodes = [o for o in operands if isinstance(o, fx.Node)]
    if len(nodes) != 2 or len(operands) != 2 or set(node.kwargs) - {"alpha", "input", "other"}:
        return None
    return Addition(nodes[0], nodes[1], node.target in (operator.iadd, "add_"))


_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
    operator.ilshift, operator.irshift, operator.setitem,
}  # fmt: skip
_FRESH_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.gelu, operator.add,
    operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.sub, torch.cat,
    F.pad, F.avg_pool2d, F.max_pool2d, F.conv2d, F.batch_norm,
}  # fmt: skip
_FRESH_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.SyncBatchNorm, nn.Linear, nn.AvgPool2d, nn.MaxPool2d, nn.GroupNorm, nn.ConvTranspose2d,
)  # fmt: skip


def is_fresh(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node's result surely shares no memory with its arguments."""
    if module is not None:
        if type(module) in _MODULES:
            return not getattr(module, "inplace", False)
        return type(module) in _FRESH_MODULES
    if node.op == "call_function":
        return (
            node.target in _FRESH_FUNCTIONS
            and not node.kwargs.get("inplace", False)
            # Among an activation's arguments 1 asks for it as well; in arithmetic it is a number.
            and (node.target not in _FUNCTIONS or True not in node.args)
        )
    return node.op == "call_method" and node.target in ("add", "relu", "mul", "clone")


def writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may write to the memory of its arguments."""
    if module is not None:
        return any(getattr(m, "inplace", False) for m in module.modules())
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return (
            node.target in _INPLACE_OPERATORS
            or (name.endswith("_") and not name.endswith("__"))
            or bool(node.kwargs.get("inplace", False))
            or (node.target in _FUNCTIONS and True in node.args)
        )
    return False
