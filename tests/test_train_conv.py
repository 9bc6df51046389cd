"""The kernels of a training step against float64: convolution with the batch norms around it."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conv_case import run_with_isa
from tolerance import assert_within_policy
from torch import Tensor

from resnet_fused.backends import native_conv, reference
from resnet_fused.numerics.measure import without_onednn
from resnet_fused.ops import train_conv

pytestmark = pytest.mark.skipif(
    native_conv.unusable(torch.float32) is not None, reason=str(native_conv.unusable(torch.float32))
)
ops = torch.ops.resnet_fused
NAN, INF = float("nan"), float("inf")
EPS = 1e-3


@dataclass(frozen=True)
class Step:
    """z = conv(act(bn(x)) or x), then act(bn(z)) or nothing, and everything that backward gives."""

    algorithm: str
    shape: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    before: str | None = "relu"
    after: str | None = "relu"
    residual: bool = True
    bias: bool = False
    weight_layout: torch.memory_format = torch.channels_last

    @property
    def geometry(self) -> list[int]:
        return [*[self.stride] * 2, *[self.padding] * 2, *[self.dilation] * 2]

    @property
    def input_algorithm(self) -> str:
        return self.algorithm if self.stride == 1 else "direct"

    @property
    def weight_algorithm(self) -> str:
        return "gemm" if self.algorithm == "direct" else "winograd4"

    def data(self) -> dict[str, Tensor]:
        """What the step reads, in float32; the norms' vectors are no identity."""
        channels = self.shape[1]
        weight = torch.randn(self.outputs, channels, *self.kernel) / (channels * 5) ** 0.5
        x = torch.randn(self.shape).to(memory_format=torch.channels_last)
        z = torch.conv2d(x, weight, None, self.stride, self.padding, self.dilation)
        data = {"x": x, "weight": weight.contiguous(memory_format=self.weight_layout)}
        data["grad"] = torch.randn(z.shape).to(memory_format=torch.channels_last)
        if self.residual:
            data["residual"] = torch.randn(self.shape).to(memory_format=torch.channels_last)
        if self.bias:
            data["bias"] = torch.randn(self.outputs)
        for name, count in (("before", channels), ("after", self.outputs)):
            data[f"{name} weight"] = torch.rand(count) + 0.5
            data[f"{name} bias"] = torch.randn(count) * 0.3
        return data

    def by_plain(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """The formulas in plain PyTorch, in the dtype of the data."""
        x, weight = data["x"], data["weight"]
        vectors = data["before weight"], data["before bias"], EPS
        a = x
        statistics = reference.batch_statistics(x)
        if self.before:
            a = reference.normalize_act(x, None, *statistics, *vectors, self.before, 0.1)
        z = torch.conv2d(a, weight, data.get("bias"), self.stride, self.padding, self.dilation)
        mean, var = reference.batch_statistics(z)
        dz = data["grad"]
        if self.after:
            behind = mean, var, data["after weight"], data["after bias"]
            _, *sums = reference.bn_act_backward_sums(
                dz, z, None, None, *behind, EPS, self.after, 0.1, False
            )
            dz = reference.bn_act_backward_input(
                dz, z, *behind, *sums, EPS, self.after, 0.1, z.numel() // z.shape[1]
            )
        # oneDNN may write beyond its memory here (backends/onednn.py: convolution_backward).
        safe = self.stride == 1 or weight.shape[2:] != (1, 1)
        with nullcontext() if safe else without_onednn():
            da, dw, _ = torch.ops.aten.convolution_backward(
                dz, a, weight, None, [self.stride] * 2, [self.padding] * 2, [self.dilation] * 2,
                False, [0, 0], 1, [True, True, False],
            )  # fmt: skip
        if self.residual:
            da = da + data["residual"]
        result = {"z": z, "mean": mean, "var": var, "da": da, "dw": dw}
        if self.before:
            _, weight_grad, bias_grad = reference.bn_act_backward_sums(
                da, x, None, None, *statistics, *vectors, self.before, 0.1, False
            )
            result |= {"norm weight grad": weight_grad, "norm bias grad": bias_grad}
        return result

    def by_kernels(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same by the kernels under test."""
        x, weight = data["x"], data["weight"]
        before: tuple[Any, ...] = ([], 0.0, "none", 0.0)
        if self.before:
            vectors = [*ops.batch_statistics(x), data["before weight"], data["before bias"]]
            before = vectors, EPS, self.before, 0.1
        z, mean, var = ops._train_conv(
            x, *before, weight, data.get("bias"), self.geometry, self.algorithm
        )
        after: tuple[Any, ...] = (None, [], 0.0, "none", 0.0, 0)
        if self.after:
            behind = [mean, var, data["after weight"], data["after bias"]]
            _, *sums = ops.bn_act_backward_sums(
                data["grad"], z, None, None, *behind, EPS, self.after, 0.1, False
            )
            after = z, [*behind, *sums], EPS, self.after, 0.1, z.numel() // z.shape[1]
        da, dw, weight_grad, bias_grad = ops._train_conv_backward(
            data["grad"], *after, None, [], x, *before, weight, self.geometry,
            data.get("residual"), self.input_algorithm, self.weight_algorithm,
        )  # fmt: skip
        assert dw.stride() == weight.stride()
        result = {"z": z, "mean": mean, "var": var, "da": da, "dw": dw}
        if self.before:
            result |= {"norm weight grad": weight_grad, "norm bias grad": bias_grad}
        return result

    def check(self) -> None:
        """Hold every result to the precision policy."""
        data = self.data()
        actual, eager = self.by_kernels(data), self.by_plain(data)
        truth = self.by_plain({k: v.double() for k, v in data.items()})
        for name, value in actual.items():
            # A mean or a sum may vanish beside what it was taken over.
            size = {"mean": "z", "norm weight grad": "da", "norm bias grad": "da"}.get(name)
            scale = None if size is None else truth[size].abs().max().item()
            if size == "da":
                scale *= self.shape[0] ** 0.5 * self.shape[2]
            what = f"{name} of {self}"
            assert_within_policy(value, eager[name], truth[name], "default", what=what, scale=scale)


def random_step(source: random.Random) -> Step:
    algorithm = source.choice(["direct", "winograd4", "winograd4_late"])
    kernel, stride, dilation = (3, 3), source.choice([1, 2]), 1
    if algorithm == "direct":
        kernel = source.choice([(1, 1), (1, 1), (3, 3), (2, 3), (5, 5), (7, 7)])
        stride = source.choice([1, 1, 2, 3])
        dilation = source.choice([1, 2]) if stride == 1 else 1
    reach = dilation * (max(kernel) - 1)
    padding = source.randint(0, min(2, dilation * (min(kernel) - 1)))
    least = reach + 1
    channels = source.choice([1, 3, 15, 16, 33, 64, 70])
    # A batch norm over a few values magnifies whatever error it is given.
    size = source.randint(least, least + 16), least + 5
    many = min((n + 2 * padding - reach - 1) // stride for n in size) >= 5
    return Step(
        algorithm,
        (source.choice([1, 2, 5]), channels, *size),
        source.choice([2, 16, 31, 32, 48, 65]),
        kernel, stride, padding, dilation,
        source.choice([None, "none", "relu", "leaky_relu", "silu"]),
        source.choice([None, "none", "relu", "relu6"]) if many else None,
        source.random() < 0.5,
        source.random() < 0.3,
        source.choice([torch.channels_last, torch.contiguous_format]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_random_steps(seed: int, poisoned: None) -> None:
    source = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        random_step(source).check()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    run_with_isa(
        isa,
        "import random, torch, test_train_conv as t; s = random.Random(9); torch.manual_seed(0)\n"
        "for _ in range(30): t.random_step(s).check()",
    )


@pytest.mark.parametrize("algorithm", ["winograd4", "winograd4_late", "direct"])
@pytest.mark.parametrize("outputs", [64, 200])
def test_many_passes(algorithm: str, outputs: int) -> None:
    """A batch that is taken a few images at a time, with more than one block of tiles.

    Among so many values one lies so near to a ReLU's kink that rounding decides its derivative.
    """
    Step(algorithm, (7, 96, 60, 58), outputs, before="silu", after="silu").check()


@pytest.mark.parametrize("channels", range(16, 97, 16))
def test_blocks_beside_private_sums(channels: int) -> None:
    """The channels decide how many tiles the cache holds beside a thread's sums."""
    Step("winograd4", (4, channels, 32, 32), 64, stride=2).check()


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ["winograd4", "direct"])
def test_sums_of_several_threads(algorithm: str, threads: int) -> None:
    """Each thread adds up its images' weight gradient by itself."""
    torch.set_num_threads(threads)
    Step(algorithm, (6, 32, 30, 30), 64, before="silu", after="silu").check()


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_gradient_of_a_strided_input(kernel: int, stride: int, padding: int) -> None:
    """Every size of image: its last pixels may be seen by no output."""
    if padding > kernel // 2:
        pytest.skip("no such convolution")
    for size in range(max(kernel, 2), kernel + 6):
        Step(
            "direct", (2, 20, size, size + 1), 24, (kernel, kernel), stride, padding,
            before=None, after=None,
        ).check()  # fmt: skip


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e37], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_values_that_are_not_finite(where: str, stride: int, value: float) -> None:
    """They reach the gradients that eager PyTorch gives them, and no others."""
    for y, x in ((0, 0), (3, 4), (-1, -1)):
        step = Step("winograd4", (2, 18, 9, 10), 33, stride=stride, before=None, after=None)
        data = step.data()
        data[where][-1, 5, y, x] = value
        eager = step.by_plain(data)
        conv = train_conv.Conv(data["weight"], None, (stride,) * 2, (1, 1), (1, 1), 1)
        da, dw, _ = train_conv.backward(
            data["grad"], data["x"], conv,
            residual=data["residual"], needs_input=True, needs_weight=True,
        )  # fmt: skip
        z, *_ = train_conv.forward(data["x"], conv)
        for name, actual in {"z": z, "da": da, "dw": dw}.items():
            assert actual is not None
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(actual), kind(eager[name])), (name, y, x)


