"""One case from start to finish: make the variants, check every result, time the right ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.parity import MORE_DRAWS, Comparison, error_budget, mean, relative_error

from .case import BenchmarkError, Case, Mode, Result, one_line, out_of_memory
from .inputs import random_images
from .measure import interleave, peak_memory, saved_bytes, tensor_float_32, time_once
from .peers import TorchVariant, Variant, make_variant
from .prepare import distinct_images, prepare_model, repeat_images

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what comes next)."""

# A ReLU whose argument is zero but for rounding may open in one variant and close in another; one
# such flip moves a gradient far more than rounding does. So gradients may be judged on so many
# inputs.
_TRIALS: dict[Mode, int] = {"inference": 1 + MORE_DRAWS, "training": 3}

_JUDGED_ON_GPU = 8  # images of a batch in inference, where each is computed by itself


@dataclass
class _Entry:
    """What is known about one variant so far."""

    variant: Variant | None = None
    first_call_ms: float | None = None
    outputs: list[Comparison] = field(default_factory=list)
    """Of each trial; their mean decides."""
    judged: Comparison | None = None
    """Of the output, in training of the gradient."""
    error: str | None = None


def run_case(
    case: Case,
    model: nn.Module,
    images: Tensor,
    *,
    variants: Sequence[str],
    repeats: int,
    limit_s: float = math.inf,
    progress: Progress = lambda done, total, what: None,
) -> list[Result]:
    """Measure `variants` of `model` on `images`; a variant whose results are wrong gets no speed.

    Right is: error against a float64 copy on the same input at most twice the worse one of eager
    and eager_channels_last in the same dtype, plus one rounding
    (:func:`resnet_fused.parity.error_budget`).

    On a GPU every variant runs on the whole batch, but float64 would take minutes or more memory
    than there is. So in inference it computes eight images, the first and the last among them; in
    training the batch that is judged repeats at most 64 images (:func:`.prepare.distinct_images`).

    Args:
        case: says on which device, in which dtype and how; its `threads` are set for the process.
        model: float32 on the CPU, left unchanged. One that was never trained gets random BN
            statistics.
        images: float32 ``[batch_size, 3, image_size, image_size]`` on the CPU.
        variants: names from :data:`resnet_fused.benchmark.VARIANTS`, "eager" among them.
        repeats: timed steps of each variant.
        limit_s: stop timing early after so many seconds (:func:`.measure.interleave`).
        progress: called before each stage and each timed step.

    Raises:
        BenchmarkError: eager PyTorch itself fails on this model and input, or `repeats` is below 1.
        MemoryError: main memory would not hold the float64 reference.
    """
    if repeats < 1:
        raise BenchmarkError(f"repeats must be at least 1, got {repeats}")
    if any(name.startswith("compile") for name in variants):
        torch.compiler.reset()  # else a second case of one process counts as a recompilation
    with tensor_float_32(case.dtype == "tf32"):
        return _measure(case, model, images, variants, repeats, limit_s, progress)


def _measure(
    case: Case,
    model: nn.Module,
    images: Tensor,
    variants: Sequence[str],
    repeats: int,
    limit_s: float,
    progress: Progress,
) -> list[Result]:
    total, done = len(variants) * (repeats + 2) + 1, 0

    def step(what: str) -> None:
        nonlocal done
        progress(done, total, what)
        done += 1

    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    base = prepare_model(model, images, case)
    step("float64 reference")
    inputs = images.to(device=device, dtype=case.data_dtype)

    entries: dict[str, _Entry] = {}
    for name in variants:
        step(f"preparing {name}")
        entries[name] = _prepare(name, base, inputs, case)
    for name in variants:
        step(f"checking {name}")
    _judge(case, base, images, inputs, entries)

    right = {name: e.variant for name, e in entries.items() if e.variant and e.error is None}
    timings = interleave(
        right,
        repeats=repeats,
        limit_s=limit_s,
        device=device,
        on_sample=lambda name: step(f"timing {name}"),
    )
    eager_ms = timings["eager"].median_ms
    results = []
    for name, entry in entries.items():
        result = Result.of(
            case,
            name,
            relative_error=entry.judged.error if entry.judged else None,
            error_budget=entry.judged.budget if entry.judged else None,
            first_call_ms=entry.first_call_ms,
            error=entry.error,
        )
        if name in timings:
            timing = timings[name]
            result = replace(
                result,
                median_ms=timing.median_ms,
                p20_ms=timing.p20_ms,
                p80_ms=timing.p80_ms,
                samples=timing.samples,
                images_per_second=1e3 * case.batch_size / timing.median_ms,
                speedup_vs_eager=eager_ms / timing.median_ms,
                **_memory(right[name], device),
            )
        results.append(result)
    return results


