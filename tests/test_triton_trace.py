"""What torch.compile and torch.export see of the operators on a GPU: traced here without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused.backends.triton import support
from resnet_fused.ops import gpu_choice

triton = pytest.importorskip("triton")
if hasattr(triton, "knobs") and triton.knobs.runtime.interpret:
    pytest.skip("the interpreter's kernels cannot be traced", allow_module_level=True)

TILES = "triton_64x64x64"


class Target:
    """A driver that says which chip there would be: kernels are lowered for it, not run."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A pretended GPU, whose tensors have no data."""
    monkeypatch.setattr(support, "_unsupported", lambda device: None)
    monkeypatch.setattr(support, "architecture", lambda device: 90)
    monkeypatch.setattr(gpu_choice, "_measured", lambda device: {})
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", Target())
    with FakeTensorMode() as mode:
        yield mode


def step(x: Tensor, weight: Tensor, vector: Tensor) -> tuple[Tensor]:
    ops = torch.ops.resnet_fused
    y = ops.conv_bn_act(
        x, weight, vector, vector, x, [1, 1], [1, 1], [1, 1], 1, "relu", 0.0
    )  # fmt: skip
    return (ops.scale_shift_act(y, vector, vector, None, "relu", 0.0),)


def targets() -> list[str]:
    """What the graph of a step calls, traced as Inductor gets it."""
    x = torch.empty(2, 64, 8, 8, device="cuda", dtype=torch.float16)
    weight = torch.empty(64, 64, 3, 3, device="cuda", dtype=torch.float16)
    vector = torch.empty(64, device="cuda")
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        graph = aot_export_joint_simple(step, (x, weight, vector), trace_joint=False)
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def test_the_library_is_taken_apart(hopper: FakeTensorMode) -> None:
    """Inductor fuses what follows a convolution itself: it must see the formula."""
    found = targets()
    assert found[0] == "aten.convolution.default" and found.count("aten.relu.default") == 2
    assert not any("resnet_fused" in t for t in found)


def test_a_measured_kernel_is_inlined(
    hopper: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_choice, "choose", lambda *args: TILES)
    found = targets()
    assert any("triton_kernel_wrapper" in t.lower() or "TritonKernel" in t for t in found)
    assert "aten.convolution.default" not in found


def test_export_keeps_the_operators(hopper: FakeTensorMode) -> None:
    """An exported program is for any machine."""

    class Step(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, vector: Tensor) -> tuple[Tensor]:
            return step(x, weight, vector)

    x = torch.empty(2, 64, 8, 8, device="cuda")
    weight, vector = torch.empty(64, 64, 3, 3, device="cuda"), torch.empty(64, device="cuda")
    with hopper:
        program = torch.export.export(Step(), (x, weight, vector))
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls == ["resnet_fused.conv_bn_act.default", "resnet_fused.scale_shift_act.default"]


def test_symbolic_shapes_take_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choice, "_measured", lambda device: {"something": TILES})
    weight = torch.empty(8, 8, 1, 1)
    seen: list[str] = []

    def function(x: Tensor) -> Tensor:
        seen.append(gpu_choice.choose("inference", x, weight, [1, 1], [0, 0], [1, 1], 1))
        return x + 1

    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(function, tracing_mode="symbolic")(torch.empty(3, 8, 5, 7))
    assert seen == [gpu_choice.LIBRARY]