@pytest.mark.parametrize("algorithm", ["winograd4", "winograd4_late", "direct"])
def test_repeats_are_the_same_bits(algorithm: str) -> None:
    step = Step(algorithm, (6, 64, 30, 30), 64)
    data = step.data()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first, *others = (step.by_kernels(data) for _ in range(5))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "strassen"}, "training takes direct"),
        ({"geometry": [1, 1]}, "geometry must be"),
        ({"geometry": [0, 1, 1, 1, 1, 1]}, "stride and dilation must be positive"),
        ({"weight": torch.zeros(4, 5, 3, 3)}, "input must have 5 channels"),
        ({"weight": torch.zeros(4, 16, 3, 3).double()}, "weight must be a float32"),
        ({"input": torch.zeros(0, 16, 8, 8)}, "not empty"),
        ({"input": torch.zeros(1, 16, 8, 8).double()}, "float32 or bfloat16"),
        ({"before": [torch.zeros(16)]}, "before must be empty or mean"),
        ({"before": [torch.zeros(15)] * 4}, "one number per channel"),
        ({"bias": torch.zeros(5)}, "one number per channel"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "input": torch.zeros(1, 16, 8, 8), "before": [], "eps": 0.0, "act": "none",
        "negative_slope": 0.0, "weight": torch.zeros(4, 16, 3, 3), "bias": None,
        "geometry": [1] * 6, "algorithm": "direct",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops._train_conv(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(1, 4, 7, 8)}, "grad must have the shape of the convolution's output"),
        ({"grad": torch.zeros(1, 4, 8, 8).bfloat16()}, "grad and output must have the dtype"),
        ({"output": torch.zeros(1, 5, 8, 8)}, "output must have the shape of the conv"),
        (
            {"after": [torch.zeros(4)] * 4, "count": 64},
            "after must be empty or mean, .* two gradients",
        ),
        ({"after": [torch.zeros(4)] * 6, "count": 0}, "count must be positive"),
        ({"residual": torch.zeros(1, 16, 8, 9)}, "residual must have the shape of input"),
        ({"positions": torch.zeros(3).byte(), "window": [2, 2, 2, 2, 0, 0, 1, 1]}, "positions"),
        ({"geometry": [2, 2, 1, 1, 2, 2], "grad": torch.zeros(1, 4, 3, 3)}, "dilation with stride"),
        ({"geometry": [1, 1, 3, 3, 1, 1], "grad": torch.zeros(1, 4, 12, 12)}, "padding smaller"),
        ({"weight_algorithm": "strassen"}, "weight_algorithm must be"),
        (
            {"geometry": [1, 1, 2, 2, 2, 2], "weight_algorithm": "winograd4"},
            "winograd4 takes 3 x 3 kernels",
        ),
    ],
    ids=str,
)
def test_bad_arguments_of_backward(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "grad": torch.zeros(1, 4, 8, 8), "output": None, "after": [], "after_eps": 0.0,
        "after_act": "none", "after_slope": 0.0, "count": 0, "positions": None, "window": [],
        "input": torch.zeros(1, 16, 8, 8), "before": [], "before_eps": 0.0, "before_act": "none",
        "before_slope": 0.0, "weight": torch.zeros(4, 16, 3, 3), "geometry": [1] * 6,
        "residual": None, "input_algorithm": "direct", "weight_algorithm": "gemm",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops._train_conv_backward(**{**arguments, **change})
