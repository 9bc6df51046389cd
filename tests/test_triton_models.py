"""Whole blocks on Triton's kernels: the way from fuse() through modules and operators to a launch.

In evaluation and training, with every convolution by the library and one pass, and with every one
that can be by a kernel of ours; statistics, gradients and memory as eager PyTorch has them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerance import assert_mean_parity, assert_parity, double_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from train_case import results, small, smooth
from triton_case import DEVICE, chosen, gpus_place, launches, needs_kernels

from resnet_fused import fuse, unfuse
from resnet_fused.backends.triton import support
from resnet_fused.backends.triton.configs import Config
from resnet_fused.benchmark.measure import saved_bytes
from resnet_fused.modules import conv_bn_act, conv_on_gpu
from resnet_fused.modules.conv_bn_act import records_on_gpu

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned", gpus_place.__name__)]

SMALL = Config(32, 32, 32, 4, 3)
KINDS = ["basic", "bottleneck", "basic down", "bottleneck down"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BY = pytest.mark.parametrize("by", ["library", SMALL], ids=["library", "triton"])


def block(kind: str, seed: int = 1) -> nn.Module:
    return small(kind, seed).to(DEVICE, memory_format=torch.channels_last)


def images(kind: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    channels = 16 if kind == "basic" else 32
    x = torch.randn(3, channels, 7, 9, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype, memory_format=torch.channels_last)


@BY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@EVERY_KIND
def test_evaluation(kind: str, dtype: torch.dtype, by: Any, monkeypatch: Any) -> None:
    model, x = block(kind).eval().to(dtype), images(kind, dtype)
    with torch.no_grad():
        exact, eager = double_model(model)(x.double()), model(x)
        with chosen(monkeypatch, by):
            assert_parity(fuse(model)(x), eager, exact)


@BY
@EVERY_KIND
def test_training(kind: str, by: Any, monkeypatch: Any) -> None:
    draws = [(smooth(block(kind, seed)).train(), images(kind, seed=seed)) for seed in (1, 2, 3)]
    eager = [results(copy.deepcopy(model), x, torch.sin) for model, x in draws]
    exact = [results(double_model(model), x.double(), torch.sin) for model, x in draws]
    for memory in ("default", "low"):
        with chosen(monkeypatch, by):
            ours = [results(fuse(model, memory=memory), x, torch.sin) for model, x in draws]
        assert ours[0].keys() == eager[0].keys()
        for name in ours[0]:
            rows = [[r[name] for r in draw] for draw in zip(ours, eager, exact, strict=True)]
            assert_mean_parity(rows, what=f"{kind}, {name}")


@BY
def test_training_under_autocast(by: Any, monkeypatch: Any) -> None:
    kind = "bottleneck"
    model, x = smooth(block(kind)).train(), images(kind)
    fused, exact = fuse(model), double_model(model)

    def step(model: nn.Module) -> dict[str, Tensor]:
        def weighed(y: Tensor) -> Tensor:
            return torch.sin(y.float())

        with torch.autocast(DEVICE, torch.float16):
            return results(model, x, weighed)

    with chosen(monkeypatch, by):
        ours = step(fused)
    eager, truth = step(copy.deepcopy(model)), results(exact, x.double(), torch.sin)
    assert ours["y"].dtype == eager["y"].dtype == torch.float16
    assert all(g.dtype == eager[n].dtype for n, g in ours.items())
    for name in ("y", "x", "conv2.weight", "bn1.weight", "bn3.running_var"):
        assert_parity(ours[name], eager[name], truth[name], what=name)


def test_evaluation_under_autocast(monkeypatch: Any) -> None:
    model, x = block("basic").eval(), images("basic", torch.float16)
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16), chosen(monkeypatch, SMALL):
        with launches(monkeypatch) as names:
            ours = fuse(model)(x)
        eager = model(x)
    assert names == ["conv_kernel"] * 2
    with torch.no_grad():
        assert_parity(ours, eager, double_model(model)(x.double()))


def test_what_is_launched(monkeypatch: Any) -> None:
    """A step in evaluation is one launch; in training nothing runs twice that need not."""
    model, x = block("bottleneck"), images("bottleneck")
    fused = fuse(model)
    with torch.no_grad():
        for by, kernel in (("library", "scale_shift_act_kernel"), (SMALL, "conv_kernel")):
            with chosen(monkeypatch, by), launches(monkeypatch) as names:
                fused.eval()(x)
            assert names == [kernel] * 3
    x.requires_grad_()
    with chosen(monkeypatch, SMALL), launches(monkeypatch) as names:
        y = fused.train()(x)
    assert names == ["conv_kernel", "combine_statistics_kernel"] * 3 + ["scale_shift_act_kernel"]
    with chosen(monkeypatch, SMALL), launches(monkeypatch) as names:
        y.sum().backward()
    last = ["partial_sums_kernel", "combine_sums_kernel"]
    each = ["grad_input_kernel", "conv_kernel", "combine_sums_kernel", "scale_shift_act_kernel"]
    assert names == [*last, *each, *each, "grad_input_kernel"]


def test_new_weights_are_noticed(monkeypatch: Any) -> None:
    model, other, x = block("basic").eval(), block("basic").eval(), images("basic")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
        fused = fuse(model)
        for by in ("library", SMALL):
            with chosen(monkeypatch, by):
                fused(x)
                fused.load_state_dict(other.state_dict())
                assert torch.allclose(fused(x), other(x), atol=1e-5)
                fused.load_state_dict(model.state_dict())


@pytest.mark.parametrize(("memory", "ratio"), [("default", 0.85), ("low", 0.55)])
def test_what_is_kept_for_backward(memory: str, ratio: float) -> None:
    model, x = block("bottleneck").train(), images("bottleneck").requires_grad_()
    fused = fuse(model, memory=memory)
    ours, eager = (saved_bytes(m, lambda m=m: m(x)) for m in (fused, model))
    own = x.numel() * x.element_size()  # the input is kept by everyone
    assert ours - own <= ratio * (eager - own)


def test_contiguous_models_stay_contiguous() -> None:
    model = block("basic").to(memory_format=torch.contiguous_format).eval()
    x = images("basic").contiguous()
    with torch.no_grad():
        y = fuse(model)(x)
        assert y.is_contiguous()
        assert_parity(y, model(x), double_model(model)(x.double()))


def test_float64_runs_as_eager() -> None:
    model, x = block("basic").double(), images("basic").double()
    assert torch.equal(fuse(model)(x), copy.deepcopy(model)(x))


@EVERY_KIND
def test_small_activations_train_as_eager(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(support, "LEAST_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(support, "LEAST_STEP_BYTES", 1 << 20)
    model, x = smooth(block(kind)).train(), images(kind)
    with launches(monkeypatch) as names:
        ours = results(fuse(model), x, torch.sin)
    eager = results(copy.deepcopy(model), x, torch.sin)
    assert names == [] and all(torch.equal(ours[n], eager[n]) for n in eager)


@BY
def test_operators_are_seen_by_a_dispatch_mode(by: Any, monkeypatch: Any) -> None:
    """As capture needs them to be: it keeps alive what they read."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model, x = block("basic").eval(), images("basic")
    fused = fuse(model)
    with torch.no_grad(), chosen(monkeypatch, by):
        alone = fused(x)
        with Watch():
            watched = fused(x)
    assert torch.equal(alone, watched)
    last = "_finish_conv_" if by == "library" else "conv_bn_act"
    assert seen.count(f"resnet_fused::{last}") == 2