def _prepare(name: str, base: nn.Module, inputs: Tensor, case: Case) -> _Entry:
    """The variant after its first step, or why there is none; only eager's failure ends the run."""
    try:
        variant = make_variant(name, base, inputs, case)
        return _Entry(variant, time_once(variant, device=inputs.device))
    except Exception as error:  # a peer may fail in any way its makers thought of
        if name == "eager":
            if isinstance(error, BenchmarkError) or out_of_memory(error):
                raise
            raise BenchmarkError(
                f"{case.model} fails in eager PyTorch: {one_line(error)}"
            ) from error
        return _Entry(error=_reason(error))


def _judge(
    case: Case, base: nn.Module, images: Tensor, inputs: Tensor, entries: dict[str, _Entry]
) -> None:
    """Fill in every variant's error against float64, and refuse the wrong ones.

    Later trials are run only while something is off. The mean of all decides about an output, the
    best about a gradient.

    Args:
        images: of the first trial, float32 on the CPU.
        inputs: the batch that the variants were made for.
    """
    dtype = case.torch_dtype
    training = case.mode == "training"
    baselines: dict[str, Variant] = {
        name: entry.variant
        for name in ("eager", "eager_channels_last")
        if (entry := entries.get(name)) is not None and entry.variant is not None
    }
    if "eager_channels_last" not in baselines:
        baselines["eager_channels_last"] = make_variant("eager_channels_last", base, inputs, case)

    rows = _judged_rows(case)
    distinct = distinct_images(case.batch_size, inputs.device)
    pending = {name: e.variant for name, e in entries.items() if e.variant is not None}
    worst_gradient = 0.0  # of the baselines
    for number in range(_TRIALS[case.mode]):
        if number > 0:
            images = random_images(len(images), case.image_size, seed=number)
        batch = repeat_images(images[:distinct], case.batch_size) if training else images
        batch = batch.to(inputs)
        truth = _truth(base, batch[rows], training=training)
        of_eager = [_errors(variant.outputs(batch), truth, rows) for variant in baselines.values()]
        eager = {kind: max(errors[kind] for errors in of_eager) for kind in of_eager[0]}
        eager["gradient"] = worst_gradient = max(worst_gradient, eager.get("gradient", 0.0))
        for name, variant in list(pending.items()):
            entry = entries[name]
            entry.error = None
            try:
                errors = _errors(variant.outputs(batch), truth, rows)
            except Exception as failure:  # any peer may, as in _prepare; eager ends the run
                if name in baselines:
                    raise
                entry.error = _reason(failure)
                del pending[name]
                continue
            for kind, error in errors.items():  # in training the gradient's comes last
                judged = Comparison(error, eager[kind], error_budget(eager[kind], dtype))
                if kind == "output":
                    entry.outputs.append(judged)
                    judged = mean(entry.outputs)
                entry.judged = judged
                if not judged.ok:
                    of_budget = f"error {judged.error:.1e}, budget {judged.budget:.1e}"
                    entry.error = f"wrong {kind}: {of_budget}"
                    break
            # A gradient may have flipped, by any factor.
            if entry.error is None or (kind == "output" and judged.hopeless):
                del pending[name]
        if not pending:
            break


def _reason(error: Exception) -> str:
    return "out of memory" if out_of_memory(error) else one_line(error)


def _judged_rows(case: Case) -> Tensor | slice:
    """Of a batch the images that float64 computes: all on the CPU, see :func:`run_case`."""
    device = torch.device(case.device)
    if case.mode == "training":
        return slice(distinct_images(case.batch_size, device))
    if not case.on_gpu or case.batch_size <= _JUDGED_ON_GPU:
        return slice(None)
    return torch.linspace(0, case.batch_size - 1, _JUDGED_ON_GPU, device=device).long()


def _truth(base: nn.Module, images: Tensor, *, training: bool) -> dict[str, Tensor]:
    """The outputs of a float64 copy.

    In a thread of its own, so in malloc's arena of that thread: the hundreds of megabytes that a
    float64 copy leaves free in the main one would serve the timed variants' large tensors for the
    rest of the run, and hide the page faults that a user's process pays for them.
    """

    def outputs() -> dict[str, Tensor]:
        exact = TorchVariant(copy.deepcopy(base).double(), images.double(), training=training)
        return exact.outputs(images.double())

    with ThreadPoolExecutor(1) as aside:
        return aside.submit(outputs).result()


def _errors(
    actual: dict[str, Tensor], truth: dict[str, Tensor], rows: Tensor | slice
) -> dict[str, float]:
    """The error of the output and, in training, the worst one of a parameter's gradient.

    Args:
        rows: of the actual output, which the true one has.
    """
    errors = {"output": relative_error(actual["output"][rows], truth["output"])}
    gradients = truth.keys() - {"output"}
    if gradients:
        missing = gradients - actual.keys()
        errors["gradient"] = max(
            math.inf if missing else 0.0,
            *(relative_error(actual[name], truth[name]) for name in gradients - missing),
        )
    return errors


def _memory(variant: Variant, device: torch.device) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    if variant.memory_shows:
        memory["peak_memory_bytes"] = peak_memory(variant, device=device)
    if isinstance(variant, TorchVariant) and variant.training:
        memory["saved_bytes"] = saved_bytes(variant.model, variant.forward_loss)
    return memory
