"""Finds the runs of a traced forward: conv → BN → (+) → activation, and BN → (+) → activation.

A run is a chain in which every value but the last has exactly one reader. A candidate that may not
be fused is returned with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused.graph.patterns import Activation, activation, addition, is_fresh, writes

ModuleReason = Callable[[nn.Module], "str | None"]


@dataclass
class Run:
    """A chain of nodes that one step will replace, or a candidate that stays and why."""

    conv: fx.Node | None
    bn: fx.Node | None
    nodes: list[fx.Node]
    add: fx.Node | None = None
    inplace_add: bool = False
    activation: Activation = field(default_factory=lambda: Activation("none"))
    pattern: str = ""
    reason: str = ""

    @property
    def anchor(self) -> fx.Node:
        """The run's first module."""
        return self.nodes[0]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def input(self) -> fx.Node:
        """What the run reads, as the graph stands now."""
        source = self.anchor.args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def residual(self) -> fx.Node | None:
        """The other operand of the run's addition, as the graph stands now."""
        if self.add is None:
            return None
        own = self.nodes[self.nodes.index(self.add) - 1]
        return next(n for n in self.add.all_input_nodes if n is not own)

    def module_names(self) -> tuple[str, ...]:
        """Names of the modules that the run swallows, relative to the traced module."""
        return tuple(str(n.target) for n in self.nodes if n.op == "call_module")


class Matcher:
    """Matches one graph; `module_reason` says why a conv or BN may not be touched, or None."""

    def __init__(self, root: nn.Module, graph: fx.Graph, module_reason: ModuleReason) -> None:
        self.root = root
        self.graph = graph
        self.module_reason = module_reason
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.taken: set[fx.Node] = set()

    def runs(self) -> list[Run]:
        """All candidates in the order of the forward; the later of two claims an addition."""
        found = []
        for node in reversed(self.graph.nodes):
            if node in self.taken:
                continue
            module = self.module(node)
            if isinstance(module, nn.Conv2d):
                run = self._run(node)
            elif isinstance(module, _BatchNorm):
                if self._follows_conv(node):
                    continue  # the conv's run takes it, or says why not
                run = self._run(node)
            else:
                continue
            found.append(run)
            if not run.reason:
                self.taken.update(run.nodes)
        return found[::-1]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        if node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def _follows_conv(self, bn: fx.Node) -> bool:
        source = bn.args[0] if bn.args else None
        return (
            isinstance(source, fx.Node)
            and isinstance(self.module(source), nn.Conv2d)
            and len(source.users) == 1
            and self._refusal(source) is None
        )

    def _refusal(self, node: fx.Node) -> str | None:
        module = self.module(node)
        assert module is not None
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return "called with more than its input"
        if sum(self.module(n) is module for n in self.graph.nodes) > 1:
            return "it is used at several places of this forward"
        return self.module_reason(module)

    def _run(self, first: fx.Node) -> Run:
        is_conv = isinstance(self.module(first), nn.Conv2d)
        run = Run(conv=first if is_conv else None, bn=None if is_conv else first, nodes=[first])
        refusal = self._refusal(first)
        if refusal is not None:
            run.reason = refusal
            return run
        if is_conv:
            self._extend_by_bn(run)
        self._extend_by_addition(run)
        self._extend_by_activation(run)
        self._name(run)
        run.reason = self._why_not(run)
        return run

    def _reader(self, run: Run) -> fx.Node | None:
        """The only reader of the run's value so far, if it is not in another run."""
        readers = list(run.last.users)
        return readers[0] if len(readers) == 1 and readers[0] not in self.taken else None

    def _extend_by_bn(self, run: Run) -> None:
        reader = self._reader(run)
        if reader is None or not isinstance(self.module(reader), _BatchNorm):
            return
        if self._refusal(reader) is None:
            run.bn = reader
            run.nodes.append(reader)

    def _extend_by_addition(self, run: Run) -> None:
        reader = self._reader(run)
        add = None if reader is None else addition(reader)
        if reader is None or add is None or add.left is add.right:
            return
        if add.inplace and add.left is not run.last:
            return  # writes into the other operand, which eager PyTorch's caller can see
        other = add.right if add.left is run.last else add.left
        if run.bn is None and isinstance(self.module(other), _BatchNorm):
            return  # the other branch has the batch norm to fuse it with
        run.add = reader
        run.inplace_add = add.inplace
        run.nodes.append(reader)

    def _extend_by_activation(self, run: Run) -> None:
        reader = self._reader(run)
        if reader is None or reader.args[:1] != (run.last,):
            return
        module = self.module(reader)
        if module is not None and self.module_reason(module) is not None:
            return
        found = activation(reader, module)
        if found is not None:
            run.activation = found
            run.nodes.append(reader)

    def _name(self, run: Run) -> None:
        parts = [
            "conv" if run.conv else "",
            "bn" if run.bn else "",
            "add" if run.add else "",
            run.activation.act if run.activation.act != "none" else "",
        ]
        run.pattern = "-".join(p for p in parts if p)

    def _why_not(self, run: Run) -> str:
        if len(run.nodes) == 1:
            if len(run.last.users) > 1:
                return "its output has a second reader"
            for follower in run.last.users:
                if isinstance(self.module(follower), _BatchNorm):
                    return f"its batch norm: {self._refusal(follower)}"
            return "nothing that can be fused reads its output"
        start = self.order[run.anchor]
        residual = run.residual
        for node in self._writers(run):
            targets = self._memory(node.all_input_nodes)
            if self.order[node] > start and targets & self._memory([run.input]):
                return f"{node.name} writes to its input in between"
            if run.add is None or residual is None or self.order[node] < self.order[run.add]:
                continue
            if targets & self._memory([residual]):
                return f"{node.name} writes to its residual in between"
        return ""

    def _writers(self, run: Run) -> Iterable[fx.Node]:
        """Nodes within the run's stretch, but not of the run, that write to their arguments."""
        for node in list(self.graph.nodes)[self.order[run.anchor] : self.order[run.last]]:
            if node not in run.nodes and writes(node, self.module(node)):
                yield node

    def _memory(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The values whose memory these nodes may share, followed through views."""
        origins: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node in origins:
                continue
            origins.add(node)
            if node.op != "placeholder" and not is_fresh(node, self.module(node)):
                todo.extend(node.all_input_nodes)
        return origins
