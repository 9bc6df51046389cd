"""A convolution's weights with batch norm folded in, packed for the algorithm that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from resnet_fused import conv_choice, fold, policy, tuning_cache
from resnet_fused.backends import native, native_conv, onednn
from resnet_fused.backends.native_conv import NativeConv, Program, Wired
from resnet_fused.kept import Kept
from resnet_fused.ops.schema import is_channels_last
from resnet_fused.process_lock import ProcessLock

_MOST_SHAPES = 8  # input shapes whose choice is remembered for one convolution


def conv_padding(conv: nn.Conv2d) -> list[int] | None:
    """Padding in pixels; None where the two sides of the image are padded differently."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def state_of(bn: nn.BatchNorm2d | None) -> tuple[Tensor | None, ...]:
    """What changes with what BN with fixed statistics computes.

    The counter of batches is with it: eager PyTorch's kernel writes running statistics without a
    new version.
    """
    if bn is None:
        return ()
    buffers, parameters = bn._buffers, bn._parameters  # getattr costs more than the whole key
    return (
        buffers["running_mean"],
        buffers["running_var"],
        parameters["weight"],
        parameters["bias"],
        buffers["num_batches_tracked"],
    )


@dataclass(frozen=True, slots=True, eq=False)
class OneDNNConv:
    """One convolution in oneDNN's own layout."""

    folded: onednn.Folded
    weight: Tensor
    output_shape: tuple[int, ...]
    algorithm: str = "onednn"


Prepared = NativeConv | OneDNNConv


@dataclass(eq=False)
class Folded:
    """One convolution and its fold, and for each input shape what runs it."""

    weight: Tensor
    scale: Tensor | None  # (K,) float64
    shift: Tensor | None  # (K,) float64, or the convolution's own bias
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    dtype: torch.dtype
    prepared: dict[tuple[object, ...], Prepared | None] = field(default_factory=dict)
    packed: dict[str, Tensor] = field(default_factory=dict)
    lock: ProcessLock = field(default_factory=ProcessLock)

    def for_shape(self, shape: torch.Size | tuple[int, ...], precision: str) -> Prepared | None:
        """What runs inputs of this shape under a policy; None where another path has to."""
        key = shape, precision, torch.get_num_threads()
        try:
            return self.prepared[key]
        except KeyError:
            pass
        with self.lock.here(), torch.no_grad():
            if len(self.prepared) >= _MOST_SHAPES:
                self.prepared.clear()
            self.prepared[key] = self._prepare(shape, precision)
            return self.prepared[key]

    def _prepare(self, shape: tuple[int, ...], precision: str) -> Prepared | None:
        problem = self.problem(shape)
        algorithm = conv_choice.LIBRARY if problem is None else choose(problem, precision)
        if problem is None or algorithm == conv_choice.LIBRARY:
            return None
        return self.prepare(problem, algorithm)

    def problem(self, shape: tuple[int, ...]) -> conv_choice.ConvProblem | None:
        """The convolution for inputs of this shape; None where another path has to take them."""
        weight = self.weight
        if (
            len(shape) != 4
            or 0 in shape
            or shape[1] != weight.shape[1] * self.groups
            or onednn.is_small(self.dtype, shape, weight, self.groups)
        ):
            return None
        problem = conv_choice.ConvProblem(
            shape[0], shape[1], (shape[2], shape[3]), weight.shape[0],
            (weight.shape[2], weight.shape[3]), (self.stride[0], self.stride[1]),
            (self.padding[0], self.padding[1]), (self.dilation[0], self.dilation[1]), self.groups,
            self.dtype == torch.bfloat16,
        )  # fmt: skip
        return problem if min(problem.out_size) > 0 else None

    def prepare(self, problem: conv_choice.ConvProblem, algorithm: str) -> Prepared:
        """The weights packed for an algorithm."""
        size = (problem.batch, problem.out_channels, *problem.out_size)
        # The kernels read weights of the data's dtype only (under autocast they differ).
        if algorithm != "onednn" and self.weight.dtype == self.dtype:
            pairs = conv_choice.multiplies_bf16(problem, algorithm)
            return self._native(algorithm, size, pairs=pairs)
        shape = problem.batch, problem.channels, *problem.size
        reordered = onednn.reorder(self.for_onednn, shape)
        for known in self.prepared.values():
            if isinstance(known, OneDNNConv) and _same_layout(known.weight, reordered):
                reordered = known.weight
        return OneDNNConv(self.for_onednn, reordered, size)

    def _native(self, algorithm: str, size: tuple[int, ...], *, pairs: bool) -> NativeConv:
        if algorithm not in self.packed:
            self.packed[algorithm] = native_conv.pack(
                self.weight, self.scale, self.stride[0], self.groups, algorithm, pairs=pairs
            )
        geometry = (*self.stride, *self.padding, *self.dilation, self.groups)
        return NativeConv(
            algorithm, self.packed[algorithm], self.weight, *self._vectors, geometry, size
        )

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        outputs = self.weight.shape[0]
        scale = torch.ones(outputs) if self.scale is None else self.scale.float()
        shift = torch.zeros(outputs) if self.shift is None else self.shift.float().contiguous()
        return scale, shift

    @cached_property
    def for_onednn(self) -> onednn.Folded:
        return onednn.fold(
            self.weight, self.scale, self.shift,
            self.stride, self.padding, self.dilation, self.groups, dtype=self.dtype,
        )  # fmt: skip


