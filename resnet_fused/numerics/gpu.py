"""Convolutions on a GPU by everything that gpu_choice.py admits: compiled kernels and Triton's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from resnet_fused.backends.triton import support
from resnet_fused.conv_choice import LIBRARY, ConvProblem, TrainingAlgorithms
from resnet_fused.modules.conv_on_gpu import vectors_of
from resnet_fused.ops import gpu, gpu_choice, gpu_train
from resnet_fused.ops.gpu_choice import Kind
from resnet_fused.ops.schema import statistics_dtype

from .conv import LAYERS, Step, by_autograd, by_modules, evaluated, trained_step
from .draw import DTYPES, Place, shape_text
from .measure import OperatorCase, Results, Variant

ACT = "none"
"""In training: the one without a corner that every kernel has."""

_TRAINING: dict[Kind, str | None] = {
    "train_output": None,
    "train_behind_norm": ACT,
    "train_input": ACT,
    "train_tensor_input": None,
}
"""And the activation before the convolution; without one it reads a tensor."""


def convolutions(
    dtype: str, device: str, layers: Sequence[ConvProblem] = LAYERS
) -> Iterator[Variant]:
    """conv_bn_act, and a convolution's output and input's gradient in training, by each kernel.

    Where PyTorch's runs a convolution in training nothing of it is ours.
    """
    place = Place(DTYPES[dtype], device=device)
    cases: dict[tuple[str, str], list[OperatorCase]] = {}
    for layer in layers:
        for name in _admitted("inference", layer, place):
            for act, adds in (("relu", True), ("none", False)):
                words = f"{shape_text(layer)}, {act}{' + residual' * adds}"
                make = partial(evaluated, layer, place, act, adds)
                case = OperatorCase(words, make, partial(_evaluation, name, layer), by_modules)
                cases.setdefault(("conv_bn_act", name), []).append(case)
        for kind, act_before in _TRAINING.items():
            for name in _admitted(kind, layer, place):
                if name == LIBRARY:
                    continue
                case = OperatorCase(
                    shape_text(layer), partial(trained_step, layer, place),
                    partial(_training, kind, name, layer), partial(by_autograd, layer, act_before),
                )  # fmt: skip
                cases.setdefault((kind, name), []).append(case)
    for operator, name in sorted(cases):
        yield Variant(operator, name, dtype, "parity", cases[operator, name])


def _admitted(kind: Kind, layer: ConvProblem, place: Place) -> tuple[str, ...]:
    arch = support.architecture(torch.empty(0, device=place.device).get_device())
    return gpu_choice.admitted(kind, layer, place.dtype, arch)


def _evaluation(
    name: str, layer: ConvProblem, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor,
    residual: Tensor | None, act: str,
) -> Results:  # fmt: skip
    y = gpu.run_conv(
        name, x, conv.weight, *vectors_of(conv, bn, statistics_dtype(x.dtype)), residual,
        list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups, act, 0.0,
    )  # fmt: skip
    return {"output": [y]}


def _training(kind: Kind, name: str, layer: ConvProblem, *arguments: Tensor) -> Results:
    x, _, _, weight, w2, b2, grad, added = arguments
    library = TrainingAlgorithms(LIBRARY, LIBRARY, LIBRARY)
    step = Step.of(layer, ACT, library, *arguments[:4])
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    weight = weight.to(x.dtype)
    if kind in ("train_output", "train_behind_norm"):
        norm = step.source[1:] if kind == "train_behind_norm" else None
        z, mean, var = gpu_train.forward(x, norm, weight, None, geometry, name)
        return {"output": [z], "mean": [mean], "var": [var]}
    if kind == "train_input":
        dz = step.gradient(w2, b2, grad).tensor()
        rest = weight, added, geometry, name
        da, *sums = gpu_train.backward_input(dz, x, step.source[1:], *rest)
        return {"grad_input": [da], "sums of the norm before": sums}
    dz = step.gradient(w2, b2, grad, x).tensor()
    return {"grad_input": [gpu_train.backward_tensor_input(dz, weight, added, geometry, name)]}
