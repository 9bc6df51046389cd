"""A residual block in training as one autograd function: gradients, memory, exactness."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerance import assert_parity
from torch import Tensor, nn
from train_case import big, images, results, smooth

import resnet_fused
from resnet_fused import models
from resnet_fused.backends import native_conv
from resnet_fused.ops import train_block, train_conv
from resnet_fused.ops.train_block import TrainBlock, TrainStep

INPUT = 0


def step(input: int, residual: int = -1, **options: Any) -> TrainStep:
    defaults: dict[str, Any] = {
        "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "eps": 1e-3,
        "act": "relu", "negative_slope": 0.1,
    }  # fmt: skip
    return TrainStep(input, residual, train_conv.ConvNorm(**{**defaults, **options}))


POINT: dict[str, Any] = {"padding": (0, 0)}
HALF: dict[str, Any] = {"stride": (2, 2)}

# name → steps, and (outputs, inputs / groups, kernel) of each
BLOCKS: dict[str, tuple[list[TrainStep], list[tuple[int, int, int]]]] = {
    "basic": ([step(0), step(2, 0)], [(4, 4, 3), (4, 4, 3)]),
    "projection": (
        [step(0, **HALF), step(0, act="none", **POINT, **HALF), step(2, 3)],
        [(6, 4, 3), (6, 4, 1), (6, 6, 3)],
    ),
    "bottleneck": (
        [step(0, **POINT), step(2, **HALF), step(0, act="none", **POINT, **HALF),
         step(3, 4, **POINT)],
        [(2, 4, 1), (2, 2, 3), (8, 4, 1), (8, 2, 1)],
    ),
    "plain": ([step(0), step(2), step(3, act="none")], [(3, 4, 3), (5, 3, 3), (4, 5, 3)]),
    "dilated, grouped": (
        [step(0, groups=2), step(2, 0, padding=(2, 2), dilation=(2, 2))],
        [(4, 2, 3), (4, 4, 3)],
    ),
    "leaky": ([step(0, act="leaky_relu"), step(2, 0, act="leaky_relu")], [(4, 4, 3), (4, 4, 3)]),
    "silu": ([step(0, act="silu"), step(2, 0, act="silu")], [(4, 4, 3), (4, 4, 3)]),
    "none": ([step(0, act="none"), step(2, 0, act="none")], [(4, 4, 3), (4, 4, 3)]),
    # Values that several read: an activation as a residual, and one read by two convolutions.
    "dense": ([step(0), step(2, 2), step(2, 3)], [(4, 4, 3), (4, 4, 3), (4, 4, 3)]),
    "twice": ([step(0), step(2, **POINT), step(2, 3)], [(4, 4, 3), (4, 4, 1), (4, 4, 3)]),
}  # fmt: skip


def parameters(
    shapes: list[tuple[int, int, int]], *, bias: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for outputs, inputs, kernel in shapes:
        weight = torch.randn(outputs, inputs, kernel, kernel, dtype=dtype)
        vectors = [torch.rand(outputs, dtype=dtype) + 0.5 for _ in range(2)]
        own = torch.randn(outputs, dtype=dtype) if bias else None
        found += [weight, own, vectors[0], vectors[1] - 0.75]
    return [None if t is None else t.requires_grad_() for t in found]


@pytest.mark.parametrize("low_memory", [False, True], ids=["default", "low"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck(name: str, bias: bool, low_memory: bool) -> None:
    steps, shapes = BLOCKS[name]
    block = TrainBlock(tuple(steps), low_memory)
    values = parameters(shapes, bias=bias)
    given = [t for t in values if t is not None]
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        return block(x, [None if t is None else next(left) for t in values])[0]

    assert torch.autograd.gradcheck(run, (x, *given), nondet_tol=0.0)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The algorithms that the kernels were called with."""
    if native_conv.unusable(torch.float32):
        pytest.skip(str(native_conv.unusable(torch.float32)))
    calls: list[str] = []
    choose = train_conv.choose_for

    def spy(*problem: Any) -> Any:
        calls.extend(choose(*problem))
        return choose(*problem)

    monkeypatch.setattr(train_conv, "choose_for", spy)
    return calls


