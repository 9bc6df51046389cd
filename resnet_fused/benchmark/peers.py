"""The variants of a model that are compared: what each does to it, and how one step of it is run.

eager: the model as it is, contiguous (NCHW)
eager_channels_last: the same in channels_last (NHWC)
eager_graph: that captured as one CUDA graph, for inference on a GPU
compile: torch.compile in channels_last, for inference on the CPU with freezing
compile_max_autotune: torch.compile that tries more kernels and captures graphs, on a GPU
onnxruntime, openvino: exported to ONNX and run by that library on the CPU
fused: resnet_fused.fuse of the channels_last model
fused_graph: that captured as one CUDA graph, for inference on a GPU
fused_low: fused with memory="low", for training

Each has a copy of the weights of its own, so none finds another's packed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused

from .case import BenchmarkError, Case
from .inputs import random_labels
from .prepare import distinct_images, repeat_images

VARIANTS = (
    "eager", "eager_channels_last", "eager_graph", "compile", "compile_max_autotune",
    "onnxruntime", "openvino", "fused", "fused_graph", "fused_low",
)  # fmt: skip
ALIASES = {"channels_last": "eager_channels_last"}
_GRAPHS = ("eager_graph", "fused_graph")
ON_GPU_ONLY = (*_GRAPHS, "compile_max_autotune")
_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}


class Variant(Protocol):
    """A prepared variant: calling it runs one step on the images it was made for."""

    memory_shows: bool
    """Whether memory measured from outside says what a step needs (a pool of its own hides it)."""

    def __call__(self) -> object: ...

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """A step on other images of this shape: "output", in training also each gradient."""
        ...


class TorchVariant:
    """A variant that is a PyTorch module.

    Args:
        run: what is called; `model` itself, or what torch.compile or a capture made of it.
        autocast: the dtype that forward runs in under torch.autocast, None for the model's own.
        memory_shows: see :class:`Variant`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        training: bool,
        run: Callable[[Tensor], Any] | None = None,
        autocast: torch.dtype | None = None,
        memory_shows: bool = True,
    ) -> None:
        self.model = model
        self.images = images
        self.training = training
        self.run = model if run is None else run
        self.autocast = autocast
        self.memory_shows = memory_shows
        self.labels: Tensor | None = None

    def __call__(self) -> object:
        if self.training:
            return self._train(self.images)
        with torch.inference_mode():
            return self.run(self.images)

    def forward_loss(self) -> Tensor:
        """The forward half of a training step on its own images."""
        return self._loss(self.images)[0]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        images = images.to(self.images).contiguous(memory_format=_memory_format(self.images))
        if not self.training:
            with torch.inference_mode():
                return {"output": _logits(self.run(images))}
        result = {"output": self._train(images).detach()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                result[name] = parameter.grad.clone()
        return result

    def _train(self, images: Tensor) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss, logits = self._loss(images)
        loss.backward()
        return logits

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        kind = images.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            logits = _logits(self.run(images))
            if self.labels is None:
                self.labels = _labels(logits)
            return F.cross_entropy(logits, self.labels), logits


class RuntimeVariant:
    """A variant run by a library that takes and gives numpy arrays."""

    memory_shows = False

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], images: Tensor) -> None:
        self.run = run
        self.images = _array(images)

    def __call__(self) -> object:
        return self.run(self.images)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        array = _array(images).astype(self.images.dtype, copy=False)
        return {"output": torch.from_numpy(np.array(self.run(array)))}


def parse_peers(text: str, case: Case) -> tuple[str, ...]:
    """The variants that ``--peers`` asks for, in the order of :data:`VARIANTS`.

    "all": every one, on the CPU but for those of a GPU alone, whether or not it can run in `case`;
    "none": only eager, the base of every ratio, and fused; otherwise names with commas between.

    Raises:
        BenchmarkError: for an unknown name, and for one that cannot run in `case`.
    """
    if text == "all":
        return tuple(name for name in VARIANTS if case.on_gpu or name not in ON_GPU_ONLY)
    names = [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]
    wanted = {"eager", "fused"}
    for name in (ALIASES.get(name, name) for name in names):
        if name not in VARIANTS:
            raise BenchmarkError(
                f"unknown peer {name!r}; there are {', '.join(VARIANTS)}, all and none"
            )
        reason = why_not(name, case)
        if reason is not None:
            raise BenchmarkError(reason)
        wanted.add(name)
    return tuple(name for name in VARIANTS if name in wanted)


