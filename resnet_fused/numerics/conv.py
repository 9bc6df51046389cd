"""Convolutions in evaluation and in training on the CPU, by each algorithm that may run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import conv_choice, packing
from resnet_fused.backends import native_conv, onednn, reference
from resnet_fused.conv_choice import LIBRARY, ConvProblem, TrainingAlgorithms
from resnet_fused.modules.conv_on_gpu import vectors_of
from resnet_fused.ops import train_conv
from resnet_fused.ops.schema import statistics_dtype
from resnet_fused.ops.train_conv import Conv, Gradient, Normalised
from resnet_fused.parity import Promise

from .draw import DTYPES, LAYOUTS, Place, shape_text, trained
from .measure import Case, OperatorCase, Results, Run, Variant

EPS = 1e-5


def problem(
    batch: int, channels: int, size: tuple[int, int], outputs: int, kernel: int, *,
    stride: int = 1, padding: int | None = None, dilation: int = 1, groups: int = 1,
) -> ConvProblem:  # fmt: skip
    """A convolution that keeps the size, unless said otherwise."""
    padding = kernel // 2 * dilation if padding is None else padding
    return ConvProblem(
        batch, channels, size, outputs, (kernel,) * 2, (stride,) * 2, (padding,) * 2,
        (dilation,) * 2, groups,
    )  # fmt: skip


LAYERS = (
    problem(2, 64, (14, 14), 64, 3),
    problem(2, 128, (15, 13), 96, 3),
    problem(2, 512, (7, 7), 64, 3),
    problem(2, 64, (28, 28), 128, 3, stride=2),
    problem(2, 256, (14, 14), 64, 3, stride=2),
    problem(2, 64, (14, 14), 256, 1),
    problem(2, 512, (7, 7), 128, 1),
    problem(2, 256, (14, 14), 64, 1, stride=2),
    problem(2, 3, (45, 43), 64, 7, stride=2),
    # What no layer of a ResNet is.
    problem(3, 34, (13, 9), 70, 3),
    problem(3, 33, (12, 11), 35, 3, stride=2, padding=0),
    problem(2, 48, (12, 12), 48, 3, dilation=2),
    problem(3, 22, (9, 12), 35, 5),
)
"""Sums as long as a ResNet's, of images as small as show their edges."""

EVALUATION_ONLY = (
    problem(2, 1024, (7, 7), 64, 3),  # the most that F(4x4) is admitted for
    problem(2, 1024, (7, 7), 256, 1),
    problem(2, 2048, (7, 7), 128, 1),
    problem(2, 128, (14, 14), 128, 3, groups=32),
    problem(2, 256, (14, 13), 256, 3, stride=2, groups=32),
    problem(2, 96, (9, 11), 96, 3, groups=3),
)


# --- evaluation ---------------------------------------------------------------------------------


def evaluation(
    dtype: str, layers: Sequence[ConvProblem] = LAYERS + EVALUATION_ONLY
) -> Iterator[Variant]:
    """conv_bn_act by each algorithm that a precision policy admits, and by PyTorch's with one pass.

    Of what is not float32 both policies promise the same.
    """
    policies: tuple[Promise, ...] = ("default", "strict") if dtype == "float32" else ("default",)
    for policy in policies if onednn.unusable(DTYPES[dtype]) is None else ():
        cases: dict[str, list[Case]] = {}
        for layer in layers:
            layer = replace(layer, bf16=dtype == "bfloat16")
            for algorithm in packing.algorithms(layer, policy):
                pairs = algorithm != "onednn" and conv_choice.multiplies_bf16(layer, algorithm)
                name = f"{algorithm}, pairs" if pairs else algorithm
                ours = partial(_packed, algorithm, layer)
                cases.setdefault(name, []).extend(_cases(layer, Place(DTYPES[dtype]), ours))
        for name in sorted(cases):
            yield Variant("conv_bn_act", name, dtype, policy, cases[name])
    for layout, memory_format in LAYOUTS.items():
        if layout == "channels_last" and onednn.unusable(DTYPES[dtype]) is None:
            continue  # those above take it
        place = Place(DTYPES[dtype], memory_format)
        few = layers[::2]  # the convolution is PyTorch's
        passed = [case for layer in few for case in _cases(layer, place, _one_pass)]
        yield Variant("conv_bn_act", f"library and one pass, {layout}", dtype, "parity", passed)


