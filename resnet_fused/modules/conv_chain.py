"""The convolutions of residual blocks as one step of a model's forward.

In inference on a CPU those of all blocks that follow one another run in one call, without Python
between them. Within a block a large batch goes a few images at a time, so that what lies between
two convolutions stays in cache. Otherwise they run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import policy
from resnet_fused.backends.native_conv import NativeConv, Program, Wired, unusable
from resnet_fused.backends.triton import support
from resnet_fused.kept import Kept, KeptPlan
from resnet_fused.modules import conv_on_gpu
from resnet_fused.modules.batch_norm import uses_batch_statistics
from resnet_fused.modules.conv_bn_act import ConvBNAct, any_requires_grad, records_on_gpu
from resnet_fused.modules.deferred import Deferred
from resnet_fused.modules.train import Training
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.schema import is_channels_last
from resnet_fused.packing import state_of

_GpuPrograms = dict[tuple[object, ...], conv_on_gpu.Program | None]
_MOST_PROGRAMS = 64  # input shapes that are remembered

INPUT = 0  # the value that a block reads; convolution i writes value 2 + i (native_conv.Wired)
OUTSIDE = 2


@dataclass(frozen=True, slots=True)
class ConvBlock:
    """Several :class:`ConvBNAct` whose values nobody else reads, and which values each reads.

    Calling it is equivalent to calling the steps one after the other.
    """

    steps: tuple[ConvBNAct, ...]
    wiring: tuple[Wired, ...]
    low_memory: bool = False
    training: Training = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "training", Training(self.wiring, self.low_memory))

    @property
    def module_count(self) -> int:
        """A convolution and a batch norm (or None) for each step."""
        return 2 * len(self.steps)

    def __call__(self, input: Tensor | Deferred, *modules: Any) -> Tensor | Deferred:
        plain = (
            not self.low_memory
            and isinstance(input, Tensor)
            and records_on_gpu(input, *modules[1::2])
            and input.nbytes < support.LEAST_BLOCK_BYTES
        )
        output = None if plain else self.training.run(input, modules)
        if output is not None:
            return output
        values: list[Any] = [input, None]
        for i, (step, wired) in enumerate(zip(self.steps, self.wiring, strict=True)):
            conv, bn = modules[2 * i : 2 * i + 2]
            residual = None if wired.residual < 0 else values[wired.residual]
            run = step.plain if plain else step
            values.append(run(values[wired.input], conv, bn, residual))
        return values[-1]

    def prepare_on_gpu(
        self, data: conv_on_gpu.Data, modules: tuple[Any, ...]
    ) -> list[tuple[conv_on_gpu.PreparedConv, Wired]] | None:
        """The same for a GPU."""
        values: list[Any] = [data, None]
        prepared: list[tuple[conv_on_gpu.PreparedConv, Wired]] = []
        for i, (step, wired) in enumerate(zip(self.steps, self.wiring, strict=True)):
            conv, bn = modules[2 * i : 2 * i + 2]
            if bn is not None and uses_batch_statistics(bn):
                return None
            options = (step.after.act, step.after.negative_slope)
            ready = step.on_gpu.prepare(values[wired.input], conv, bn, *options)
            if ready is None:
                return None
            if wired.residual >= 0 and values[wired.residual].shape != ready.output.shape:
                return None
            prepared.append((ready, wired))
            values.append(ready.output)
        return prepared

    def prepare(
        self, shape: tuple[int, ...], dtype: torch.dtype, modules: tuple[Any, ...], precision: str
    ) -> list[tuple[NativeConv, Wired]] | None:
        """The block as part of a program, or None where its steps have to choose themselves."""
        shapes: list[tuple[int, ...]] = [shape, ()]
        prepared: list[tuple[NativeConv, Wired]] = []
        for i, (step, wired) in enumerate(zip(self.steps, self.wiring, strict=True)):
            conv, bn = modules[2 * i : 2 * i + 2]
            if bn is not None and uses_batch_statistics(bn):
                return None
            weight = conv._parameters.get("weight")  # FSDP1 puts a plain tensor in its place
            if weight is None or weight.dtype != dtype:
                return None
            folded = step.packed.folded(conv, bn, dtype)
            packed = folded.for_shape(shapes[wired.input], precision)
            if not isinstance(packed, NativeConv):
                return None
            if wired.residual >= 0 and shapes[wired.residual] != packed.output_shape:
                return None
            prepared.append((packed, wired))
            shapes.append(packed.output_shape)
        return prepared


@dataclass(slots=True)
class ConvChain:
    """Blocks of which each reads nothing but what the one before wrote.

    Equivalent to calling the blocks one after the other. Its modules are the convolution and the
    batch norm (or None) of each step of each block in turn.
    """

    blocks: tuple[ConvBlock, ...]
    _program: Kept[Program | None] = field(default_factory=Kept, compare=False)
    _on_gpu: KeptPlan[_GpuPrograms] = field(default_factory=KeptPlan, compare=False)
    _parts: tuple[ConvChain, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        single = len(self.blocks) == 1
        self._parts = () if single else tuple(ConvChain((block,)) for block in self.blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.blocks,)  # a copy packs its own weights

    def __call__(
        self, input: Tensor | Deferred, *modules: nn.Conv2d | nn.BatchNorm2d | None
    ) -> Tensor | Deferred:
        if self._may_run_at_once(input, modules):
            assert isinstance(input, Tensor)
            options, tensors = self._state(modules)
            precision = policy.current()
            key = (input.shape, input.dtype, precision, torch.get_num_threads(), options)
            program = self._program.get(key, tensors, self._make(input, modules, precision))
            if program is not None:
                return program(input)
        elif isinstance(input, Tensor) and support.on_gpu(input):
            output = self._run_on_gpu(input, modules)
            if output is not None:
                return output
        if not self._parts:
            return self.blocks[0](input, *modules)
        for part in self._parts:
            count = part.blocks[0].module_count
            input = part(input, *modules[:count])
            modules = modules[count:]
        return input

    def _may_run_at_once(self, input: Tensor | Deferred, modules: tuple[Any, ...]) -> bool:
        return not (
            isinstance(input, Deferred)
            or torch.compiler.is_compiling()
            or not input.is_cpu
            or input.layout != torch.strided
            or unusable(input.dtype) is not None
            or torch.is_autocast_enabled("cpu")
            or not (is_channels_last(input) or is_channels_last(modules[0].weight))
            or (
                torch.is_grad_enabled()
                and any(
                    any_requires_grad(input, conv, bn, None)
                    for conv, bn in zip(modules[::2], modules[1::2], strict=True)
                )
            )
        )

    def _run_on_gpu(self, input: Tensor, modules: tuple[Any, ...]) -> Tensor | None:
        """All steps in one go, in evaluation; None where they have to choose themselves."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if any(bn is not None and uses_batch_statistics(bn) for bn in modules[1::2]):
            return None
        found = conv_on_gpu.Data.of(input)
        if found is None:
            return None
        data, like = found
        programs = self._on_gpu.get(*self._state(modules), dict)
        key = (like, data is input, gpu_choice.state(data.dtype))
        try:
            program = programs[key]
        except KeyError:
            program = self._prepare_on_gpu(like, modules, casts=data is not input)
            if len(programs) >= _MOST_PROGRAMS:
                programs.clear()
            programs[key] = program
        return None if program is None else program(data)

    def _prepare_on_gpu(
        self, data: conv_on_gpu.Data, modules: tuple[Any, ...], *, casts: bool
    ) -> conv_on_gpu.Program | None:
        """None where the steps have to choose themselves; `casts` says that autocast has cast the
        input, which a residual is added to as it was.
        """
        if casts and any(wired.residual == INPUT for wired in self.blocks[0].wiring):
            return None
        blocks, rest = [], modules
        for block in self.blocks:
            convs = block.prepare_on_gpu(data, rest[: block.module_count])
            if convs is None:
                return None
            blocks.append(convs)
            data, rest = convs[-1][0].output, rest[block.module_count :]
        return conv_on_gpu.Program(blocks)

    def _make(self, input: Tensor, modules: tuple[Any, ...], precision: str) -> Any:
        """What makes the program; None where not all blocks can be in one."""

        def make() -> Program | None:
            shape: tuple[int, ...] = input.shape
            prepared, rest = [], modules
            for block in self.blocks:
                own = rest[: block.module_count]
                convs = block.prepare(shape, input.dtype, own, precision)
                if convs is None:
                    return None
                prepared.append(convs)
                shape, rest = convs[-1][0].output_shape, rest[block.module_count :]
            return Program(*prepared)

        return make

    @staticmethod
    def _state(modules: tuple[Any, ...]) -> tuple[tuple[object, ...], list[Tensor | None]]:
        """What a program depends on in the model, gathered at every call: options and tensors."""
        options: list[object] = []
        tensors: list[Tensor | None] = []
        for conv, bn in zip(modules[::2], modules[1::2], strict=True):
            parameters = conv._parameters
            tensors += (parameters.get("weight"), parameters["bias"])
            options += (conv.stride, conv.padding, conv.dilation, conv.groups)
            if bn is not None:
                options += (bn.training, bn.eps)
                tensors += state_of(bn)
        return tuple(options), tensors


def wire(step: ConvBNAct, input: int, residual: int) -> Wired:
    """A step's place in a block."""
    return Wired(input, residual, step.after.act, step.after.negative_slope)