def algorithms(problem: conv_choice.ConvProblem, precision: str) -> tuple[str, ...]:
    """What may run a problem on this machine under a precision policy."""
    own: tuple[str, ...] = ()
    if native_conv.unusable(_dtype(problem)) is None:
        own = conv_choice.candidates(problem, precision)
    return (*own, "onednn") if _onednn_is_exact(problem, precision) else own


def choose(problem: conv_choice.ConvProblem, precision: str) -> str:
    """The algorithm that runs a problem now: the measured one, or the one expected to be best.

    PyTorch's own convolution is :data:`conv_choice.LIBRARY`.
    """
    admitted = algorithms(problem, precision)
    if len(admitted) < 2:
        return admitted[0] if admitted else conv_choice.LIBRARY
    measured = _measured().get(problem.key(torch.get_num_threads()))
    return conv_choice.choose(problem, precision, measured, onednn="onednn" in admitted)


def _onednn_is_exact(problem: conv_choice.ConvProblem, precision: str) -> bool:
    """Whether oneDNN errs as little as a precision policy asks for."""
    return precision != "strict" or not onednn.is_product(
        _dtype(problem), problem.batch, problem.kernel, problem.stride, problem.dilation
    )


def _dtype(problem: conv_choice.ConvProblem) -> torch.dtype:
    return torch.bfloat16 if problem.bf16 else torch.float32


def machine() -> str:
    """What a measured choice holds for: processor, instruction set and versions."""
    isa = native.isa() if native.available else "none"
    return f"{native_conv.processor()}, {isa}, torch {torch.__version__}"[:200]


@lru_cache(maxsize=1)
def _measured() -> dict[str, str]:
    return tuning_cache.read(machine())


def forget_measured() -> None:
    """Read the measured choices again; convolutions that are packed already keep theirs."""
    _measured.cache_clear()


def fold_of(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> Folded | None:
    """A convolution and its batch norm folded; None where oneDNN would not run its dtype."""
    if conv_padding(conv) is None or onednn.unusable(dtype) is not None:
        return None
    return _fold(conv, bn, dtype)


def run(
    prepared: Prepared, input: Tensor, residual: Tensor | None, act: str, negative_slope: float
) -> Tensor:
    """act(conv(input) [+ residual]) by what was prepared for it; channels_last."""
    if isinstance(prepared, NativeConv):
        return program(prepared, residual is not None, act, negative_slope)(input, residual)
    return onednn.convolve(
        prepared.folded,
        prepared.weight,
        onednn.channels_last(input),
        None if residual is None else onednn.channels_last(residual),
        act,
        negative_slope,
        output_shape=prepared.output_shape,
        carry_bounds=True,
    )


def program(conv: NativeConv, adds: bool, act: str, negative_slope: float) -> Program:
    """A convolution by itself, whose residual, if any, comes from outside."""
    return Program([(conv, Wired(0, 1 if adds else -1, act, negative_slope))])


class PackedConv(Kept[Folded]):
    """The fold of one convolution and one batch norm (or none), packed for what runs it."""

    def __init__(self) -> None:
        super().__init__()
        self._program: tuple[object, Program] | None = None

    def folded(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> Folded:
        """The fold of the present weights, for inputs of this dtype."""
        weights = conv._parameters["weight"], conv._parameters["bias"]
        options = (
            dtype, conv.stride, conv.padding, conv.dilation, conv.groups,
            None if bn is None else bn.eps,
        )  # fmt: skip
        return self.get(
            options,
            (*weights, *state_of(bn)),
            lambda: _fold(conv, bn, dtype),
        )

    def __call__(
        self,
        input: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        residual: Tensor | None,
        act: str,
        negative_slope: float,
    ) -> Tensor | None:
        """act(bn(conv(input)) [+ residual]) with fixed statistics, without gradients.

        Input or weights are channels_last, and so is the output. None if they are not (oneDNN then
        copies to a layout of its own and back, which costs more than fusing saves), if the
        arguments do not fit together, or if eager PyTorch would not call oneDNN either.
        """
        if not is_channels_last(input) and not is_channels_last(conv.weight):
            return None
        folded = self.folded(conv, bn, input.dtype)
        prepared = folded.for_shape(input.shape, policy.current())
        if prepared is None or not (
            residual is None
            or (
                residual.shape == prepared.output_shape
                and residual.dtype == input.dtype
                and residual.is_cpu
                and residual.layout == torch.strided
            )
        ):
            return None
        if isinstance(prepared, NativeConv):
            key = (prepared, residual is None)
            known = self._program
            if known is None or known[0] != key:
                adds = residual is not None
                known = self._program = key, program(prepared, adds, act, negative_slope)
            return known[1](input, residual)
        return run(prepared, input, residual, act, negative_slope)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    describe = torch.ops.mkldnn._get_mkldnn_serialized_md
    return a.is_mkldnn and b.is_mkldnn and torch.equal(describe(a), describe(b))


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> Folded:
    padding = conv_padding(conv)
    assert padding is not None  # the matcher leaves such convolutions alone
    scale, shift = None, None if conv.bias is None else conv.bias.detach()
    if bn is not None:
        assert bn.running_mean is not None and bn.running_var is not None
        scale, shift = fold.scale_and_shift(
            bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
            conv_bias=conv.bias, dtype=torch.float64,
        )  # fmt: skip
    return Folded(
        conv.weight.detach(), scale, shift,
        list(conv.stride), padding, list(conv.dilation), conv.groups, dtype,
    )  # fmt: skip