def why_not(name: str, case: Case) -> str | None:
    """Why `name` cannot take part in `case`; None if it can."""
    if name == "fused_low" and case.mode != "training":
        return "fused_low is for training; leave it out or use --mode training"
    if name in ON_GPU_ONLY and not case.on_gpu:
        return f"{name} runs on a GPU only, not on {case.device}"
    if name in _GRAPHS and case.mode == "training":
        return f"{name} captures inference only; leave it out or use --mode inference"
    if name not in _RUNTIMES:
        return None
    if case.mode == "training":
        return f"{name} cannot train; leave it out or use --mode inference"
    if case.device != "cpu":
        return f"{name} is measured on the CPU only, not on {case.device}"
    if name == "onnxruntime" and case.dtype == "bf16":
        return "onnxruntime has no bf16 convolution on the CPU; use --dtype fp32"
    for package in _RUNTIMES[name]:
        if importlib.util.find_spec(package) is None:
            return f"{name} needs the package {package}: pip install 'resnet_fused[bench]'"
    return None


def make_variant(name: str, model: nn.Module, images: Tensor, case: Case) -> Variant:
    """Make variant `name` of `model`, which is not changed, for steps on `images`.

    Raises:
        BenchmarkError: if it cannot take part in `case`.
    """
    reason = why_not(name, case)
    if reason is not None:
        raise BenchmarkError(reason)
    model = copy.deepcopy(model)
    training = case.mode == "training"
    kind: dict[str, Any] = {"training": training, "autocast": case.autocast_dtype}
    if name == "eager":
        return TorchVariant(model, images, **kind)
    if name in _RUNTIMES:
        runtime = _onnxruntime if name == "onnxruntime" else _openvino
        return RuntimeVariant(runtime(model, images, case), images)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=torch.channels_last)
    if name.startswith("fused"):
        memory = "low" if name == "fused_low" else "default"
        model = resnet_fused.fuse(model, inplace=True, memory=memory)
    if name in _GRAPHS:
        graph = resnet_fused.capture(model, images)
        return TorchVariant(model, images, run=graph, memory_shows=False, **kind)
    if name == "compile":
        options: Any = {"freezing": True} if not training and case.device == "cpu" else None
        compiled: Any = torch.compile(model, options=options)
        return TorchVariant(model, images, run=compiled, **kind)
    if name == "compile_max_autotune":
        compiled = torch.compile(model, mode="max-autotune")
        return TorchVariant(model, images, run=compiled, memory_shows=False, **kind)
    return TorchVariant(model, images, **kind)


def _onnxruntime(
    model: nn.Module, images: Tensor, case: Case
) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with _exported(model, images) as path:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]


def _openvino(model: nn.Module, images: Tensor, case: Case) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    # Without the hint OpenVINO computes fp32 networks in bf16 where the CPU can.
    precision = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[case.dtype]
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with _exported(model.float(), images.float()) as path:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()

    def run(array: np.ndarray) -> np.ndarray:
        return request.infer([array.astype(np.float32, copy=False)], share_inputs=True)[0]

    return run


@contextlib.contextmanager
def _exported(model: nn.Module, images: Tensor) -> Iterator[Path]:
    """A temporary ONNX file of `model`, at the fixed shape of `images`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (images,), str(path), dynamo=True, verbose=False, external_data=False
            )
        yield path


def _labels(logits: Tensor) -> Tensor:
    """Labels that repeat as the images do that a step is judged on."""
    distinct = distinct_images(logits.shape[0], logits.device)
    return repeat_images(random_labels(logits[:distinct]), logits.shape[0])


def _logits(output: object) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BenchmarkError(f"the model must return a tensor [batch, classes], got {got}")
    return output


def _memory_format(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc and not tensor.is_contiguous() else torch.contiguous_format


def _array(images: Tensor) -> np.ndarray:
    if images.dtype == torch.bfloat16:  # which numpy does not have
        images = images.float()
    return images.contiguous().numpy()
