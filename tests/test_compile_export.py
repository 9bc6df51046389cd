"""A fused model under torch.compile (one graph, evaluation and training) and torch.export."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import block_zoo
import pytest
import torch
from block_zoo import PreActivation, SequentialBlock
from tolerance import assert_parity, double_model, relative_error
from torch import Tensor, nn

from resnet_fused import explain, functional, fuse


def network() -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(
        block_zoo.unit(3, 8, 3),
        nn.MaxPool2d(2),
        SequentialBlock(8, 8, 1),
        SequentialBlock(8, 12, 2, block_zoo.unit(8, 12, 1, 2, act=False)),
        PreActivation(12, 12),
    )
    return block_zoo.randomise(model)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compile_for_inference(backend: str) -> None:
    plain, x = network().eval(), torch.randn(2, 3, 16, 14)
    fused = fuse(plain)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    with torch.no_grad():
        actual, eager = compiled(x), plain(x)
        assert_parity(actual, eager, double_model(plain)(x.double()), what="compiled")


def test_compiled_model_sees_new_weights() -> None:
    plain, x = network().eval(), torch.randn(2, 3, 16, 14)
    fused = fuse(plain)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        for model in (fused, plain):
            model[2].conv1[0].weight.mul_(2.0)
            model[2].conv1[1].running_var.mul_(3.0)
        assert_parity(
            compiled(x), plain(x), double_model(plain)(x.double()), what="after the change"
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_for_training(backend: str) -> None:
    """Eager's own error is the larger of its errors in the two layouts, as in test_graph.py."""
    plain, x = network().train(), torch.randn(4, 3, 16, 14)
    fused, reference = fuse(plain), double_model(plain)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    other(x.to(memory_format=torch.channels_last)).square().sum().backward()
    outputs = [compiled(x), plain(x), reference(x.double())]
    for output in outputs:
        output.square().sum().backward()
    assert_parity(*outputs, what="output")
    models = (fused, plain, other, reference)
    rows = list(zip(*(m.named_parameters() for m in models), strict=True))
    scale = max(r.grad.abs().max().item() for *_, (_, r) in rows)
    for (name, p), (_, e), (_, o), (_, r) in rows:
        eager = max(e.grad, o.grad, key=lambda g, r=r: relative_error(g, r.grad))
        vanishes = r.grad.abs().max().item() < 1e-9 * scale
        assert_parity(p.grad, eager, r.grad, what=name, scale=scale if vanishes else None)
    for (name, b), e, r in zip(
        fused.named_buffers(), plain.buffers(), reference.buffers(), strict=True
    ):
        assert_parity(b, e, r, what=name)


def test_fuse_after_compile_is_not_needed_and_a_compiled_block_works() -> None:
    """Compiling one block inside a fused model: the rest stays fused."""
    plain, x = network().eval(), torch.randn(2, 3, 16, 14)
    fused = fuse(plain)
    fused[2] = torch.compile(fused[2], backend="eager")
    with torch.no_grad():
        assert_parity(
            fused(x), plain(x), double_model(plain)(x.double()), what="one compiled block"
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic_batch"])
def test_export(dynamic: bool) -> None:
    plain, x = network().eval(), torch.randn(4, 3, 16, 14)
    fused = fuse(plain)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    program = torch.export.export(fused, (x,), dynamic_shapes=shapes)
    assert any("resnet_fused" in str(node.target) for node in program.graph.nodes)
    batch = torch.randn(7, 3, 16, 14) if dynamic else x
    with torch.no_grad():
        actual, eager = program.module()(batch), plain(batch)
        assert_parity(actual, eager, double_model(plain)(batch.double()), what="exported")
    assert set(program.state_dict) <= set(plain.state_dict())


def test_operators_compile_with_dynamic_shapes() -> None:
    weight = torch.randn(6, 4, 3, 3)

    def step(x: Tensor) -> Tensor:
        y = functional.conv_bn_act(x, weight, padding=1, act="relu")
        return functional.bn_act(y, training=True, act="silu")[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 4, 8, 8), (3, 4, 9, 5), (5, 4, 12, 7)):
        x = torch.randn(size)
        assert torch.equal(compiled(x), step(x))


def test_the_model_under_test_is_fused() -> None:
    """Guard of this file: five conv runs and two pre-activation ones."""
    patterns = [e.pattern for e in explain(fuse(network())).entries if e.status == "fused"]
    assert sum(p.startswith("conv-bn") for p in patterns) >= 6
    assert len(patterns) >= 7