def nearest_to_a_kink(model: nn.Module, x: Tensor) -> float:
    """The smallest of all that its ReLUs read."""
    smallest = []
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(
                lambda _, read: smallest.append(read[0].detach().abs().min())
            )
    model(x)
    return float(min(smallest))


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_own_kernels_are_within_eagers_budget(
    act: str, kind: str, memory: str, native_calls: list[str]
) -> None:
    """With a ReLU over values of which none lies so near to its kink that rounding decides.

    That takes small images; whose error is smaller in a sum over so few pixels is a matter of luck,
    so what has one number per channel is held to the budget with SiLU, on larger ones.
    """
    plain = smooth(big(kind)) if act == "silu" else big(kind)
    fused = resnet_fused.fuse(copy.deepcopy(plain), memory=memory)
    exact = copy.deepcopy(plain).double()
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    while len(found.get("y", [])) < (4 if act == "silu" else 12):
        x = images(kind)
        if act == "relu":
            x = x[:2, :, :9, :8].contiguous(memory_format=torch.channels_last)
            if nearest_to_a_kink(exact, x.double()) < 1e-5:
                continue
        weights = torch.randn(copy.deepcopy(plain)(x).shape)
        weigh = lambda y, w=weights: y * w.to(y.dtype)  # noqa: E731
        of = [results(m, v, weigh) for m, v in ((fused, x), (plain, x), (exact, x.double()))]
        for name in of[0]:
            found.setdefault(name, []).append(tuple(r[name] for r in of))
    assert "winograd4" in native_calls
    assert "library" not in native_calls
    for name, draws in found.items():
        if act == "relu" and draws[0][0].dim() < 2:
            continue
        actual, eager, truth = (torch.stack(values) for values in zip(*draws, strict=True))
        assert_parity(actual, eager, truth, what=name)


def test_memory_modes_give_the_same_bits() -> None:
    x = images("bottleneck")
    default, low = (
        results(resnet_fused.fuse(big("bottleneck"), memory=m), x, torch.square)
        for m in ("default", "low")
    )
    assert all(torch.equal(default[name], low[name]) for name in default)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_repeats_are_the_same_bits(memory: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs = [
                results(resnet_fused.fuse(big("basic"), memory=memory), images("basic"), torch.sin)
                for _ in range(2)
                if torch.manual_seed(5)
            ]
            assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("memory", "kept"), [("default", 2), ("low", 1)])
def test_what_a_basic_block_keeps(memory: str, kept: int) -> None:
    """Beside its input and output: each convolution's output, or all but the last one's."""
    block = resnet_fused.fuse(big("basic")[1], memory=memory)
    x = torch.randn(2, 128, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[0] == 2:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    for own in (x, y):
        assert sizes.pop(own.untyped_storage().data_ptr()) == own.numel()
    assert len(sizes) == kept


@pytest.mark.parametrize("frozen", ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "x"])
def test_parameters_that_want_no_gradient(frozen: str) -> None:
    def run(off: str) -> dict[str, Tensor]:
        block = resnet_fused.fuse(big("basic")[1])
        x = torch.ones(2, 128, 9, 9).cumsum(2).sin().to(memory_format=torch.channels_last)
        x.requires_grad_(off != "x")
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name != off)
        block(x).square().sum().backward()
        found = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
        return found | ({"x": x.grad} if x.grad is not None else {})

    everything, rest = run("nothing"), run(frozen)
    assert set(everything) - set(rest) == {frozen}
    assert all(torch.equal(rest[name], everything[name]) for name in rest)


def test_gradients_accumulate_over_two_batches() -> None:
    block = resnet_fused.fuse(big("basic")[1])
    x = torch.randn(2, 128, 9, 9).to(memory_format=torch.channels_last)
    block(x).sum().backward()
    first = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block(x).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * first[name])
    block.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in block.parameters())


