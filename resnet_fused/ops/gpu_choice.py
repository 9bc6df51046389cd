"""What runs a convolution on a GPU: PyTorch's own and one fused pass, or a kernel that was faster.

The default everywhere is :data:`LIBRARY`: the convolution that eager PyTorch would call, then
scale, shift, residual and activation in one pass over its output, which replaces two to four: two
launches for three or four, and no more Python (``modules/conv_on_gpu.py``). Anything else runs only
for a problem for which it was measured to be faster on this GPU with these versions (``python -m
resnet_fused tune --device cuda``). Nothing is ever timed while a model runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from resnet_fused import tuning_cache
from resnet_fused.backends import cuda_conv, gpu_kernels, native_cuda
from resnet_fused.backends.triton import configs, support
from resnet_fused.conv_choice import LIBRARY, ConvProblem, TrainingAlgorithms, turned
from resnet_fused.ops.schema import is_channels_last

Kind = Literal[
    "inference", "train_output", "train_behind_norm", "train_input", "train_tensor_input"
]
"""Evaluation; training's forward, of a tensor or of act(bn(tensor)); the gradient of such an
act(bn(tensor)) or of a tensor.
"""

_STEPS: dict[Kind, cuda_conv.Step] = {
    "train_output": "forward",
    "train_behind_norm": "forward",
    "train_input": "gradient",
}

MOST_PIXELS = 2**31 - 256
"""Output pixels (N · H · W) that a kernel can count, with a tile that reaches past the end; offsets
of elements have 64 bits.
"""

MOST_GROUPS = 65535
"""The second dimension of a grid (CUDA programming guide, table of limits)."""

STEM = cuda_conv.STEM.name
"""What runs a stem of three channels unless something else was measured: cuDNN pads them to eight,
and took 1.76 ms for ResNet-50's at batch 256 on an H200, whose memory needs 0.12.
"""

_only_triton: ContextVar[bool] = ContextVar("only_triton", default=False)
_asked: ContextVar[set[tuple[Kind, ConvProblem]] | None] = ContextVar("asked", default=None)
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def conv_problem(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """The convolution of an input of this shape with a weight of the shape `kernel`."""
    return ConvProblem(
        shape[0], shape[1], (shape[2], shape[3]), kernel[0], (kernel[2], kernel[3]),
        (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups,
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How convolutions multiply numbers by torch's switches: "tf32" or "ieee" (as they are)."""
    if dtype != torch.float32:
        return "ieee"
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"


def admitted(kind: Kind, problem: ConvProblem, dtype: torch.dtype, arch: int) -> tuple[str, ...]:
    """Everything that may run a problem on a GPU of compute capability `arch`."""
    height, width = problem.out_size
    if problem.batch * height * width > MOST_PIXELS or problem.groups > MOST_GROUPS:
        return (LIBRARY,)
    if kind != "inference" and dtype == torch.float32:  # the epilogues' registers do not suffice
        return (LIBRARY,)
    if kind in ("train_input", "train_tensor_input"):
        if problem.stride != (1, 1) or problem.groups > 1:
            return (LIBRARY,)
        problem = turned(problem)
        if min(problem.padding) < 0:
            return (LIBRARY,)
    step, code = _STEPS.get(kind, "inference"), native_cuda.code_for(arch)
    compiled: tuple[str, ...] = ()
    if dtype != torch.float32 or precision(dtype) == "tf32":
        room = configs.shared_bytes(arch)
        compiled = cuda_conv.candidates(problem, dtype, code, room, step)
    if kind == "train_tensor_input":  # Triton's gathers what a batch norm wants; stems do not turn
        return LIBRARY, *(name for name in compiled if name != STEM)
    found = configs.candidates(problem, dtype.itemsize, arch, precision(dtype))
    return LIBRARY, *compiled, *(config.name for config in found)


def key(kind: Kind, problem: ConvProblem, dtype: torch.dtype) -> str:
    """A problem's name in the cache of measured choices."""
    name = "tf32" if precision(dtype) == "tf32" else _NAMES[dtype]
    return f"{kind} {name} {problem.geometry}"