@EVERY_KIND
def test_statistics_of_eager_batches_are_noticed(kind: str, monkeypatch: Any) -> None:
    """Its kernel leaves running statistics at the same version."""
    monkeypatch.setattr(support, "LEAST_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(support, "LEAST_STEP_BYTES", 1 << 20)
    model, x = block(kind), images(kind)
    fused = fuse(model)
    with torch.no_grad():
        fused.eval()(x)
    for _ in range(5):
        fused.train()(3 * x + 1)
    with torch.no_grad():
        assert torch.allclose(fused.eval()(x), unfuse(fused).eval()(x), atol=1e-4)


def test_ranks_of_any_size_gather_the_same(monkeypatch: Any) -> None:
    """Where statistics go over processes, no size decides who gathers them."""
    monkeypatch.setattr(support, "LEAST_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(support, "LEAST_STEP_BYTES", 1 << 20)
    model, x = block("basic").train(), images("basic")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert records_on_gpu(x, *norms)
    group = object()
    monkeypatch.setattr(conv_bn_act, "process_group", lambda bn: group if bn is norms[-1] else None)
    assert records_on_gpu(x, norms[0]) and not records_on_gpu(x, *norms)


def test_a_residual_is_added_as_it_was_under_autocast() -> None:
    model, x = block("basic").eval(), images("basic").float()
    fused = fuse(model)
    with torch.autocast(DEVICE, torch.float16):
        with torch.no_grad():
            assert fused(x).dtype == model(x).dtype
        ours, eager = fused.train()(x), copy.deepcopy(model).train()(x)
    assert ours.dtype == eager.dtype


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 8, 1, 1)])
def test_layouts_that_are_both_stay_what_eager_takes_them_for(shape: tuple[int, ...]) -> None:
    """One channel, or one pixel, is contiguous and channels_last at once."""
    channels = shape[1]
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    ).eval().to(DEVICE)  # fmt: skip
    x = torch.randn(shape).to(DEVICE)
    with torch.no_grad():
        assert fuse(model)(x).stride() == model(x).stride()


def test_several_shapes_are_remembered(monkeypatch: Any) -> None:
    model, x = block("basic").eval(), images("basic")
    fused = fuse(model)
    folds: list[object] = []
    fold = conv_on_gpu._fold
    monkeypatch.setattr(conv_on_gpu, "_fold", lambda *a: folds.append(a) or fold(*a))
    with torch.no_grad():
        for _ in range(3):
            for images_ in (x, x[:2], x[:, :, :5].contiguous(memory_format=torch.channels_last)):
                assert torch.allclose(fused(images_), model(images_), atol=1e-5)
    assert len(folds) == 2  # one for each convolution


def test_a_plain_tensor_in_a_parameters_place(monkeypatch: Any) -> None:
    """As FSDP1 has it while forward runs."""
    model, x = block("basic").eval(), images("basic")
    fused = fuse(model)
    conv = fused.get_submodule("conv1")
    weight = conv._parameters.pop("weight")
    assert weight is not None
    conv.weight = weight.detach()  # type: ignore[assignment]
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_forward_mode_derivatives_run_unfused() -> None:
    model, x = block("basic").eval(), images("basic")
    fused, tangent = fuse(model), torch.randn_like(x)
    tangents = []
    for each in (fused, model):
        with torch.no_grad(), forward_ad.dual_level():
            y = each(forward_ad.make_dual(x, tangent))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0] is not None and torch.allclose(tangents[0], tangents[1], atol=1e-5)
