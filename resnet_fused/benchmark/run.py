"""One case from start to finish: make the variants, check every result, time the right ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.parity import error_budget, relative_error

from .case import BenchmarkError, Case, Result, one_line, out_of_memory
from .inputs import random_images
from .measure import interleave, peak_memory, saved_bytes, tensor_float_32, time_once
from .peers import TorchVariant, Variant, make_variant
from .prepare import distinct_images, prepare_model, repeat_images

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what comes next)."""

# A ReLU whose argument is zero but for rounding may open in one variant and close in another; one
# such flip moves a gradient far more than rounding does. So gradients may be judged on so many
# inputs.
_GRADIENT_TRIALS = 3

_JUDGED_ON_GPU = 8  # images of a batch in inference, where each is computed by itself


@dataclass
class _Entry:
    """What is known about one variant so far."""

    variant: Variant | None = None
    first_call_ms: float | None = None
    relative_error: float | None = None
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
    budget = _judge(case, base, images, inputs, entries)

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
            relative_error=entry.relative_error,
            error_budget=budget,
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
) -> float:
    """Fill in every variant's error against float64, refuse the wrong ones, and return the budget.

    Later trials are run only while a gradient is off, and only the first one's output counts.

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
    trials = _GRADIENT_TRIALS if training else 1
    pending = {name: e.variant for name, e in entries.items() if e.variant is not None}
    worst = {"output": 0.0, "gradient": 0.0}  # of the baselines
    for number in range(trials):
        if number > 0:
            images = random_images(distinct, case.image_size, seed=number)
        batch = repeat_images(images[:distinct], case.batch_size) if training else images
        batch = batch.to(inputs)
        truth = _truth(base, batch[rows], training=training)
        for variant in baselines.values():
            for kind, error in _errors(variant.outputs(batch), truth, rows).items():
                worst[kind] = max(worst[kind], error)
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
            for kind, error in errors.items():
                limit = error_budget(worst[kind], dtype)
                entry.relative_error = error  # in training the gradient's, which comes last
                # "not <=" refuses NaN too; a wrong output is final, a gradient may have flipped.
                if not error <= limit:
                    entry.error = f"wrong {kind}: error {error:.1e}, budget {limit:.1e}"
                    if kind == "output":
                        del pending[name]
                        break
            if entry.error is None:
                del pending[name]
        if not pending:
            break
    return error_budget(worst["gradient" if training else "output"], dtype)


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