def test_a_graph_may_be_walked_twice() -> None:
    block = resnet_fused.fuse(big("basic")[1])
    x = torch.randn(2, 128, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    y = block(x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("part", ["layer1", "all"])
def test_second_derivative_is_a_clear_error(part: str) -> None:
    model = resnet_fused.fuse(models.resnet18().train())
    model = model if part == "all" else model.layer1
    x = torch.randn(2, 3 if part == "all" else 64, 64, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"resnet_fused.* no second derivative.*unfuse"):
        grad.square().sum().backward()


def test_inputs_far_from_zero() -> None:
    """mean / std = 1e4, where E[x²] − E[x]² has no digit left."""
    plain = big("basic")[1]
    x = (torch.randn(4, 128, 12, 12) + 1e4).to(memory_format=torch.channels_last)
    exact, fused = copy.deepcopy(plain).double(), resnet_fused.fuse(plain)
    truth, eager = results(exact, x.double(), torch.sin), results(plain, x, torch.sin)
    actual = results(fused, x, torch.sin)
    for name in ("y", "bn1.running_mean", "bn1.running_var", "bn2.running_var"):
        assert_parity(actual[name], eager[name], truth[name], what=name)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_values_that_are_not_finite(where: str, value: float) -> None:
    plain = big("basic")[1]
    fused = resnet_fused.fuse(plain)
    x = torch.randn(2, 128, 9, 9).to(memory_format=torch.channels_last)
    weights = torch.randn(2, 128, 9, 9)
    (x if where == "forward" else weights)[1, 7, 4, 4] = value
    actual, eager = (results(m, x, lambda y: y * weights) for m in (fused, plain))
    for name, wanted in eager.items():
        assert torch.equal(actual[name].isfinite(), wanted.isfinite()), name
        assert torch.equal(actual[name].isnan(), wanted.isnan()), name


def test_autocast_keeps_parameters_and_statistics_in_float32(native_calls: list[str]) -> None:
    plain = big("basic")
    x = images("basic")

    def run(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
        model = copy.deepcopy(model)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return results(model, x.double() if dtype is None else x, torch.sin)

    actual = run(resnet_fused.fuse(plain), torch.bfloat16)
    eager, truth = run(plain, torch.bfloat16), run(plain.double(), None)
    assert actual["y"].dtype == torch.bfloat16
    for name, value in actual.items():
        assert value.dtype == eager[name].dtype, name
        if value.is_floating_point():
            error, wanted = (
                float((v.double() - truth[name]).norm() / truth[name].norm())
                for v in (value, eager[name])
            )
            assert error <= 2 * wanted + torch.finfo(torch.bfloat16).eps, (name, error, wanted)


def test_scaled_gradients_and_clipping() -> None:
    """AMP's loop: a step whose gradients overflow is left out, the others are eager's."""
    torch.manual_seed(3)
    plain = models.resnet18(num_classes=10).train().to(memory_format=torch.channels_last)
    losses = {}
    for name, model in {"fused": resnet_fused.fuse(plain), "eager": plain}.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        torch.manual_seed(4)
        kept = []
        for _ in range(4):
            x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), torch.arange(4))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update(1.0)
            kept.append(loss.item())
        losses[name] = kept
    assert losses["fused"] == pytest.approx(losses["eager"], rel=0.03)


def test_unknown_memory_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="memory: expected 'default' or 'low', got 'tiny'"):
        resnet_fused.fuse(models.resnet18(), memory="tiny")


def test_copies_keep_the_memory_mode() -> None:
    model = copy.deepcopy(resnet_fused.fuse(big("basic"), memory="low"))
    chains = [v for m in model for v in vars(m).values() if hasattr(v, "blocks")]
    assert chains
    assert all(b.low_memory and b.training.low_memory for c in chains for b in c.blocks)


def test_every_block_of_a_network_runs_as_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = TrainBlock.__call__

    def spy(self: TrainBlock, *arguments: Any) -> Any:
        seen.append(len(self.steps))
        return run(self, *arguments)

    monkeypatch.setattr(train_block.TrainBlock, "__call__", spy)
    resnet_fused.fuse(models.resnet50().train())(torch.randn(2, 3, 64, 64))
    assert seen == [4, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 4, 3, 3]
