"""What a module's forward becomes: the traced graph with each run replaced by one step.

A plan is made for one module and read-only afterwards; nothing here touches the module.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused.graph.group import group_blocks, join_stems
from resnet_fused.graph.head import head
from resnet_fused.graph.marker import FusedModule
from resnet_fused.graph.match import Matcher, Run
from resnet_fused.graph.trace import Untraceable, has_hooks, trace
from resnet_fused.modules.bn_act import BNAct
from resnet_fused.modules.conv_bn_act import ConvBNAct
from resnet_fused.modules.max_pool import MaxPool
from resnet_fused.modules.pool_linear import PoolLinear
from resnet_fused.packing import conv_padding

_sources = count()

EVALUATION = (False, False)
"""Of Plan.bodies: not training, arguments are tensors."""


class Opened(NamedTuple):
    """A module whose forward a body contains, and what the trace took for granted about it."""

    path: tuple[str, ...]  # from the module that the body belongs to
    children: tuple[str, ...]
    attributes: Mapping[str, object]  # numbers and flags that forward may have read


class Swallowed(NamedTuple):
    """A module that is no longer called, as the trace has seen it."""

    path: tuple[str, ...]
    kind: type
    module: nn.Module | None = None  # where no other one will do


@dataclass(frozen=True)
class Body:
    """One compiled forward; it finds its steps as attributes of the module."""

    function: Callable[..., Any]
    code: str
    graph: fx.Graph
    steps: Mapping[str, object]
    arguments: tuple[str, ...]
    opened: tuple[Opened, ...]  # the module itself first
    swallowed: tuple[Swallowed, ...]

    def fits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call, and the module's state, are what the trace assumed."""
        if len(args) + len(kwargs) != len(self.arguments):
            return False
        if kwargs and not all(name in self.arguments for name in kwargs):
            return False
        # Hundreds of modules at every call of a whole network's body: so without calls.
        for path, kind, known in self.swallowed:
            own = module.__dict__
            for name in path:
                child = own["_modules"].get(name)
                if child is None:
                    return False
                own = child.__dict__
            if (
                type(child) is not kind
                or (known is not None and child is not known)
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return False
        for path, children, attributes in self.opened:
            own = module.__dict__
            for name in path:
                own = own["_modules"][name].__dict__
            if tuple(own["_modules"]) != children:
                return False
            for name, value in attributes.items():
                if own.get(name) != value:
                    return False
        return True


@dataclass(frozen=True, eq=False)
class Plan:
    """The bodies of one module by (training, arguments are sequences), and what was matched."""

    bodies: Mapping[tuple[bool, bool], Body]
    runs: tuple[Run, ...]  # fused ones and candidates with their reasons
    swallowed_names: frozenset[str]
    low_memory: bool = False  # in training
    whole: Body | None = None  # in evaluation, with the forwards of fused children in it

    def body(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Body | None:
        """The body for this call, or None if the module's own forward has to run."""
        values = (*args, *kwargs.values())
        if all(isinstance(v, Tensor) for v in values):
            sequences = False
        elif all(isinstance(v, (list, tuple)) for v in values):
            sequences = True
        else:
            return None
        kind = module.training, sequences
        body = self.bodies.get(kind)
        if body is None or _watched():
            return None
        if kind == EVALUATION and self._whole_fits(module, args, kwargs):
            return self.whole
        return body if body.fits(module, args, kwargs) else None

    def _whole_fits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # torch.compile joins the bodies of children itself.
        whole = None if torch.compiler.is_compiling() else self.whole
        return whole is not None and whole.fits(module, args, kwargs)


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of a fused instance."""
    return vars(module).get("_fused_plan") if isinstance(module, FusedModule) else None


def _watched() -> bool:
    """Whether something looks at module calls: global hooks, a TorchScript trace, torch.func,
    forward-mode derivatives.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch.nn.modules.module._has_any_global_hook()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def make_plan(module: nn.Module, excluded: Mapping[str, str], *, low_memory: bool = False) -> Plan:
    """Trace and match a module's forward; without bodies if nothing in it can be fused.

    Args:
        module: its own forward is planned, not its children's.
        excluded: names of modules below it that must be left alone, with the reason.
        low_memory: blocks keep less for backward and compute more (fuse(memory="low")).

    Raises:
        Untraceable: its forward cannot be represented as a graph.
    """
    bodies: dict[tuple[bool, bool], Body] = {}
    known: dict[tuple[str, bool], Body | None] = {}
    runs: dict[tuple[str, ...], Run] = {}
    names: set[str] = set()
    numbers = count()
    for sequences in (False, True):
        for training in (False, True):
            try:
                graph = trace(module, training=training, sequences=sequences)
            except Untraceable:
                if sequences:
                    continue
                raise
            text = str(graph)
            names.update(str(n.target) for n in graph.nodes if n.op == "call_module")
            if (text, sequences) not in known:
                body, found = _plan_graph(module, graph, excluded, numbers, sequences, low_memory)
                known[text, sequences] = body
                if not sequences:
                    for run in found:
                        before = runs.get(run.module_names())
                        if before is None or before.reason:
                            runs[run.module_names()] = run
            planned = known[text, sequences]
            if planned is not None:
                bodies[training, sequences] = planned
    return Plan(bodies, tuple(runs.values()), frozenset(names), low_memory)


def module_reason(module: nn.Module) -> str | None:
    """Why a module's call may not be swallowed by a run, judged by the module alone."""
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return "it has parametrizations"
    if has_hooks(module):
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, nn.Conv2d):
        if type(module) is not nn.Conv2d:
            return f"{kind} is a subclass of Conv2d"
        if module.padding_mode != "zeros":
            return f"padding_mode is {module.padding_mode!r}"
        if conv_padding(module) is None:
            return "padding differs between two sides"
        if type(module.weight) not in (nn.Parameter, Tensor):
            return f"its weight is a {type(module.weight).__name__}"
    elif isinstance(module, _BatchNorm) and type(module) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"{kind} is not nn.BatchNorm2d or nn.SyncBatchNorm itself"
    return None


def _plan_graph(
    module: nn.Module,
    graph: fx.Graph,
    excluded: Mapping[str, str],
    numbers: count[int],
    sequences: bool,
    low_memory: bool,
) -> tuple[Body | None, list[Run]]:
    reasons = {id(module.get_submodule(name)): why for name, why in excluded.items()}
    swallowed = _skip_identities(module, graph)
    runs = Matcher(module, graph, lambda m: reasons.get(id(m)) or module_reason(m)).runs()
    chosen = [run for run in runs if not run.reason]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if not chosen or (
        sequences and any(r.input in placeholders or r.residual in placeholders for r in chosen)
    ):
        return None, runs
    steps: dict[str, object] = {}
    for run in chosen:
        name = f"_fused_step_{next(numbers)}"
        steps[name] = _replace(graph, run, name)
        swallowed.update(run.module_names())
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        pool = None if str(node.target) in steps else module.get_submodule(str(node.target))
        if type(pool) is nn.MaxPool2d and _takes_deferred(pool, node, steps):
            name = f"_fused_step_{next(numbers)}"
            steps[name] = MaxPool()
            swallowed.add(str(node.target))
            _call_step(graph, node, name, [node.args[0]], [str(node.target)])
    for node in [n for n in graph.nodes if n.op == "call_module" and n.target not in steps]:
        if type(module.get_submodule(str(node.target))) is nn.Linear:
            _replace_head(module, graph, node, steps, swallowed, f"_fused_step_{next(numbers)}")
    _mark_deferring(graph, steps)
    join_stems(graph, steps, lambda: f"_fused_step_{next(numbers)}")
    group_blocks(graph, steps, lambda: f"_fused_step_{next(numbers)}", low_memory=low_memory)
    below = _with_parents(module, swallowed)
    return compile_body(module, graph, steps, (_own(module),), below), runs


def _skip_identities(module: nn.Module, graph: fx.Graph) -> set[str]:
    skipped = set()
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            child = module.get_submodule(str(node.target))
            if type(child) is nn.Identity and module_reason(child) is None:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                skipped.add(str(node.target))
    return skipped


def _replace(graph: fx.Graph, run: Run, name: str) -> object:
    after = BNAct(run.activation.act, run.activation.negative_slope, run.inplace_add)
    step = ConvBNAct(after) if run.conv is not None else after
    modules = [n for n in (run.conv, run.bn) if n is not None]
    names: list[str | None] = [str(n.target) for n in modules]
    if run.conv is not None and run.bn is None:
        names.append(None)
    _call_step(graph, run.last, name, [run.input], names, run.residual)
    for node in reversed(run.nodes[:-1]):
        graph.erase_node(node)
    return step


def _call_step(
    graph: fx.Graph,
    node: fx.Node,
    name: str,
    inputs: list[Any],
    module_names: list[Any],
    residual: fx.Node | None = None,
) -> None:
    """Put ``self.<name>(*inputs, *modules[, residual])`` in the place of a node."""
    with graph.inserting_before(node):
        modules = [
            None if target is None else graph.create_node("get_attr", target)
            for target in module_names
        ]
        args = [*inputs, *modules, *([] if residual is None else [residual])]
        call = graph.create_node("call_module", name, tuple(args))
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _takes_deferred(pool: nn.MaxPool2d, node: fx.Node, steps: Mapping[str, object]) -> bool:
    source = node.args[0] if len(node.args) == 1 else None
    return (
        module_reason(pool) is None
        and not pool.return_indices
        and isinstance(source, fx.Node)
        and str(source.target) in steps
    )


def _replace_head(
    module: nn.Module,
    graph: fx.Graph,
    linear: fx.Node,
    steps: dict[str, object],
    swallowed: set[str],
    name: str,
) -> None:
    nodes = head(module, linear, module_reason)
    if nodes:
        pool, flatten, _ = nodes
        swallowed.update(str(n.target) for n in nodes if n.op == "call_module")
        steps[name] = PoolLinear()
        _call_step(graph, linear, name, [pool.args[0]], [str(pool.target), str(linear.target)])
        graph.erase_node(flatten)
        graph.erase_node(pool)


def _mark_deferring(graph: fx.Graph, steps: Mapping[str, object]) -> None:
    """A step whose only reader is a step that computes from it may leave its activation to that."""
    for node in graph.nodes:
        step = steps.get(str(node.target)) if node.op == "call_module" else None
        after = step.after if isinstance(step, ConvBNAct) else step
        if not isinstance(after, BNAct):
            continue
        readers = [steps.get(str(u.target)) if u.op == "call_module" else None for u in node.users]
        if len(readers) == 1 and isinstance(readers[0], (ConvBNAct, MaxPool)):
            args = next(iter(node.users)).args
            after.defers = args[0] is node and node not in args[1:]


def compile_body(
    module: nn.Module,
    graph: fx.Graph,
    steps: Mapping[str, object],
    opened: tuple[Opened, ...],
    swallowed: Iterable[Swallowed],
) -> Body:
    """Compile a graph that calls steps back to Python."""
    source = graph.python_code("self")
    filename = f"<resnet_fused {type(module).__name__} {next(_sources)}>"
    linecache.cache[filename] = (
        len(source.src), None, source.src.splitlines(keepends=True), filename,
    )  # fmt: skip
    scope = dict(source.globals)
    exec(compile(source.src, filename, "exec"), scope)  # what torch.fx generated just now
    function = scope["forward"]
    # For tracebacks and debuggers, and gone with it: a process may fuse any number of models.
    weakref.finalize(function, linecache.cache.pop, filename, None).atexit = False
    arguments = tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
    paths = tuple(sorted(swallowed, key=lambda entry: entry.path))
    return Body(function, source.src, graph, steps, arguments, opened, paths)


def _own(module: nn.Module) -> Opened:
    attributes = {
        name: value
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str) and name != "training"
    }
    return Opened((), tuple(module._modules), attributes)


def _with_parents(module: nn.Module, names: set[str]) -> list[Swallowed]:
    opened = {name.rpartition(".")[0] for name in names if "." in name}
    return [Swallowed(tuple(n.split(".")), type(module.get_submodule(n))) for n in names | opened]
