"""Whole blocks and stems on the compiled CUDA kernels: from fuse() through modules to a launch.

On a GPU, or with the emulator's kernels in its place.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_case import DEVICE, HAS_GPU, needs_cuda_kernels
from cuda_conv_case import tf32
from cuda_place import COMPILED, compiled_gpu
from test_functional import noise
from tolerance import assert_mean_parity, assert_parity, double_model
from torch import Tensor, nn
from train_case import results, small, smooth, trained

from resnet_fused import functional, fuse
from resnet_fused.backends import cuda_conv, native, native_cuda, reference
from resnet_fused.backends.triton import support
from resnet_fused.backends.triton.configs import CONFIGS
from resnet_fused.benchmark import gpu_algorithms
from resnet_fused.benchmark.measure import tensor_float_32
from resnet_fused.conv_choice import LIBRARY, ConvProblem
from resnet_fused.modules.batch_norm import update_all_running_statistics
from resnet_fused.modules.max_pool import MaxPool
from resnet_fused.ops import gpu, gpu_choice
from resnet_fused.ops.gpu_choice import Kind

pytestmark = [
    needs_cuda_kernels,
    pytest.mark.usefixtures("poisoned", compiled_gpu.__name__),
]

KINDS = ["basic", "bottleneck", "basic down", "bottleneck down", "stem"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


class Stem(nn.Module):
    """The first layers of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))


def block(kind: str, seed: int = 1) -> nn.Module:
    """With statistics that look trained."""
    if kind == "stem":
        torch.manual_seed(seed)
        module = trained(Stem())
    else:
        module = small(kind, seed)
    return module.to(DEVICE, memory_format=torch.channels_last)


