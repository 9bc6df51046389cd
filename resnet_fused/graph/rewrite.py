"""The only place that changes a model: gives instances their planned forward, and takes it back.

A fused instance keeps its children, parameters and attributes; only its class becomes a subclass of
its class, whose forward runs the plan when it fits the call and the original forward otherwise.
(PyTorch's own parametrizations and FSDP2 change instances in the same way.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from resnet_fused.graph.marker import FusedModule, original_class
from resnet_fused.graph.plan import Plan, make_plan
from resnet_fused.graph.whole import open_children
from resnet_fused.process_lock import ProcessLock

_PREFIX = "_fused_"
# Weak, so that a class that somebody makes at run time goes with its last instance.
_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()
_changing = ProcessLock()


class _Planned(FusedModule, nn.Module):
    """Copies and pickles like its original class, and plans its forward anew there."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        get_state = getattr(super(), "__getstate__", lambda: vars(self))  # object's from 3.11 on
        state = get_state()
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if not k.startswith(_PREFIX)}
        return _restore, (original_class(self), *_asked(self)), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        excluded, low_memory = _asked(self)
        plan = make_plan(self, excluded, low_memory=low_memory)
        _attach(self, plan)
        _attach(self, open_children(self, plan))


def apply(plans: Mapping[nn.Module, tuple[Plan, Mapping[str, str]]]) -> None:
    """Give every module its plan; all of them, or after an exception none.

    Those that another thread has fused meanwhile keep what they have.
    """
    with _changing.here():
        before = _remember(plans, fused=False)
        try:
            for module, *_ in before:
                plan, excluded = plans[module]
                vars(module)["_fused_excluded"] = dict(excluded)
                vars(module)["_fused_low_memory"] = plan.low_memory
                _attach(module, plan)
                module.__class__ = _fused_class(type(module))
            for module, *_ in before:
                _attach(module, open_children(module, plans[module][0]))
        except BaseException:
            _put_back(before)
            raise


def remove(modules: Iterable[nn.Module]) -> None:
    """Give fused instances their classes and forwards back; all, or after an exception none."""
    with _changing.here():
        before = _remember(modules, fused=True)
        try:
            for module, *_ in before:
                for name in _own_names(module):
                    del vars(module)[name]
                module.__class__ = original_class(module)
        except BaseException:
            _put_back(before)
            raise


_Before = list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]


def _remember(modules: Iterable[nn.Module], *, fused: bool) -> _Before:
    """The fused of these modules, or the others, with their classes and our attributes.

    A function, since CPython 3.12 has a hole in its table of handlers where a comprehension with a
    condition jumps back: an interrupt there, below a ``with``, would leave the lock closed.
    """
    return [
        (m, type(m), {name: vars(m)[name] for name in _own_names(m)})
        for m in modules
        if isinstance(m, FusedModule) == fused
    ]


def _put_back(before: _Before) -> None:
    for module, kind, attributes in before:
        for name in _own_names(module):
            del vars(module)[name]
        vars(module).update(attributes)
        module.__class__ = kind


def _own_names(module: nn.Module) -> list[str]:
    return [name for name in vars(module) if name.startswith(_PREFIX)]


def _attach(module: nn.Module, plan: Plan) -> None:
    for body in (*plan.bodies.values(), plan.whole):
        if body is not None:
            vars(module).update(body.steps)
    vars(module)["_fused_plan"] = plan


def _asked(module: nn.Module) -> tuple[dict[str, str], bool]:
    """What an instance's plan depends on beside the module: exclusions, and the memory mode."""
    own = vars(module)
    return dict(own.get("_fused_excluded", {})), bool(own.get("_fused_low_memory", False))


def _restore(kind: type[nn.Module], excluded: dict[str, str], low_memory: bool) -> nn.Module:
    fused = _fused_class(kind)
    module = fused.__new__(fused)
    vars(module)["_fused_excluded"] = excluded
    vars(module)["_fused_low_memory"] = low_memory
    return module


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    fused = _classes.get(kind)
    if fused is None:
        original = kind.forward

        @functools.wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            plan = vars(self).get("_fused_plan")  # none where the user's code made the instance
            body = None if plan is None else plan.body(self, args, kwargs)
            run = original if body is None else body.function
            return run(self, *args, **kwargs)

        names = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
        made = type(kind.__name__, (_Planned, kind), names)
        fused = _classes.setdefault(kind, made)
    return fused
