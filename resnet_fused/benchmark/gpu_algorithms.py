"""Measures what runs each convolution of a model fastest on this GPU, in evaluation or training."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import tuning_cache
from resnet_fused.api import fuse
from resnet_fused.backends import cuda_conv
from resnet_fused.backends.triton import configs, support
from resnet_fused.conv_choice import LIBRARY, ConvProblem
from resnet_fused.graph.observe import conv_inputs
from resnet_fused.ops import gpu, gpu_choice, gpu_train
from resnet_fused.ops.gpu_choice import Kind
from resnet_fused.ops.schema import statistics_dtype
from resnet_fused.packing import conv_padding

from .case import BenchmarkError, one_line
from .measure import interleave, recorded
from .tuned import Tuned

_L2_TIMES = 3  # what the tensors that are gone through are of the L2 cache
_MOST_COPIES = 64

Call = Callable[[], Any]
Progress = Callable[[int, int, str], None]


def tune(
    model: nn.Module,
    images: Tensor,
    *,
    repeats: int,
    progress: Progress,
    training: bool = False,
    limit_s: float = math.inf,
    known: Collection[str] = (),
    triton: bool = True,
    keep: Callable[[Tuned], None] = lambda tuned: None,
) -> list[Tuned]:
    """Time everything that may run each distinct convolution of a model, and keep the fastest.

    In turns, as CUDA graphs, over tensors that are cold in L2. A kernel whose result is not the
    library's but for rounding cannot be chosen. The choices go to the cache file and hold from now
    on; what torch.compile has kept on disk was made with those before.

    Args:
        model: fused or not; it is copied.
        images: what its forward takes, in the dtype to tune for, channels_last, on the GPU.
        repeats: samples of each kernel.
        training: tune the convolutions of a training step instead of those of an evaluation.
        limit_s: no further problem is begun after so many seconds; those with the most
            multiplications come first.
        known: keys of problems that are left out, as they were tuned before.
        triton: time Triton's kernels, too; compiling them takes most of the time.
        keep: told each problem as soon as it is timed.

    Raises:
        BenchmarkError: Triton's kernels cannot run here.
        OSError: the choices cannot be written.
    """
    reason = support.unusable(images)
    if reason is not None:
        raise BenchmarkError(f"nothing to tune: {reason}")
    machine = gpu_choice.machine(images.get_device())
    tuning_cache.update(machine, {})  # raises now rather than after all the timing
    end = time.monotonic() + limit_s
    named = _layers(model, images)
    asked = [
        (kind, p, named.get(p, []))
        for kind, p in _asked(model, images, training)
        if gpu_choice.key(kind, p, images.dtype) not in known
    ]
    asked.sort(key=lambda row: (-_multiplications(row[1]) * max(len(row[2]), 1), str(row[:2])))
    results: list[Tuned] = []
    for done, (kind, problem, layers) in enumerate(asked):
        if results and time.monotonic() > end:
            break
        progress(done, len(asked), f"timing {(*layers, 'a convolution')[0]}")
        names = gpu_choice.admitted(
            kind, problem, images.dtype, support.architecture(images.get_device())
        )
        if not triton:
            names = tuple(name for name in names if name not in configs.BY_NAME)
        taken = times(kind, problem, names, images.dtype, images.device, repeats)
        chosen = min(taken, key=lambda name: taken[name])
        key = gpu_choice.key(kind, problem, images.dtype)
        results.append(Tuned(key, tuple(layers), LIBRARY, chosen, taken))
        keep(results[-1])
    progress(len(asked), len(asked), "done")
    tuning_cache.update(machine, {t.problem: t.chosen for t in results})
    gpu_choice.forget_measured()
    return results


def _asked(model: nn.Module, images: Tensor, training: bool) -> set[tuple[Kind, ConvProblem]]:
    """What a fused copy has to choose for when it runs on these images."""
    fused = fuse(model).train(training)
    with torch.set_grad_enabled(training), gpu_choice.asked() as found:
        fused(images)
    return found


def _layers(model: nn.Module, images: Tensor) -> dict[ConvProblem, list[str]]:
    """The names of the convolutions that are alike."""
    found: dict[ConvProblem, list[str]] = {}
    modules = dict(model.named_modules())
    for name, seen in conv_inputs(model, [images]).items():
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        padding = conv_padding(conv)
        if padding is not None:
            problem = gpu_choice.conv_problem(
                seen.shape, conv.weight.shape, conv.stride, padding, conv.dilation, conv.groups
            )
            found.setdefault(problem, []).append(name)
    return found


def _multiplications(p: ConvProblem) -> int:
    height, width = p.out_size
    outputs = p.batch * p.out_channels * height * width
    return outputs * p.channels // p.groups * p.kernel[0] * p.kernel[1]


def times(
    kind: Kind,
    problem: ConvProblem,
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, float]:
    """Median milliseconds of what is named, the library first, as far as it agrees with that."""
    first = _Data(problem, dtype, device, 0)
    copies = min(_MOST_COPIES, math.ceil(_L2_TIMES * _cache_bytes(device) / first.bytes))
    data = [first, *(_Data(problem, dtype, device, i) for i in range(1, copies))]
    calls: dict[str, Call] = {}
    wanted: Sequence[Tensor] = ()
    with gpu.kernels("launch").compiling_ahead():
        for name in names:
            with contextlib.suppress(Exception):  # raised again where it is launched
                _MAKE[kind](name, first)()
    for name in names:
        ready = [_MAKE[kind](name, d) for d in data]
        try:
            found = _tensors(ready[0]())
            torch.cuda.synchronize(device)
        except Exception as error:  # a compiler may refuse in any way: not a candidate
            if name == LIBRARY:
                raise BenchmarkError(f"{problem.geometry}: {one_line(error)}") from error
            continue
        wanted = wanted or found
        if agree(found, wanted, dtype):
            calls[name] = recorded(partial(_run_all, ready), device)
    with torch.no_grad():
        timings = interleave(calls, repeats=repeats, device=device)
    return {name: timing.median_ms / copies for name, timing in timings.items()}


def _cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether results differ by no more than roundings of the largest number, and are as finite.

    Each side rounds once to `dtype`; eight roundings of float32 are for its long sums.
    """
    rounding = torch.finfo(dtype).eps
    if gpu_choice.precision(dtype) == "tf32":
        rounding = torch.finfo(torch.float16).eps  # as many bits
    limit = max(2 * rounding, 8 * torch.finfo(torch.float32).eps)
    return all(_difference(a, b) <= limit for a, b in zip(found, wanted, strict=True))


