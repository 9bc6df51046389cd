"""A module's evaluation with the forwards of its fused children in it: one graph for a network.

Calling each of a network's blocks as a module costs more than their convolutions' launch, above all
when the weights of a block have just pushed the interpreter out of the cache. Opened, the blocks
that follow one another are one step. Every module that was opened is looked at before each call; if
one has changed (a hook, another child, training), the plans of the single modules run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count, takewhile
from typing import Any

from torch import fx, nn

from resnet_fused.graph.group import join_chains
from resnet_fused.graph.plan import EVALUATION, Body, Opened, Plan, Swallowed, compile_body, plan_of
from resnet_fused.graph.trace import has_hooks, is_plain_sequence


def open_children(module: nn.Module, plan: Plan) -> Plan:
    """A plan with the body that contains the children's; the same plan if that gains nothing."""
    body = plan.bodies.get(EVALUATION)
    if body is None:
        return plan
    opener = _Opener(module)
    inputs = [opener.graph.placeholder(name) for name in body.arguments]
    opener.graph.output(opener.copy(body.graph, body.steps, (), inputs))
    if not join_chains(opener.graph, opener.steps, opener.name):
        return plan
    _bind(module, opener.graph, opener.steps)
    opened = (*body.opened, *opener.opened)
    paths = {path for path, *_ in body.swallowed} | opener.swallowed
    found = [(path, module.get_submodule(".".join(path))) for path in paths]
    swallowed = [Swallowed(path, type(m), m) for path, m in found]
    whole = compile_body(module, opener.graph, opener.steps, opened, swallowed)
    return replace(plan, whole=whole)


@dataclass(frozen=True, slots=True)
class Bound:
    """A step with its modules: to find them by name again takes longer than the step's other work.

    ``Body.fits`` has seen that they are still the present ones.
    """

    step: Any
    modules: tuple[nn.Module | None, ...]

    def __call__(self, input: Any, *values: Any) -> Any:
        return self.step(input, *self.modules, *values)


def _bind(module: nn.Module, graph: fx.Graph, steps: dict[str, object]) -> None:
    """Hand every step its modules now. They stand between its input and its other values."""
    for node in [n for n in graph.nodes if n.op == "call_module" and n.target in steps]:
        input, *rest = node.args
        modules = tuple(takewhile(_is_module, (_attribute(module, a) for a in rest)))
        steps[node.target] = Bound(steps[node.target], modules)
        node.args = (input, *rest[len(modules) :])
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _attribute(module: nn.Module, argument: Any) -> Any:
    """What an argument of a step names; the argument itself if it is a value of the graph."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return argument
    return reduce(getattr, str(argument.target).split("."), module)


def _is_module(value: Any) -> bool:
    return value is None or isinstance(value, nn.Module)


class _Opener:
    """Copies graphs into one, those of children in the place of their calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.steps: dict[str, object] = {}
        self.opened: list[Opened] = []
        self.swallowed: set[tuple[str, ...]] = set()
        self._numbers = count()

    def name(self) -> str:
        """A new step's name, none of the plan's own."""
        return f"_fused_whole_step_{next(self._numbers)}"

    def copy(
        self, source: fx.Graph, steps: Any, path: tuple[str, ...], inputs: Sequence[Any]
    ) -> Any:
        """Copy the graph of the module at a path; its value for these inputs."""
        values: dict[fx.Node, Any] = {}
        waiting = iter(inputs)
        for node in source.nodes:
            if node.op == "placeholder":
                values[node] = next(waiting)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            elif node.op == "call_module" and str(node.target) in steps:
                values[node] = self._copy_node(node, values, target=self.name())
                self.steps[values[node].target] = steps[str(node.target)]
            elif node.op == "call_module":
                values[node] = self._call(node, path, values)
            else:
                values[node] = self._copy_node(node, values, path=path)
        raise AssertionError("a graph without an output")

    def _copy_node(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        path: tuple[str, ...] = (),
        target: str = "",
    ) -> fx.Node:
        copied = self.graph.node_copy(node, values.__getitem__)
        if node.op in ("call_module", "get_attr"):
            copied.target = target or ".".join((*path, str(node.target)))
        return copied

    def _call(self, node: fx.Node, path: tuple[str, ...], values: dict[fx.Node, Any]) -> Any:
        """A child's value: of its graph if it has one, else of a call."""
        below = (*path, *str(node.target).split("."))
        child = self.module.get_submodule(".".join(below))
        inputs = [fx.node.map_arg(a, values.__getitem__) for a in node.args]
        body = None if node.kwargs else _body(child)
        if body is not None and len(inputs) == len(body.arguments):
            self._note(child, below, {**body.opened[0].attributes, "_fused_plan": plan_of(child)})
            self.swallowed.update((*below, *inner) for inner, *_ in body.swallowed)
            return self.copy(body.graph, body.steps, below, inputs)
        if _is_sequence_of_fused(child) and len(inputs) == 1 and not node.kwargs:
            self._note(child, below, {})
            return self.copy(_sequence(child), {}, below, inputs)
        return self._copy_node(node, values, path=path)

    def _note(self, child: nn.Module, path: tuple[str, ...], attributes: dict[str, object]) -> None:
        attributes = {**attributes, "training": False}
        self.opened.append(Opened(path, tuple(child._modules), attributes))
        self.swallowed.add(path)


def _body(module: nn.Module) -> Body | None:
    plan = plan_of(module)
    unfit = plan is None or has_hooks(module) or "forward" in vars(module)
    return None if unfit else plan.bodies.get(EVALUATION)  # type: ignore[union-attr]


def _is_sequence_of_fused(module: nn.Module) -> bool:
    return is_plain_sequence(module) and any(
        _body(m) is not None or _is_sequence_of_fused(m) for m in module.children()
    )


def _sequence(module: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph
