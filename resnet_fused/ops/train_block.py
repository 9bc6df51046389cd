"""A residual block in training as one autograd function.

Eager PyTorch keeps, for each convolution of a block, its output and the activation that follows; an
activation follows from the output and two vectors in one pass. This function keeps each
convolution's output, the statistics, and of the activations those alone that a residual was added
to: of a bottleneck 10 middle-sized tensors instead of 12, of a basic block 3 instead of 4. With
``low_memory`` the last convolution's output is dropped too and computed again in backward: 6 and 2.

Between convolutions nothing else is written (``train_conv.py``). Where all of them run in the
library's own kernels, a block is one call each way (``csrc/cpu/train_block.cpp``); the steps here
do the same for PyTorch's convolutions, other devices and groups of processes. Paper: Chen et al.,
*Training Deep Nets with Sublinear Memory Cost* (2016); Rota Bulò et al., *In-Place Activated
BatchNorm* (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resnet_fused.conv_choice import LIBRARY, TrainingAlgorithms
from resnet_fused.ops import synchronise, train_conv
from resnet_fused.ops.autograd import PIECEWISE_LINEAR
from resnet_fused.ops.first_derivative import first_derivative_only
from resnet_fused.ops.schema import is_channels_last
from resnet_fused.ops.train_conv import Conv, ConvNorm, Gradient, Normalised, Source, Sums

_ops = torch.ops.resnet_fused

INPUT, OUTSIDE = 0, 2  # the values of a block, as native_conv.Wired counts them


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One convolution, its batch norm and activation, and which values of the block they read."""

    input: int
    residual: int  # -1 for none
    options: ConvNorm
    group: Any = None  # of processes whose batches are normalised as one
    algorithms: TrainingAlgorithms | None = None  # None: chosen at every call
    has: tuple[bool, bool, bool] = (False, True, True)  # a bias, and the batch norm's two vectors

    @property
    def act(self) -> str:
        """The activation's name."""
        return self.options.act

    @property
    def mask_from_output(self) -> bool:
        """Whether backward reads the activation's derivative off its output."""
        return self.residual >= 0 and self.act in PIECEWISE_LINEAR and self.act != "none"

    @property
    def mask_from_residual(self) -> bool:
        """Whether backward needs the residual for it."""
        return self.residual >= 0 and self.act not in PIECEWISE_LINEAR


@dataclass(frozen=True)
class TrainBlock:
    """Convolutions whose values nobody else reads; the last one's is the block's output."""

    steps: tuple[TrainStep, ...]
    low_memory: bool = False

    def __call__(
        self, input: Tensor, parameters: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor], list[int]]:
        """The output, mean and biased variance of each convolution's output, and how many values.

        Args:
            parameters: of each step the convolution's weight and bias and the batch norm's.
        """
        counts: list[int] = []
        output, *statistics = _BlockFunction.apply(self, counts, input, *parameters)
        return output, statistics, counts

    @cached_property
    def one_call(self) -> tuple[list[int], list[float], list[str]] | None:
        """The block as ``_train_block`` takes it, or None if it does not."""
        numbers: list[int] = []
        scalars: list[float] = []
        names: list[str] = []
        for i, step in enumerate(self.steps):
            several = step.residual >= 0 and any(
                step.residual in (later.input, later.residual) for later in self.steps[i + 1 :]
            )
            algorithms = step.algorithms
            if several or step.group is not None or not algorithms or LIBRARY in algorithms:
                return None
            masks = step.mask_from_output, step.mask_from_residual
            bits = sum(bit << n for n, bit in enumerate((*step.has, *masks)))
            options = step.options
            geometry = options.stride + options.padding + options.dilation
            numbers += (step.input, step.residual, *geometry, bits)
            scalars += (options.eps, options.negative_slope)
            names += (step.act, *algorithms)
        return numbers, scalars, names

    def runs_at_once(self, input: Tensor, parameters: Sequence[Tensor | None]) -> bool:
        """Whether it is one call for these tensors."""
        return (
            self.one_call is not None
            and input.is_cpu
            and is_channels_last(input)
            and all(w is not None and w.dtype == torch.float32 for w in parameters[::4])
        )

    @cached_property
    def materialised(self) -> frozenset[int]:
        """Values that exist as tensors: sums, what is added to others, and the output."""
        added = {step.residual for step in self.steps}
        sums = {OUTSIDE + i for i, step in enumerate(self.steps) if step.residual >= 0}
        return frozenset(added | sums | {OUTSIDE + len(self.steps) - 1}) - {-1}

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Values that backward reads as tensors."""
        steps = self.steps
        sums = {OUTSIDE + i for i, step in enumerate(steps) if step.residual >= 0}
        read = {step.input for step in steps} & ({INPUT} | sums)
        masks = {OUTSIDE + i for i, step in enumerate(steps) if step.mask_from_output}
        return tuple(sorted(read | masks | {s.residual for s in steps if s.mask_from_residual}))


class _Values:
    """The values of a block as its convolutions read them, in forward and again in backward."""

    def __init__(
        self, block: TrainBlock, tensors: dict[int, Tensor], parameters: Sequence[Tensor | None]
    ) -> None:
        self.block = block
        self.tensors = tensors
        self.normalised: dict[int, Normalised] = {}
        self.parameters = parameters

    def conv(self, i: int) -> Conv:
        weight, bias = self.parameters[4 * i : 4 * i + 2]
        assert weight is not None
        step = self.block.steps[i]
        return step.options.conv(weight, bias, step.algorithms)

    def normalise(self, i: int, z: Tensor, mean: Tensor, var: Tensor) -> Normalised:
        vectors = self.parameters[4 * i + 2 : 4 * i + 4]
        value = self.block.steps[i].options.normalised(z, mean, var, *vectors)
        self.normalised[OUTSIDE + i] = value
        return value

    def source(self, value: int) -> Source:
        """What a convolution reads: better not computed yet, if it need not be kept."""
        adds = value >= OUTSIDE and self.block.steps[value - OUTSIDE].residual >= 0
        return self.tensors[value] if value == INPUT or adds else self.normalised[value]


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: TrainBlock, counts: list[int], input: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.at_once = block.runs_at_once(input, parameters)
        run = _forward_at_once if ctx.at_once else _forward
        outputs, statistics, tensors = run(block, counts, input, parameters)
        if block.low_memory:
            outputs.pop()
        result = tensors[OUTSIDE + len(block.steps) - 1]
        ctx.block, ctx.shape = block, result.shape
        ctx.kind = {"dtype": result.dtype, "device": result.device}
        ctx.saved, ctx.counts = (len(outputs), len(statistics)), counts
        ctx.save_for_backward(*outputs, *statistics, *(tensors[v] for v in block.kept), *parameters)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return result, *statistics

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        if grad is None and any(step.group is not None for step in ctx.block.steps):
            grad = torch.zeros(ctx.shape, **ctx.kind)  # others wait for this process's sums
        return None, None, *((None,) * len(needs) if grad is None else _backward(ctx, grad, needs))


_Computed = tuple[list[Tensor], list[Tensor], dict[int, Tensor]]
"""Convolutions' outputs, their means and variances in turn, and values that are tensors."""


def _forward(
    block: TrainBlock, counts: list[int], input: Tensor, parameters: Sequence[Tensor | None]
) -> _Computed:
    values = _Values(block, {INPUT: input}, parameters)
    outputs, statistics = [], []
    for i, step in enumerate(block.steps):
        z, mean, var = train_conv.forward(values.source(step.input), values.conv(i))
        count = z.numel() // z.shape[1]
        if step.group is not None:
            mean, var, count = synchronise.statistics(mean, var, count, step.group)
        counts.append(count)
        normalised = values.normalise(i, z, mean, var)
        if OUTSIDE + i in block.materialised:
            residual = None if step.residual < 0 else values.tensors[step.residual]
            values.tensors[OUTSIDE + i] = normalised.tensor(residual)
        outputs.append(z)
        statistics += [mean, var]
    return outputs, statistics, values.tensors


def _forward_at_once(
    block: TrainBlock, counts: list[int], input: Tensor, parameters: Sequence[Tensor | None]
) -> _Computed:
    assert block.one_call is not None
    count = len(block.steps)
    found = _ops._train_block(input, [p for p in parameters if p is not None], *block.one_call)
    outputs, statistics = found[:count], found[count : 3 * count]
    counts += [z.numel() // z.shape[1] for z in outputs]
    others = sorted(value for value in block.materialised if value != INPUT)
    return outputs, statistics, {INPUT: input, **dict(zip(others, found[3 * count :], strict=True))}


def _backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    block: TrainBlock = ctx.block
    saved = ctx.saved_tensors  # read once: checkpointing gives them once
    last = len(block.steps) - 1
    outputs = saved[: ctx.saved[0]]
    statistics = saved[ctx.saved[0] : sum(ctx.saved)]
    kept = saved[sum(ctx.saved) :][: len(block.kept)]
    parameters = saved[sum(ctx.saved) + len(block.kept) :]
    if ctx.at_once:
        assert block.one_call is not None
        grads_at_once = _ops._train_block_backward(
            grad, outputs, statistics, kept, block.kept, [needs[0], *needs[1::4]],
            [p for p in parameters if p is not None], *block.one_call,
        )  # fmt: skip
        if grads_at_once:  # else something is not finite
            return _in_places(grads_at_once, parameters, needs)
    tensors = dict(zip(block.kept, kept, strict=True))
    values = _Values(block, tensors, parameters)
    for i, z in enumerate(outputs):
        values.normalise(i, z, *statistics[2 * i : 2 * i + 2])
    if len(outputs) == last:
        z, _, _ = train_conv.forward(values.source(block.steps[last].input), values.conv(last))
        values.normalise(last, z, *statistics[2 * last :])

    found: list[Tensor | None] = [None] * len(needs)
    grads = {OUTSIDE + last: grad}
    sums_of: dict[int, Sums] = {}
    for i in reversed(range(len(block.steps))):
        step, value = block.steps[i], OUTSIDE + i
        normalised = values.normalised.pop(value)
        grad = grads.pop(value)
        sums = sums_of.pop(value, None)
        if step.residual >= 0:
            residual = tensors[step.residual] if step.mask_from_residual else None
            output = tensors.pop(value) if step.mask_from_output else None
            sums = normalised.sums(grad, residual, output, True)
            assert sums.grad_residual is not None
            grad, normalised = sums.grad_residual, normalised._replace(act="none")
            known = grads.get(step.residual)
            grads[step.residual] = grad if known is None else known + grad
        elif sums is None:
            sums = normalised.sums(grad, None, None, False)
        places = slice(1 + 4 * i, 5 + 4 * i)
        needs_weight, needs_bias, needs_bn_weight, needs_bn_bias = needs[places]
        source = values.source(step.input)
        everyone = sums if step.group is None else synchronise.sums(sums, step.group)
        grad_input, grad_weight, sums_before = train_conv.backward(
            Gradient(grad, normalised, everyone, ctx.counts[i]), source, values.conv(i),
            residual=grads.pop(step.input, None),
            needs_input=needs[0] if step.input == INPUT else True, needs_weight=needs_weight,
        )  # fmt: skip
        if grad_input is not None:
            grads[step.input] = grad_input
        # Complete only if no earlier step reads the value too.
        if sums_before is not None and all(
            step.input not in (s.input, s.residual) for s in block.steps[:i]
        ):
            sums_of[step.input] = sums_before
        found[places] = [
            grad_weight,
            sums.grad_of_conv_bias(values.parameters[4 * i + 1]) if needs_bias else None,
            sums.grad_weight if needs_bn_weight else None,
            sums.grad_bias if needs_bn_bias else None,
        ]
    found[0] = grads.get(INPUT) if needs[0] else None
    return tuple(found)


def _in_places(
    grads: Sequence[Tensor], parameters: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of the input and of all parameters, None for those that are not needed."""
    found: list[Tensor | None] = [grads[0]]
    for i in range(len(parameters) // 4):
        grad_weight, norm_weight, norm_bias = grads[1 + 3 * i : 4 + 3 * i]
        bias = parameters[4 * i + 1]
        # Of a batch norm that takes it away, and everything is finite here.
        grad_bias = None if bias is None else torch.zeros_like(bias)
        found += [grad_weight, grad_bias, norm_weight, norm_bias]
    return tuple(grad if needed else None for grad, needed in zip(found, needs, strict=True))