def choose(
    kind: Kind,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """:data:`LIBRARY` or the name of a Triton kernel's tiles, which are for channels_last only.

    Args:
        input: of which only shape, strides and dtype are read.
    """
    device, forced, asked = weight.get_device(), _only_triton.get(), _asked.get()
    if not (forced or asked is not None or native_cuda.available or _measured(device)):
        return LIBRARY
    if kind == "train_tensor_input" and not native_cuda.available:  # Triton has no kernel for it
        return LIBRARY
    if not all(type(n) is int for n in input.shape):  # symbols: torch.compile, dynamic shapes
        return LIBRARY
    if not (forced or is_channels_last(input)):
        return LIBRARY
    problem = conv_problem(input.shape, weight.shape, stride, padding, dilation, groups)
    if asked is not None:
        asked.add((kind, problem))
        return LIBRARY
    name = _chosen(kind, problem, input.dtype, precision(input.dtype), device)
    if not forced or name in configs.BY_NAME:
        return name
    if kind == "train_tensor_input":
        return LIBRARY
    allowed = admitted(kind, problem, input.dtype, support.architecture(device))
    tiles = [n for n in allowed if n in configs.BY_NAME]
    if not tiles:
        raise RuntimeError(f"backend: 'triton' has no tiles for the convolution {problem.geometry}")
    return tiles[0]


@contextlib.contextmanager
def asked() -> Iterator[set[tuple[Kind, ConvProblem]]]:
    """Collects what there is to choose for; in here the library runs it."""
    found: set[tuple[Kind, ConvProblem]] = set()
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def only_triton() -> Iterator[None]:
    """In here a convolution is Triton's, by the tiles measured to be best, or the first."""
    token = _only_triton.set(True)
    try:
        yield
    finally:
        _only_triton.reset(token)


@functools.lru_cache(maxsize=4096)
def _chosen(
    kind: Kind, problem: ConvProblem, dtype: torch.dtype, precision: str, device: int
) -> str:
    allowed = admitted(kind, problem, dtype, support.architecture(device))
    name = _measured(device).get(key(kind, problem, dtype))
    if name is None:
        return STEM if STEM in allowed else LIBRARY
    return name if name in allowed else LIBRARY


def choose_training(
    input: Tensor, weight: Tensor, geometry: tuple[Any, ...], *, act: str | None
) -> TrainingAlgorithms:
    """What computes a convolution in training, its input's and its weight's gradient.

    Args:
        act: the convolution reads act(bn(input)); None if it reads the input itself.
    """
    if gpu_kernels.unusable(input) is not None:
        return TrainingAlgorithms(LIBRARY, LIBRARY, LIBRARY)
    kinds: tuple[Kind, Kind] = ("train_behind_norm", "train_input")
    if act is None:
        kinds = "train_output", "train_tensor_input"
    output, gradient = (choose(kind, input, weight, *geometry) for kind in kinds)
    if act is not None and act not in cuda_conv.ACTIVATIONS:
        output, gradient = (LIBRARY if n in cuda_conv.BY_NAME else n for n in (output, gradient))
    return TrainingAlgorithms(output, gradient, LIBRARY)


@functools.cache
def machine(device: int) -> str:
    """What a measured choice holds for: the GPU and the versions of all that runs on it."""
    properties = torch.cuda.get_device_properties(device)
    versions = f"torch {torch.__version__}, cudnn {torch.backends.cudnn.version()}"
    return f"{properties.name}, sm_{support.architecture(device)}, {versions}"[:200]


@functools.cache
def _measured(device: int) -> dict[str, str]:
    return tuning_cache.read(machine(device))


generation = 0
"""Another number whenever the measured choices may be others."""


def state(dtype: torch.dtype) -> tuple[object, ...]:
    """What a choice depends on beside the problem."""
    return generation, precision(dtype)


def forget_measured() -> None:
    """Read the measured choices again."""
    global generation
    generation += 1
    _measured.cache_clear()
    _chosen.cache_clear()