def images(kind: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    size = {"basic": (3, 16, 7, 9), "stem": (2, 3, 22, 19)}.get(kind, (3, 32, 7, 9))
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@EVERY_KIND
def test_evaluation(kind: str, dtype: torch.dtype, compiled_gpu: dict[str, int]) -> None:
    model, x = block(kind).eval().to(dtype), images(kind, dtype)
    with torch.no_grad():
        exact, eager = double_model(model)(x.double()), model(x)
        assert_parity(fuse(model)(x), eager, exact)
    if not HAS_GPU:
        assert compiled_gpu["_finish_conv_"] > 0
        assert compiled_gpu["_max_pool2d"] == (kind == "stem")


def assert_trains_as_eager(draws: list[tuple[nn.Module, Tensor]], what: str) -> None:
    """A step of each model on its images, over all draws, with either way to keep memory."""
    eager = [results(copy.deepcopy(model), x, torch.sin) for model, x in draws]
    exact = [results(double_model(model), x.double(), torch.sin) for model, x in draws]
    for memory in ("default", "low"):
        ours = [results(fuse(model, memory=memory), x, torch.sin) for model, x in draws]
        assert ours[0].keys() == eager[0].keys()
        for name in ours[0]:
            rows = [[r[name] for r in draw] for draw in zip(ours, eager, exact, strict=True)]
            assert_mean_parity(rows, what=f"{what}, {name}")


@EVERY_KIND
def test_training(kind: str, compiled_gpu: dict[str, int]) -> None:
    draws = [(smooth(block(kind, seed)).train(), images(kind, seed=seed)) for seed in (1, 2, 3)]
    assert_trains_as_eager(draws, kind)
    if not HAS_GPU:
        stem = kind == "stem"
        assert compiled_gpu["_update_running_statistics"] == 6  # one of each block
        assert compiled_gpu["_train_pool"] == compiled_gpu["_train_pool_sums"] == 6 * stem


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every convolution runs by the last of the compiled kernels that take it; for what, so far."""
    used: set[str] = set()

    def choose(kind: Kind, input: Tensor, weight: Tensor, *geometry: Any) -> str:
        problem = gpu_choice.conv_problem(input.shape, weight.shape, *geometry)
        arch = support.architecture(0) if HAS_GPU else 90
        names = gpu_choice.admitted(kind, problem, input.dtype, arch)
        compiled = [n for n in names if n in cuda_conv.BY_NAME]
        if compiled:
            used.add(kind)
        return compiled[-1] if compiled else LIBRARY

    monkeypatch.setattr(native_cuda, "available", True)
    if not HAS_GPU:
        monkeypatch.setattr(native_cuda, "code_for", lambda capability: capability)
    monkeypatch.setattr(gpu_choice, "choose", choose)
    monkeypatch.setattr(gpu_choice, "generation", object())
    return used


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@EVERY_KIND
def test_evaluation_by_compiled_convolutions(
    kind: str, dtype: torch.dtype, compiled_gpu: dict[str, int], convolutions: set[str]
) -> None:
    """All but the stem's in float32."""
    with tensor_float_32(True):
        model, x = block(kind).eval().to(dtype), images(kind, dtype)
        with torch.no_grad():
            exact = double_model(model)(x.double())
            rounded = copy.deepcopy(model)
            if (
                dtype == torch.float32
            ):  # with the rounding of its factors, as eager PyTorch on a GPU
                for conv in (m for m in rounded.modules() if isinstance(m, nn.Conv2d)):
                    conv.weight.copy_(tf32(conv.weight))
                    conv.register_forward_pre_hook(lambda _, args: tuple(map(tf32, args)))
            assert_parity(fuse(model)(x), rounded(x), exact)
    expected = set() if kind == "stem" and dtype == torch.float32 else {"inference"}
    assert convolutions == expected
    if not HAS_GPU:
        assert bool(compiled_gpu["_cuda_conv"]) == bool(expected)


@pytest.mark.parametrize("kind", gpu_algorithms._MAKE)
def test_what_tuning_times_agrees(kind: Kind, convolutions: set[str], compiled_gpu: Any) -> None:
    """With the library's result, so that it may be chosen."""
    three = ConvProblem(2, 64, (9, 8), 72, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    for problem in (three, replace(three, kernel=(1, 1), padding=(0, 0))):
        data = gpu_algorithms._Data(problem, torch.float16, torch.device(DEVICE), 0)
        make = functools.partial(gpu_algorithms._MAKE[kind], d=data)
        wanted = gpu_algorithms._tensors(make(LIBRARY)())
        arch = support.architecture(0) if HAS_GPU else 90
        names = gpu_choice.admitted(kind, problem, torch.float16, arch)
        names = tuple(n for n in names if n in cuda_conv.BY_NAME)
        assert names
        for name in names:
            found = gpu_algorithms._tensors(make(name)())
            assert gpu_algorithms.agree(found, wanted, torch.float16), name


@pytest.mark.parametrize("kind", ["stem", "bottleneck"])
def test_channels_of_a_larger_image(
    kind: str, compiled_gpu: dict[str, int], convolutions: set[str]
) -> None:
    """The strides say channels_last, and there are gaps."""
    model, x = block(kind).eval().half(), images(kind, torch.float16)
    wider = torch.cat([x, x[:, :1]], 1).contiguous(memory_format=torch.channels_last)
    cut = wider[:, :-1]
    assert not cut.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(fuse(model)(cut), fuse(model)(x))
    model.train()
    assert_parity(fuse(copy.deepcopy(model))(cut), model(cut), double_model(model)(cut.double()))


def bent(model: nn.Module) -> nn.Module:
    """The same with a leaky ReLU that bends little: rounding that decides a derivative changes it
    by little.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.LeakyReLU(0.9))
        bent(child)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stem"])
def test_training_by_compiled_convolutions(
    kind: str, dtype: torch.dtype, compiled_gpu: dict[str, int], convolutions: set[str]
) -> None:
    draws = [
        (bent(block(kind, seed)).train().to(dtype), images(kind, dtype, seed))
        for seed in (1, 2, 3, 4)
    ]
    assert_trains_as_eager(draws, kind)
    expected = {"train_output", "train_behind_norm", "train_input", "train_tensor_input"}
    if kind == "basic down":  # all that read its input have stride 2
        expected -= {"train_tensor_input"}
    assert convolutions == expected
    if not HAS_GPU:
        assert compiled_gpu["_cuda_train_conv"] and compiled_gpu["_cuda_train_conv_input"]


def test_running_statistics_of_a_bfloat16_model(compiled_gpu: dict[str, int]) -> None:
    """In one launch for a block, blended in float32 and rounded once."""
    model = block("bottleneck").train().to(torch.bfloat16)
    fused, x = fuse(model), images("bottleneck", torch.bfloat16).requires_grad_()
    before = {n: b.clone() for n, b in fused.named_buffers()}
    versions = {n: b._version for n, b in fused.named_buffers()}
    fused(x)
    if not HAS_GPU:
        assert compiled_gpu["_update_running_statistics"] == 1
    model(x)
    for (name, b), plain in zip(fused.named_buffers(), model.buffers(), strict=True):
        assert b._version > versions[name]
        assert not torch.equal(b, before[name])
        assert_parity(b, plain, plain.double(), what=name)


def test_statistics_that_one_launch_does_not_take() -> None:
    """Another momentum, no running statistics, none that are counted: each by itself."""
    norms = [nn.BatchNorm2d(8).to(DEVICE) for _ in range(3)]
    norms[1].momentum = None
    norms[2].num_batches_tracked = None
    plain = copy.deepcopy(norms)
    batches = [noise(4, 8, 3, 3, seed=s).to(DEVICE) for s in range(3)]
    statistics: list[Tensor] = []
    for bn, x in zip(plain, batches, strict=True):
        bn(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        statistics += [mean, var]
    update_all_running_statistics(norms, statistics, [36] * 3)
    for ours, theirs in zip(norms, plain, strict=True):
        for name, b in ours.named_buffers():
            torch.testing.assert_close(b, dict(theirs.named_buffers())[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_max_pool_alone(dtype: torch.dtype, compiled_gpu: dict[str, int]) -> None:
    pools = (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1, dilation=2))
    for pool in pools:
        x = noise(2, 24, 11, 13, dtype=dtype).to(DEVICE, memory_format=torch.channels_last)
        plain = pool if HAS_GPU or dtype != torch.float16 else lambda t, p=pool: p(t.float())
        expected = plain(x)
        y = MaxPool()(x, pool)
        assert torch.equal(y, expected.to(dtype)) and y.stride() == expected.stride()
        leaf = x.clone().requires_grad_()
        out = MaxPool()(leaf, pool)
        assert out.grad_fn is not None and torch.equal(out, y)
        ones = torch.ones_like(out).requires_grad_()
        (grad,) = torch.autograd.grad(out, leaf, ones, create_graph=True)
        wide = x.float().requires_grad_()
        (exact,) = torch.autograd.grad(pool(wide).sum(), wide)
        assert torch.equal(grad.float(), exact)  # whole numbers
        (again,) = torch.autograd.grad(grad, ones, x)  # of what was chosen
        assert torch.equal(again, y)
    for other in (nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(16, 1, 8)):
        before = dict(compiled_gpu)
        x = noise(2, 8, 20, 20).to(DEVICE, memory_format=torch.channels_last).requires_grad_()
        assert torch.equal(MaxPool()(x, other), other(x))
        assert compiled_gpu == before
    x = noise(2, 8, 20, 20).to(DEVICE)
    assert torch.equal(MaxPool()(x, pools[0]), pools[0](x)) and compiled_gpu == before


def test_a_named_triton_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, though the operators are the compiled ones."""
    calls: list[str] = []

    def kernels(file: str) -> Any:
        def recorded(name: str) -> Any:
            def run(*args: Any) -> Any:
                calls.append(name)
                return getattr(reference, name)(*args)

            return run

        names = ("scale_shift_act", "bn_act", "bn_act_backward")
        return SimpleNamespace(**{name: recorded(name) for name in names})

    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(support, "unusable", lambda tensor: None)
    monkeypatch.setattr(gpu, "kernels", kernels)
    x, one = noise(2, 5, 4, 4).to(DEVICE).requires_grad_(), torch.ones(5, device=DEVICE)
    for backend in ("triton", "auto"):
        y, _, _ = functional.bn_act(x, training=True, act="relu", backend=backend)
        functional.scale_shift_act(x.detach(), one, one, backend=backend)
        y.sum().backward()
        assert calls == (["bn_act", "scale_shift_act", "bn_act_backward"] * (backend == "triton"))
        calls.clear()


def test_a_named_compiled_code_runs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though Triton's tiles were measured to be faster for the convolution."""
    monkeypatch.setattr(gpu_choice, "choose", lambda *args: CONFIGS[0].name)
    monkeypatch.setattr(gpu, "kernels", lambda file: pytest.fail(f"Triton runs {file}"))
    x = noise(2, 8, 5, 5).to(DEVICE, memory_format=torch.channels_last)
    weight, shift = noise(8, 8, 3, 3, seed=1).to(DEVICE), torch.ones(8, device=DEVICE)
    if not HAS_GPU:
        monkeypatch.setattr(native, "reason", None)
    y = functional.conv_bn_act(x, weight, None, shift, act="relu", backend="native")
    torch.testing.assert_close(y, torch.relu(F.conv2d(x, weight) + 1))


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_the_compiled_library_comes_first() -> None:
    for name in COMPILED:
        found = torch._C._dispatch_dump(f"resnet_fused::{name}")
        assert "csrc/cuda" in next(line for line in found.splitlines() if "CUDA:" in line)
