"""What only a GPU can show: networks, compiled and exported, streams, several GPUs, cuDNN's fusion.

The operators themselves run the other tests of this backend there (triton_case.py).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_functional import bn_arguments
from tolerance import assert_mean_parity, assert_parity, double_model
from torch import Tensor, nn
from train_case import results, smooth
from triton_case import chosen, needs_gpu

import resnet_fused
from resnet_fused import benchmark, explain, fuse, models
from resnet_fused.backends.triton import support
from resnet_fused.backends.triton.configs import BY_NAME
from resnet_fused.benchmark.measure import saved_bytes
from resnet_fused.ops import gpu_choice

pytestmark = needs_gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
NHWC: Any = {"memory_format": torch.channels_last}
BY = pytest.mark.parametrize("by", ["library", "triton_64x64x64"])


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels run at any size; errors of float32 are float32's; nothing compiled is left over."""
    monkeypatch.setattr(support, "LEAST_BLOCK_BYTES", 0)
    monkeypatch.setattr(support, "LEAST_STEP_BYTES", 0)
    cache = torch._functorch.config.patch(enable_autograd_cache=False)  # knows no choices
    with benchmark.tensor_float_32(False), cache:
        yield


def network(name: str = "resnet18", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = getattr(models, name)(num_classes=10)
    benchmark.randomise_batch_norm(model, torch.randn(4, 3, 64, 64))
    return model.to("cuda", dtype, **NHWC)


def images(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 64, 64).to("cuda", dtype, **NHWC)


@BY
@DTYPES
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_evaluation(
    name: str, dtype: torch.dtype, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(name, dtype).eval(), images(dtype=dtype)
    with torch.no_grad(), chosen(monkeypatch, by):
        assert_parity(fuse(model)(x), model(x), double_model(model)(x.double()))


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training(name: str, memory: str) -> None:
    draws = [(smooth(network(name)).train(), images(8)) for _ in range(3)]
    ours = [results(fuse(model, memory=memory), x, torch.sin) for model, x in draws]
    eager = [results(fuse(m, filter_fn=lambda *_: False), x, torch.sin) for m, x in draws]
    exact = [results(double_model(model), x.double(), torch.sin) for model, x in draws]
    for key in ours[0]:
        rows = [[r[key] for r in draw] for draw in zip(ours, eager, exact, strict=True)]
        assert_mean_parity(rows, what=f"{name}, {key}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["library", "triton_64x64x64"])
def test_training_under_autocast(
    by: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss goes down as eager's does, and the first output is as exact."""
    base, x = network("resnet18").train(), images(16)
    labels = torch.randint(0, 10, (16,), device="cuda")
    losses = []
    for model in (fuse(base), fuse(base, filter_fn=lambda *_: False)):
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        run: list[float] = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype), chosen(monkeypatch, by):
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
    assert losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("by", ["library", "triton_64x64x64"])
def test_compile(by: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model, x = network(dtype=torch.float16).eval(), images(dtype=torch.float16)
    if mode != "default":  # a whole network is tuned for minutes
        model = model.layer2[0]
        x = torch.randn(4, 64, 16, 16).to("cuda", torch.float16, **NHWC)
    with torch.no_grad(), chosen(monkeypatch, by):
        compiled = torch.compile(fuse(model), fullgraph=True, mode=mode)
        assert_parity(compiled(x), model(x), double_model(model)(x.double()))


def test_compiled_training() -> None:
    torch.compiler.reset()
    model, x = smooth(network()).train(), images(8)
    compiled = torch.compile(fuse(model), fullgraph=True)
    exact = double_model(model)
    eager = fuse(model, filter_fn=lambda *_: False)
    rows = [m(i).detach() for m, i in ((compiled, x), (eager, x), (exact, x.double()))]
    assert_parity(*rows)


@pytest.mark.parametrize("by", ["library", "triton_64x64x64"])
def test_export_and_package(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(dtype=torch.float16).eval(), images(dtype=torch.float16)
    with torch.no_grad(), chosen(monkeypatch, by):
        program = torch.export.export(fuse(model), (x,))
        assert any("resnet_fused.conv_bn_act" in str(n.target) for n in program.graph.nodes)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        assert_parity(loaded(x), model(x), double_model(model)(x.double()))


def test_own_streams_and_threads() -> None:
    model, x = fuse(network().eval()), images()
    with torch.no_grad():
        wanted = model(x)
        torch.cuda.synchronize()
        results: list[Tensor] = []

        def run() -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    y = model(x)
                torch.cuda.current_stream().synchronize()
                results.append(y)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4 and all(torch.equal(r, wanted) for r in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_another_gpu_than_the_current_one() -> None:
    model, x = network().eval(), images()
    fused = fuse(model).to("cuda:1")
    with torch.no_grad():
        assert torch.cuda.current_device() == 0
        assert torch.allclose(fused(x.to("cuda:1")).cpu(), model(x).cpu(), atol=1e-3)


def test_tuning_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fastest here is chosen, admitted and right."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    gpu_choice.forget_measured()
    model, x = network(dtype=torch.float16).eval(), images(dtype=torch.float16)
    try:
        for training in (False, True):
            tuned = benchmark.tune(model, x, repeats=1, progress=lambda *_: None, training=training)
            assert tuned
            assert all(t.chosen in t.milliseconds and "library" in t.milliseconds for t in tuned)
        with torch.no_grad():
            assert_parity(fuse(model)(x), model(x), double_model(model)(x.double()))
        named = {e.backend for e in explain(model, x).entries}
        known = {"library conv + one triton pass", *BY_NAME}
        assert all(any(k in text for k in known) for text in named)
    finally:
        monkeypatch.undo()
        gpu_choice.forget_measured()


def test_what_is_kept_for_backward() -> None:
    model, x = network("resnet50").train(), images(8).requires_grad_()
    eager = saved_bytes(model, lambda: model(x))
    for memory, ratio in (("default", 0.85), ("low", 0.6)):
        fused = fuse(model, memory=memory)
        assert saved_bytes(fused, lambda m=fused: m(x)) <= ratio * eager


def test_channels_without_a_vector_width() -> None:
    args = [
        a if a is None else a.cuda()
        for a in bn_arguments((3, 7, 9, 5), torch.bfloat16, "nhwc", True)
    ]
    ours = resnet_fused.functional.scale_shift_act(*args, act="relu", backend="triton")
    plain = resnet_fused.functional.scale_shift_act(*args, act="relu", backend="reference")
    assert torch.equal(ours, plain)