def _cases(layer: ConvProblem, place: Place, ours: Run) -> Iterator[Case]:
    """One as a block ends, and one whose sums are seen as they are."""
    for act, adds in (("relu", True), ("none", False)):
        words = f"{shape_text(layer)}, {act}{' + residual' * adds}"
        make = partial(evaluated, layer, place, act, adds)
        yield OperatorCase(words, make, ours, by_modules)


def evaluated(layer: ConvProblem, place: Place, act: str, adds: bool) -> Sequence[object]:
    conv = nn.Conv2d(
        layer.channels, layer.out_channels, layer.kernel, layer.stride, layer.padding,
        layer.dilation, layer.groups, bias=False,
    )  # fmt: skip
    modules = [
        m.eval().to(place.device, place.dtype).requires_grad_(False)
        for m in (conv, trained(nn.BatchNorm2d(layer.out_channels)))
    ]
    x = place.images(layer.batch, layer.channels, *layer.size)
    residual = place.images(layer.batch, layer.out_channels, *layer.out_size) if adds else None
    return *modules, x, residual, act


def by_modules(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, act: str
) -> Results:
    y = bn(conv(x))
    return {"output": [reference.activation(act, 0.1)(y if residual is None else y + residual)]}


def _packed(
    algorithm: str, layer: ConvProblem, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor,
    residual: Tensor | None, act: str,
) -> Results:  # fmt: skip
    folded = packing.fold_of(conv, bn, x.dtype)
    assert folded is not None
    return {"output": [packing.run(folded.prepare(layer, algorithm), x, residual, act, 0.1)]}


def _one_pass(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, act: str
) -> Results:
    options = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
    y = torch.ops.resnet_fused.conv_bn_act(
        x, conv.weight, *vectors_of(conv, bn, statistics_dtype(x.dtype)), residual, *options,
        act, 0.1,
    )  # fmt: skip
    return {"output": [y]}


# --- training -----------------------------------------------------------------------------------
#
# z = conv(silu(bn(x))) and what silu(bn(z)) makes of a gradient. SiLU has no corner, where rounding
# would decide a derivative.

ACT = "silu"


def training(dtype: str, layers: Sequence[ConvProblem] = LAYERS) -> Iterator[Variant]:
    """A convolution's output in training and both gradients, by each algorithm of each policy."""
    place = Place(DTYPES[dtype])
    policies: tuple[Promise, ...] = ("default", "strict") if dtype == "float32" else ("default",)
    for policy in policies if native_conv.unusable(place.dtype) is None else ():
        cases: dict[tuple[str, str], list[Case]] = {}
        for layer in layers:
            layer = replace(layer, bf16=dtype == "bfloat16")
            for part, algorithm in _training_algorithms(layer, policy):
                case = OperatorCase(
                    shape_text(layer), partial(trained_step, layer, place),
                    partial(_OURS[part], layer, algorithm), partial(by_autograd, layer, ACT),
                )  # fmt: skip
                cases.setdefault((part, algorithm), []).append(case)
        for part, algorithm in sorted(cases):
            yield Variant("train_conv", algorithm, dtype, policy, cases[part, algorithm])


def _training_algorithms(layer: ConvProblem, policy: str) -> Iterator[tuple[str, str]]:
    """What may make the output, the input's gradient and the weight's."""
    chosen = conv_choice.choose_training(layer, policy)
    if chosen.output != LIBRARY:
        for algorithm in conv_choice.training_candidates(layer, policy):
            yield "output", algorithm
    if chosen.input != LIBRARY:
        around = conv_choice.training_candidates(conv_choice.turned(layer), policy)
        for algorithm in around if layer.stride == (1, 1) else ("direct",):
            yield "input", algorithm
    if chosen.weight != LIBRARY:
        yield "weight", chosen.weight


