"""Measures what runs each convolution of a model fastest on this GPU, in evaluation or training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import tuning_cache
from resnet_fused.backends.triton import configs, support
from resnet_fused.conv_choice import LIBRARY, ConvProblem
from resnet_fused.graph.observe import conv_inputs
from resnet_fused.ops import gpu, gpu_choice
from resnet_fused.ops.gpu_choice import Kind
from resnet_fused.ops.schema import statistics_dtype
from resnet_fused.packing import conv_padding
from resnet_fused.parity import relative_error

from .case import BenchmarkError, one_line
from .measure import interleave
from .tuned import Tuned

_COLD_BYTES = 256 << 20  # of inputs that are gone through: several times a GPU's L2
_MOST_COPIES = 16
_AGREEMENT = 8  # roundings that a result may be from the library's, of the largest number

Call = Callable[[], Any]


def tune(
    model: nn.Module,
    images: Tensor,
    *,
    repeats: int,
    progress: Callable[[int, int, str], None],
    training: bool = False,
) -> list[Tuned]:
    """Time everything that may run each distinct convolution of a model, and keep the fastest.

    In turns, over inputs that are cold in L2. A kernel whose result is not the library's but for
    rounding cannot be chosen. The choices go to the cache file and hold from now on.

    Args:
        model: fused or not; it is copied.
        images: what its forward takes, in the dtype to tune for, channels_last, on the GPU.
        repeats: samples of each kernel.
        training: tune the convolutions of a training step instead of those of an evaluation.

    Raises:
        BenchmarkError: Triton's kernels cannot run here.
        OSError: the choices cannot be written.
    """
    reason = support.unusable(images)
    if reason is not None:
        raise BenchmarkError(f"nothing to tune: {reason}")
    kinds: tuple[Kind, ...] = ("train_output", "train_input") if training else ("inference",)
    problems: dict[tuple[Kind, ConvProblem], list[str]] = {}
    modules = dict(model.named_modules())
    for name, seen in conv_inputs(model, [images]).items():
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        padding = conv_padding(conv)
        if padding is None or not seen.channels_last:
            continue
        problem = gpu_choice.conv_problem(
            seen.shape, conv.weight.shape, conv.stride, padding, conv.dilation, conv.groups
        )
        for kind in kinds:
            problems.setdefault((kind, problem), []).append(name)
    results = []
    for done, ((kind, problem), layers) in enumerate(problems.items()):
        progress(done, len(problems), f"timing {layers[0]}")
        taken = times(kind, problem, images.dtype, images.device, repeats)
        chosen = min(taken, key=lambda name: taken[name])
        key = gpu_choice.key(kind, problem, images.dtype)
        results.append(Tuned(key, tuple(layers), LIBRARY, chosen, taken))
    progress(len(problems), len(problems), "done")
    machine = gpu_choice.machine(images.get_device())
    tuning_cache.update(machine, {t.problem: t.chosen for t in results})
    gpu_choice.forget_measured()
    return results


def times(
    kind: Kind, problem: ConvProblem, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, float]:
    """Median milliseconds of everything that runs a problem and agrees with the library."""
    arch = support.architecture(device.index or 0)
    make = {"inference": _inference, "train_output": _train_output, "train_input": _train_input}
    numbers = problem.batch * problem.channels * problem.size[0] * problem.size[1]
    copies = max(1, min(_MOST_COPIES, _COLD_BYTES // (numbers * dtype.itemsize)))
    data = [_Data(problem, dtype, device, i) for i in range(copies)]
    calls: dict[str, Call] = {}
    wanted: Sequence[Tensor] = ()
    for name in gpu_choice.admitted(kind, problem, dtype, arch):
        ready = [make[kind](name, d) for d in data]
        try:
            found = _tensors(ready[0]())
            torch.cuda.synchronize(device)
        except Exception as error:  # a compiler or cuDNN may refuse in any way: not a candidate
            if name == LIBRARY:
                raise BenchmarkError(f"{problem.geometry}: {one_line(error)}") from error
            continue
        wanted = wanted or found
        if _agree(found, wanted, dtype):
            calls[name] = _in_turns(ready)
    with torch.no_grad():
        timings = interleave(calls, repeats=repeats, device=device)
    return {name: timing.median_ms for name, timing in timings.items()}


def _in_turns(calls: Sequence[Call]) -> Call:
    turns = cycle(calls)
    return lambda: next(turns)()


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> bool:
    rounding = torch.finfo(dtype).eps
    if gpu_choice.precision(dtype) == "tf32":
        rounding = torch.finfo(torch.float16).eps  # as many bits
    return all(
        relative_error(a, b) <= _AGREEMENT * rounding for a, b in zip(found, wanted, strict=True)
    )


def _tensors(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _noise(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, device=device).to(dtype)
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


class _Data:
    """Tensors of a problem; what is large differs from set to set."""

    def __init__(self, p: ConvProblem, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        noise = partial(_noise, dtype=dtype, device=device)
        vector = partial(_noise, dtype=statistics_dtype(dtype), device=device)
        fan = p.channels // p.groups * p.kernel[0] * p.kernel[1]
        self.x = noise(p.batch, p.channels, *p.size, seed=100 + seed)
        self.grad = noise(p.batch, p.out_channels, *p.out_size, seed=200 + seed)
        self.weight = noise(p.out_channels, p.channels // p.groups, *p.kernel, seed=1) / fan**0.5
        self.scale = vector(p.out_channels, seed=2).abs() + 0.5
        self.shift = vector(p.out_channels, seed=3)
        folded = self.weight.to(self.scale.dtype) * self.scale[:, None, None, None]
        self.folded = folded.to(dtype)
        self.geometry = (list(p.stride), list(p.padding), list(p.dilation), p.groups)
        self.norm = gpu.kernels("conv_bn_act").Norm(
            vector(p.channels, seed=4), vector(p.channels, seed=5).abs() + 0.5,
            vector(p.channels, seed=6).abs() + 0.5, vector(p.channels, seed=7), 1e-5, "relu", 0.0,
        )  # fmt: skip
        self.precision = gpu_choice.precision(dtype)


def _inference(name: str, d: _Data) -> Call:
    weight, scale = (d.folded, None) if name == gpu_choice.CUDNN else (d.weight, d.scale)
    return partial(
        gpu.run_conv, name, d.x, weight, scale, d.shift, None, *d.geometry, "relu", 0.0
    )  # fmt: skip


def _train_output(name: str, d: _Data) -> Call:
    ops = torch.ops.resnet_fused

    def library() -> tuple[Tensor, ...]:
        z = torch.conv2d(ops.normalize_act(d.x, None, *d.norm), d.weight, None, *d.geometry)
        return z, *ops.batch_statistics(z)

    if name == LIBRARY:
        return library
    return partial(
        gpu.kernels("conv_bn_act").train_conv, d.x, d.norm, d.weight, None, *d.geometry,
        configs.BY_NAME[name], d.precision,
    )  # fmt: skip


def _train_input(name: str, d: _Data) -> Call:
    stride, padding, dilation, groups = d.geometry

    def library() -> tuple[Tensor, ...]:
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            d.grad, d.x, d.weight, None, stride, padding, dilation, False, [0, 0], groups,
            [True, False, False],
        )  # fmt: skip
        _, *sums = torch.ops.resnet_fused.bn_act_backward_sums(
            grad_x, d.x, None, None, *d.norm, False
        )
        return grad_x, *sums

    if name == LIBRARY:
        return library
    return partial(
        gpu.kernels("conv_bn_act").train_conv_backward_input, d.grad, d.weight, padding, dilation,
        None, d.x, d.norm, configs.BY_NAME[name], d.precision,
    )  # fmt: skip