def _difference(found: Tensor, wanted: Tensor) -> float:
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return math.inf
    a, b = (t.float().nan_to_num(0.0, 0.0, 0.0) for t in (found, wanted))
    largest = b.abs().max()
    return float((a - b).abs().max() / largest) if largest > 0 else float(a.abs().max())


def _tensors(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _noise(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, device=device).to(dtype)
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


class _Data:
    """Tensors of a problem, others for each seed."""

    def __init__(self, p: ConvProblem, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        noise = partial(_noise, dtype=dtype, device=device)
        vector = partial(_noise, dtype=statistics_dtype(dtype), device=device)
        fan = p.channels // p.groups * p.kernel[0] * p.kernel[1]
        self.x = noise(p.batch, p.channels, *p.size, seed=100 + seed)
        self.grad = noise(p.batch, p.out_channels, *p.out_size, seed=200 + seed)
        weight = noise(p.out_channels, p.channels // p.groups, *p.kernel, seed=300 + seed)
        self.weight = weight / fan**0.5
        self.scale = vector(p.out_channels, seed=2).abs() + 0.5
        self.shift = vector(p.out_channels, seed=3)
        self.geometry = (list(p.stride), list(p.padding), list(p.dilation), p.groups)
        self.norm = gpu.kernels("conv_bn_act").Norm(
            vector(p.channels, seed=4), vector(p.channels, seed=5).abs() + 0.5,
            vector(p.channels, seed=6).abs() + 0.5, vector(p.channels, seed=7), 1e-5, "relu", 0.0,
        )  # fmt: skip
        self.precision = gpu_choice.precision(dtype)

    @property
    def bytes(self) -> int:
        """What a call reads and writes at least."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.grad, self.weight))


def _inference(name: str, d: _Data) -> Call:
    if name in cuda_conv.BY_NAME:
        stride, padding, dilation, groups = d.geometry
        packed = cuda_conv.Packed.of(d.weight, groups, name)
        return partial(packed, d.x, d.scale, d.shift, None, stride, padding, dilation, "relu", 0.0)
    return partial(
        gpu.run_conv, name, d.x, d.weight, d.scale, d.shift, None, *d.geometry, "relu", 0.0
    )


def _train_output(name: str, d: _Data, norm: Sequence[Any] | None = None) -> Call:
    ops = torch.ops.resnet_fused

    def library() -> tuple[Tensor, ...]:
        a = d.x if norm is None else ops.normalize_act(d.x, None, *norm)
        z = torch.conv2d(a, d.weight, None, *d.geometry)
        return z, *ops.batch_statistics(z)

    if name == LIBRARY:
        return library
    return partial(gpu_train.forward, d.x, norm, d.weight, None, d.geometry, name)


def _train_behind_norm(name: str, d: _Data) -> Call:
    return _train_output(name, d, d.norm)


def _train_input(name: str, d: _Data) -> Call:
    def library() -> tuple[Tensor, ...]:
        grad_x = _library_gradient(d)
        _, *sums = torch.ops.resnet_fused.bn_act_backward_sums(
            grad_x, d.x, None, None, *d.norm, False
        )
        return grad_x, *sums

    if name == LIBRARY:
        return library
    return partial(gpu_train.backward_input, d.grad, d.x, d.norm, d.weight, None, d.geometry, name)


def _train_tensor_input(name: str, d: _Data) -> Call:
    """With what a block adds to its input's gradient; any tensor of that shape will do."""
    if name == LIBRARY:
        return lambda: _library_gradient(d) + d.x
    return partial(gpu_train.backward_tensor_input, d.grad, d.weight, d.x, d.geometry, name)


def _library_gradient(d: _Data) -> Tensor:
    stride, padding, dilation, groups = d.geometry
    return torch.ops.aten.convolution_backward(
        d.grad, d.x, d.weight, None, stride, padding, dilation, False, [0, 0], groups,
        [True, False, False],
    )[0]  # fmt: skip


_MAKE: dict[Kind, Callable[[str, _Data], Call]] = {
    "inference": _inference,
    "train_output": _train_output,
    "train_behind_norm": _train_behind_norm,
    "train_input": _train_input,
    "train_tensor_input": _train_tensor_input,
}
