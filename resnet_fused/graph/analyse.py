"""Walks a whole model: which modules get a plan, and for every conv and BN what becomes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused.graph.marker import FusedModule
from resnet_fused.graph.plan import Plan, make_plan, module_reason, plan_of
from resnet_fused.graph.trace import Untraceable, opens

FilterFn = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Candidate:
    """A run of the model, or a conv or BN that is in none."""

    modules: tuple[str, ...]  # qualified names in the order of the forward
    pattern: str = ""
    reason: str = ""  # empty if it can be fused
    fused: bool = False


@dataclass
class Analysis:
    """The plans to apply and the fate of every candidate."""

    plans: dict[nn.Module, tuple[Plan, dict[str, str]]] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)


def analyse(
    model: nn.Module, filter_fn: FilterFn | None = None, *, low_memory: bool = False
) -> Analysis:
    """Plan every module of a model that holds something to fuse; changes nothing."""
    walk = _Walk(model, filter_fn, low_memory)
    walk.visit(model, "")
    walk.report_the_rest()
    return walk.analysis


class _Walk:
    def __init__(self, model: nn.Module, filter_fn: FilterFn | None, low_memory: bool) -> None:
        self.model = model
        self.filter_fn = filter_fn
        self.low_memory = low_memory
        self.analysis = Analysis()
        self.shared = _shared_modules(model)
        self.seen: set[int] = set()
        self.reported: set[str] = set()
        self.untraceable: dict[str, str] = {}
        self.accepted: set[str] = set()  # by the filter

    def visit(self, module: nn.Module, name: str) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        own = _own_candidates(module)
        called: frozenset[str] = frozenset()
        if own and not is_candidate(module):
            plan, excluded = self._plan(module, name, own)
            if plan is not None:
                called = plan.swallowed_names
                self._report(plan, module, name)
                if plan.bodies and not isinstance(module, FusedModule):
                    self.analysis.plans[module] = (plan, excluded)
        for child_name, child in module.named_children():
            entered = opens(child) and any(c.startswith(child_name + ".") for c in called)
            if not entered:
                self.visit(child, _join(name, child_name))

    def _plan(
        self, module: nn.Module, name: str, own: dict[str, nn.Module]
    ) -> tuple[Plan | None, dict[str, str]]:
        known = plan_of(module)
        if known is not None:
            return known, {}
        excluded = {n: self.shared[id(m)] for n, m in own.items() if id(m) in self.shared}
        try:
            if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
                raise Untraceable(f"it is a {type(module).__name__}")
            if "forward" in vars(module):
                raise Untraceable("its forward was replaced")
            plan = make_plan(module, excluded, low_memory=self.low_memory)
            while declined := self._declined(plan, module, name):
                excluded |= declined
                plan = make_plan(module, excluded, low_memory=self.low_memory)
        except Untraceable as error:
            for child in own:
                where = name or type(self.model).__name__
                self.untraceable[_join(name, child)] = f"{where}: {error}"
            return None, excluded
        return plan, excluded

    def _declined(self, plan: Plan, module: nn.Module, name: str) -> dict[str, str]:
        """Candidates that the caller's filter turns down."""
        if self.filter_fn is None:
            return {}
        declined: dict[str, str] = {}
        for run in plan.runs:
            anchor = str(run.anchor.target)
            full = _join(name, anchor)
            if not run.reason and full not in self.accepted:
                if self.filter_fn(full, module.get_submodule(anchor)):
                    self.accepted.add(full)
                else:
                    own = (str(n.target) for n in (run.conv, run.bn) if n is not None)
                    declined |= dict.fromkeys(own, "excluded by filter_fn")
        return declined

    def _report(self, plan: Plan, module: nn.Module, name: str) -> None:
        fused = isinstance(module, FusedModule)
        for run in plan.runs:
            modules = tuple(_join(name, n) for n in run.module_names())
            self._add(Candidate(modules, run.pattern, run.reason, fused and not run.reason))

    def _add(self, candidate: Candidate) -> None:
        self.reported.update(candidate.modules)
        self.analysis.candidates.append(candidate)

    def report_the_rest(self) -> None:
        """Convs and BNs that no traced forward calls."""
        for name, module in self.model.named_modules():
            if is_candidate(module) and name not in self.reported:
                reason = (
                    self.untraceable.get(name)
                    or module_reason(module)
                    or self.shared.get(id(module))
                    or "not called by the forward of the module that holds it"
                )
                self._add(Candidate((name,), reason=reason))


def is_candidate(module: nn.Module) -> bool:
    """Whether a module is a convolution or a batch norm that explain has to account for."""
    return isinstance(module, (nn.Conv2d, _BatchNorm))


def _own_candidates(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Convs and BNs that a module calls itself: its children, and theirs in opened Sequentials."""
    own: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if is_candidate(child):
            own[_join(prefix, name)] = child
        elif opens(child):
            own |= _own_candidates(child, _join(prefix, name))
    return own


def _shared_modules(model: nn.Module) -> dict[int, str]:
    """Convs and BNs that stand at several places, or share a parameter with another one."""
    places: dict[int, list[str]] = defaultdict(list)
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if is_candidate(module):
            places[id(module)].append(name)
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)].append((name, module))
    reasons = {
        i: f"it stands at several places: {', '.join(names)}"
        for i, names in places.items()
        if len(names) > 1
    }
    for users in owners.values():
        for _, module in users:
            others = sorted({n for n, m in users if m is not module})
            if others:
                reasons.setdefault(id(module), f"it shares a parameter with {others[0]}")
    return reasons


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
