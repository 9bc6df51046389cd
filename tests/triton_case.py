"""Where Triton's kernels are tested: on a GPU, or on CPU tensors in Triton's interpreter.

The interpreter wants TRITON_INTERPRET=1 before Triton is imported, so these tests have a run of
their own (``make test-triton``, part of ``make test``). In it CPU tensors stand in for CUDA ones:
they take the same way through modules and operators, and the same launchers start the kernels. Two
things the interpreter gets wrong are left to the GPU and to the text of the compiled kernels
(test_triton_gate.py): ``tl.dot`` of bfloat16, and NaN in ``tl.maximum``.

What is compared with is eager PyTorch on a GPU. In the interpreter the plain formula in float32
stands in for it: eager batch norm on a CPU adds up in float64, which no GPU does.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from resnet_fused.backends.triton import (
    batch_statistics,
    bn_act,
    configs,
    conv_bn_act,
    launch,
    scale_shift_act,
    support,
)
from resnet_fused.benchmark.measure import tensor_float_32
from resnet_fused.conv_choice import LIBRARY
from resnet_fused.ops import gpu, gpu_choice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"

needs_kernels = pytest.mark.skipif(
    not (HAS_GPU or INTERPRETED),
    reason="needs a CUDA GPU or TRITON_INTERPRET=1 (make test-triton)",
)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")

DOT_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU
"""What a convolution can be tested with here."""


@pytest.fixture(autouse=True)
def gpus_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import this into a test file: CPU tensors go where CUDA tensors would, if there is no GPU."""
    monkeypatch.setattr(support, "LEAST_BLOCK_BYTES", 0)
    monkeypatch.setattr(support, "LEAST_STEP_BYTES", 0)
    if HAS_GPU:
        with tensor_float_32(False):
            yield
        return
    monkeypatch.setattr(support, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(support, "_unsupported", lambda device: None)
    monkeypatch.setattr(support, "architecture", lambda device: 90)
    monkeypatch.setattr(gpu_choice, "_measured", lambda device: {})
    monkeypatch.setattr(interpreter.ReduceOps, "sum", _sum_in_a_tree)
    library = torch.library.Library("resnet_fused", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one kernel in another's place is what is wanted
        for name, run in gpu.implementations().items():
            library.impl(name, run, "CPU", allow_override=True)
    yield
    library._destroy()


def _sum_in_a_tree(self: Any, input: Any) -> Any:
    """As a GPU adds up a tile. NumPy takes one row after the other, at several times the error."""
    data = input.handle.data
    shape = numpy.sum(data, self.axis, keepdims=self.keep_dims).shape
    data = data.reshape(1, -1) if self.axis is None else numpy.moveaxis(data, self.axis, -1)
    while data.shape[-1] > 1:  # sizes of tiles are powers of two
        data = data[..., ::2] + data[..., 1::2]
    return self.to_tensor(data.reshape(shape), input.dtype)


def kernels_and_plain(functions: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The kernels, and what they are compared with, of a maker of (tested, eager) for a backend."""
    tested, eager = functions("triton")
    return tested, eager if HAS_GPU else functions("reference")[0]


def on_device(args: Sequence[Any]) -> list[Any]:
    """The arguments with every tensor where the kernels are."""
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]


@contextlib.contextmanager
def chosen(monkeypatch: pytest.MonkeyPatch, config: configs.Config | str) -> Iterator[None]:
    """In here convolutions run by these tiles where they can, or by what is named."""
    name = config if isinstance(config, str) else config.name

    def choose(kind: str, input: Tensor, weight: Tensor, stride: Any, *geometry: Any) -> str:
        strided = kind == "train_input" and (tuple(stride) != (1, 1) or geometry[-1] > 1)
        return LIBRARY if strided or kind == "train_tensor_input" else name

    with monkeypatch.context() as patch:
        if not isinstance(config, str):
            patch.setattr(configs, "BY_NAME", {**configs.BY_NAME, name: config})
        patch.setattr(gpu_choice, "choose", choose)
        patch.setattr(gpu_choice, "generation", object())
        yield


@contextlib.contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are started in here."""
    names: list[str] = []

    def count(kernel: Any, *args: Any, **meta: Any) -> None:
        names.append(kernel.__name__)
        launch.launch(kernel, *args, **meta)

    with monkeypatch.context() as patch:
        for module in (scale_shift_act, batch_statistics, bn_act, conv_bn_act):
            patch.setattr(module, "launch", count)
        yield names