def trained_step(layer: ConvProblem, place: Place) -> Sequence[Tensor]:
    """Parameters are float32, as under autocast."""
    output = layer.batch, layer.out_channels, *layer.out_size
    x = place.images(layer.batch, layer.channels, *layer.size)
    before = place.vector(layer.channels, 0.5, 1.5), place.vector(layer.channels, -0.3, 0.3)
    behind = place.vector(output[1], 0.5, 1.5), place.vector(output[1], -0.3, 0.3)
    grad, added = place.images(*output), place.images(*x.shape)
    return x, *before, place.weight(layer), *behind, grad, added


def by_autograd(
    layer: ConvProblem, act: str | None, x: Tensor, w1: Tensor, b1: Tensor, weight: Tensor,
    w2: Tensor, b2: Tensor, grad: Tensor, added: Tensor,
) -> Results:  # fmt: skip
    """Plain PyTorch's; without `act` the convolution reads x itself."""
    w1, b1, weight = (t.detach().requires_grad_() for t in (w1, b1, weight))
    after = reference.activation(act or "none", 0.0)
    a = after(F.batch_norm(x, None, None, w1, b1, True, 0.0, EPS))
    if act is None:
        a = x.detach().requires_grad_()
    z = F.conv2d(a, weight.to(a.dtype), None, layer.stride, layer.padding, layer.dilation)
    var, mean = torch.var_mean(z.detach().to(w2.dtype), (0, 2, 3), correction=0)
    y = after(F.batch_norm(z, None, None, w2, b2, True, 0.0, EPS))
    leaves = [a, weight] + ([] if act is None else [w1, b1])
    da, dw, *sums = torch.autograd.grad([y, a], leaves, [grad, added])
    return {
        "output": [z.detach()], "mean": [mean], "var": [var], "grad_input": [da],
        "grad_weight": [dw], "sums of the norm before": sums,
    }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """The convolution between two batch norms, as the library has it."""

    source: Normalised
    conv: Conv

    @classmethod
    def of(
        cls, layer: ConvProblem, act: str, algorithms: TrainingAlgorithms, x: Tensor, w1: Tensor,
        b1: Tensor, weight: Tensor,
    ) -> Step:  # fmt: skip
        mean, var = torch.ops.resnet_fused.batch_statistics(x)
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return cls(
            Normalised(x, mean, var, w1, b1, EPS, act, 0.0),
            Conv(weight, None, *geometry, algorithms),
        )

    def gradient(
        self, w2: Tensor, b2: Tensor, grad: Tensor, source: Tensor | None = None
    ) -> Gradient:
        """Of the convolution's output; `source` is what it reads instead of the batch norm's."""
        z, mean, var = train_conv.forward(self.source if source is None else source, self.conv)
        behind = Normalised(z, mean, var, w2, b2, EPS, self.source.act, 0.0)
        sums = behind.sums(grad, None, None, False)
        return Gradient(grad, behind, sums, z.numel() // z.shape[1])


def _output(layer: ConvProblem, algorithm: str, *arguments: Tensor) -> Results:
    step = Step.of(layer, ACT, TrainingAlgorithms(algorithm, LIBRARY, LIBRARY), *arguments[:4])
    z, mean, var = train_conv.forward(step.source, step.conv)
    return {"output": [z], "mean": [mean], "var": [var]}


def _grad_input(layer: ConvProblem, algorithm: str, *arguments: Tensor) -> Results:
    step = Step.of(layer, ACT, TrainingAlgorithms(LIBRARY, algorithm, LIBRARY), *arguments[:4])
    da, _, sums = train_conv.backward(
        step.gradient(*arguments[4:7]), step.source, step.conv,
        residual=arguments[7], needs_input=True, needs_weight=False,
    )  # fmt: skip
    assert da is not None and sums is not None
    return {
        "grad_input": [da], "sums of the norm before": [sums.grad_weight, sums.grad_bias],
    }  # fmt: skip


def _grad_weight(layer: ConvProblem, algorithm: str, *arguments: Tensor) -> Results:
    step = Step.of(layer, ACT, TrainingAlgorithms(LIBRARY, LIBRARY, algorithm), *arguments[:4])
    _, dw, _ = train_conv.backward(
        step.gradient(*arguments[4:7]), step.source, step.conv,
        residual=None, needs_input=False, needs_weight=True,
    )  # fmt: skip
    assert dw is not None
    return {"grad_weight": [dw]}


_OURS = {"output": _output, "input": _grad_input, "weight": _grad_weight}
