"""Measures which algorithm is the fastest for each convolution of a model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from resnet_fused import conv_choice, packing, policy, tuning_cache
from resnet_fused.graph.observe import conv_inputs

from . import gpu_algorithms
from .case import BenchmarkError
from .measure import interleave
from .tuned import Tuned

_COLD_BYTES = 128 << 20  # copies of the weights that are gone through: more than a cache holds
_MOST_COPIES = 64


def tune(
    model: nn.Module,
    images: Tensor,
    *,
    repeats: int,
    progress: Callable[[int, int, str], None],
    training: bool = False,
) -> list[Tuned]:
    """Time every algorithm for every distinct convolution of a model, and keep the fastest.

    On a GPU :func:`.gpu_algorithms.tune` does it. On the CPU they run in turns, with cold weights:
    each call reads another copy of them, as a layer of a network finds its weights in memory and
    not in a cache. The choices go to the cache file and hold from now on.

    Args:
        model: fused or not; it is copied.
        images: what its forward takes, in the dtype and layout to tune for.
        repeats: timed calls of each algorithm.
        training: of a training step; on a GPU only.

    Raises:
        BenchmarkError: `training` on the CPU, where nothing is tuned for it.
        OSError: the choices cannot be written.
    """
    if images.is_cuda:
        return gpu_algorithms.tune(
            model, images, repeats=repeats, progress=progress, training=training
        )
    if training:
        raise BenchmarkError("on the CPU training's algorithms are chosen by their cost, not timed")
    tuning_cache.update(packing.machine(), {})  # raises now rather than after all the timing
    problems: dict[conv_choice.ConvProblem, list[tuple[str, nn.Conv2d]]] = {}
    modules = dict(model.named_modules())
    for name, seen in conv_inputs(model, [images]).items():
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        folded = packing.fold_of(conv, None, seen.dtype) if seen.channels_last else None
        problem = None if folded is None else folded.problem(seen.shape)
        if problem is not None and packing.algorithms(problem, policy.current()):
            problems.setdefault(problem, []).append((name, conv))
    results = []
    for done, (problem, layers) in enumerate(problems.items()):
        key = problem.key(torch.get_num_threads())
        progress(done, len(problems), f"timing {layers[0][0]}")
        algorithms = packing.algorithms(problem, policy.current())
        taken = times(problem, layers[0][1], images.dtype, algorithms, repeats)
        results.append(
            Tuned(
                key,
                tuple(name for name, _ in layers),
                conv_choice.choose(problem, policy.current()),
                min(taken, key=lambda a: taken[a]),
                taken,
            )
        )
    progress(len(problems), len(problems), "done")
    tuning_cache.update(packing.machine(), {t.problem: t.chosen for t in results})
    packing.forget_measured()
    return results


def times(
    problem: conv_choice.ConvProblem,
    conv: nn.Conv2d,
    dtype: torch.dtype,
    algorithms: Sequence[str],
    repeats: int,
) -> dict[str, float]:
    """Median milliseconds of each algorithm for a convolution with relu, in turns."""
    x = example(problem, dtype)
    copies = max(2, min(_MOST_COPIES, _COLD_BYTES // (conv.weight.numel() * dtype.itemsize)))
    calls = {}
    for algorithm in algorithms:
        ready = []
        for _ in range(copies):
            folded = packing.fold_of(conv, None, dtype)
            assert folded is not None
            prepared = folded.prepare(problem, algorithm)
            ready.append(partial(packing.run, prepared, x, None, "relu", 0.0))
        calls[algorithm] = _in_turns(ready)
    with torch.no_grad():
        timings = interleave(calls, repeats=repeats, device=torch.device("cpu"), pause_s=0)
    return {name: timing.median_ms for name, timing in timings.items()}


def example(problem: conv_choice.ConvProblem, dtype: torch.dtype) -> Tensor:
    """Noise of a convolution's input shape, channels_last."""
    x = torch.randn(problem.batch, problem.channels, *problem.size).to(dtype)
    return x.to(memory_format=torch.channels_last)


def _in_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    position = 0

    def call() -> object:
        nonlocal position
        position = (position + 1) % len(calls)
        return calls[position]()

    return call
