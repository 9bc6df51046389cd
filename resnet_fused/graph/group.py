"""Puts steps of a planned graph together: convolutions into blocks, blocks into chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import fx

from resnet_fused.modules.conv_bn_act import ConvBNAct
from resnet_fused.modules.conv_chain import INPUT, OUTSIDE, ConvBlock, ConvChain, wire
from resnet_fused.modules.max_pool import MaxPool
from resnet_fused.modules.stem import Stem

Steps = dict[str, object]  # by the name that the graph calls them by


def group_blocks(
    graph: fx.Graph, steps: Steps, name: Callable[[], str], *, low_memory: bool = False
) -> None:
    """Convolutions that follow one another and read nothing but one value become one step."""
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    while nodes:
        group = _block_at(nodes, steps)
        if len(group) > 1:
            _replace(graph, group, steps, name(), ConvChain((_block(group, steps, low_memory),)))
        nodes = nodes[max(1, len(group)) :]


def join_stems(graph: fx.Graph, steps: Steps, name: Callable[[], str]) -> None:
    """A convolution and the max-pool that follows at once and alone reads it become one step."""
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    for node, reader in pairwise(nodes):
        conv, pool = _step(node, steps), _step(reader, steps)
        if (
            isinstance(conv, ConvBNAct)
            and isinstance(pool, MaxPool)
            and len(node.args) == 3
            and set(node.users) == {reader}
        ):
            step = name()
            with graph.inserting_before(reader):
                call = graph.create_node("call_module", step, (*node.args, reader.args[1]))
            reader.replace_all_uses_with(call)
            for old in (reader, node):
                graph.erase_node(old)
                del steps[str(old.target)]
            steps[step] = Stem(conv, pool)


def join_chains(graph: fx.Graph, steps: Steps, name: Callable[[], str]) -> bool:
    """Blocks that read nothing but what the one before wrote become one step; whether any did."""
    joined = False
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    while nodes:
        group = _chain_at(nodes, steps)
        if len(group) > 1:
            blocks = [block for node in group for block in _blocks(node, steps)]
            _replace(graph, group, steps, name(), ConvChain(tuple(blocks)))
            joined = True
        nodes = nodes[max(1, len(group)) :]
    return joined


def _step(node: fx.Node, steps: Mapping[str, object]) -> object:
    return steps.get(str(node.target)) if node.op == "call_module" else None


def _block_at(nodes: Sequence[fx.Node], steps: Mapping[str, object]) -> list[fx.Node]:
    """The longest block that starts with the first node; empty if that is no convolution's step."""
    group: list[fx.Node] = []
    for node in nodes:
        reads = {node.args[0], *node.args[3:]} if isinstance(_step(node, steps), ConvBNAct) else {}
        if not reads or not set(reads) <= {(group or [node])[0].args[0], *group}:
            break
        group.append(node)
    while len(group) > 1 and not all(set(n.users) <= set(group) for n in group[:-1]):
        group.pop()
    return group


def _block(
    group: Sequence[fx.Node], steps: Mapping[str, object], low_memory: bool = False
) -> ConvBlock:
    place = {group[0].args[0]: INPUT} | {n: OUTSIDE + i for i, n in enumerate(group)}
    convs = [step for n in group if isinstance(step := _step(n, steps), ConvBNAct)]
    wiring = [
        wire(conv, place[n.args[0]], place[n.args[3]] if len(n.args) > 3 else -1)
        for conv, n in zip(convs, group, strict=True)
    ]
    return ConvBlock(tuple(convs), tuple(wiring), low_memory)


def _chain_at(nodes: Sequence[fx.Node], steps: Mapping[str, object]) -> list[fx.Node]:
    """The longest chain that starts with the first node; empty if none does."""
    group = []
    for node in nodes:
        if not _blocks(node, steps):
            break
        group.append(node)
    for i, (node, reader) in enumerate(pairwise(group)):
        if set(node.users) != {reader} or reader.args[0] is not node:
            return group[: i + 1]
    return group


def _blocks(node: fx.Node, steps: Mapping[str, object]) -> tuple[ConvBlock, ...]:
    """What a node adds to a chain."""
    step = _step(node, steps)
    if isinstance(step, ConvChain):
        return step.blocks
    if isinstance(step, ConvBNAct) and len(node.args) == 3:
        return (_block([node], steps),)
    return ()


def _replace(
    graph: fx.Graph, group: Sequence[fx.Node], steps: Steps, name: str, step: ConvChain
) -> None:
    """Put one call in the place of several, of which each hands its modules over after its input.

    A residual among the arguments is a value of the group.
    """
    modules = [
        m
        for n in group
        for m in n.args[1:]
        if m is None or (isinstance(m, fx.Node) and m.op == "get_attr")
    ]
    with graph.inserting_before(group[-1]):
        call = graph.create_node("call_module", name, (group[0].args[0], *modules))
    group[-1].replace_all_uses_with(call)
    for node in reversed(group):
        graph.erase_node(node)
        del steps[str(node.target)]
    steps[name] = step
