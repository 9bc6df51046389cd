"""The cases that ``gpu.py`` measures, in which order, and the file that keeps what came out.

The file is written anew after every case, so that a run that is cut short leaves all but its last
one, and the next run goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from resnet_fused import benchmark
from resnet_fused.benchmark import Case, Mode, Result
from resnet_fused.benchmark.case import one_line
from resnet_fused.ops import gpu_choice

MODELS = ("resnet50", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "resnet101")
DTYPES = ("bf16", "fp16", "tf32")
INFERENCE_BATCHES = (256, 1, 32, 8, 128)
TRAINING_BATCHES = (256, 64)

_CACHE = "RESNET_FUSED_CACHE_DIR"
_MOST_GRAPH_BATCH = 32  # with more images a step is longer than its launches
_REPEATS = 20
_LIMIT_S = 4.0  # of timing a case; most of its time goes into compiling


@dataclass(frozen=True)
class Planned:
    """One entry of the matrix. `autotuned` is the peer that compiles for minutes, by itself;
    `untuned` is the library as it comes, without choices measured on this machine.
    """

    model: str
    mode: Mode
    dtype: str
    batch_size: int
    autotuned: bool = False
    untuned: bool = False

    @property
    def name(self) -> str:
        text = f"{self.model} {self.mode} {self.dtype} b{self.batch_size}"
        return text + " max-autotune" * self.autotuned + " untuned" * self.untuned

    @property
    def variants(self) -> tuple[str, ...]:
        """What is measured side by side."""
        names = {"eager", "fused"}
        if self.untuned:
            return ("eager", "eager_channels_last", "fused")
        names |= {"compile_max_autotune"} if self.autotuned else {"eager_channels_last", "compile"}
        if self.mode == "inference" and self.batch_size <= _MOST_GRAPH_BATCH:
            names |= {"fused_graph"} if self.autotuned else {"eager_graph", "fused_graph"}
        if self.mode == "training" and not self.autotuned:
            names.add("fused_low")
        return tuple(v for v in benchmark.VARIANTS if v in names)

    def case(self) -> Case:
        """The same as the library's benchmark has it.

        Raises:
            BenchmarkError: there is no GPU.
        """
        return Case(
            model=self.model,
            mode=self.mode,
            device="cuda",
            dtype=self.dtype,
            batch_size=self.batch_size,
            threads=torch.get_num_threads(),
        )


def planned_cases(only: str = "") -> list[Planned]:
    """The whole matrix, the most valuable first; those whose name contains `only`.

    What is untuned comes before anything is tuned. Then comes ResNet-50 in bfloat16: large, small,
    and a training step. Then a large batch and a training step of each other network; ResNet-50's
    other dtypes, and every network's small batch; the rest. Autotuned parts, which compile for
    minutes, come last.
    """
    bf16 = [Planned("resnet50", "inference", "bf16", batch) for batch in INFERENCE_BATCHES]
    steps = [Planned("resnet50", "training", "bf16", batch) for batch in TRAINING_BATCHES]
    others, (large, small) = MODELS[1:], INFERENCE_BATCHES[:2]
    first = [replace(bf16[0], untuned=True), replace(steps[0], untuned=True)]
    first += [*bf16[:2], steps[0]]
    first += [Planned(model, "inference", "bf16", large) for model in others]
    first += [Planned(model, "training", "bf16", TRAINING_BATCHES[0]) for model in others]
    first += [Planned("resnet50", "inference", dtype, large) for dtype in DTYPES[1:]]
    first += [Planned(model, "inference", "bf16", small) for model in others]
    first += [bf16[2], steps[1]]
    rest = [
        *(Planned(m, "inference", d, b) for m, d, b in product(MODELS, DTYPES, INFERENCE_BATCHES)),
        *(Planned(m, "training", "bf16", b) for m, b in product(MODELS, TRAINING_BATCHES)),
    ]
    autotuned = [replace(p, autotuned=True) for p in (bf16[0], bf16[1], *rest)]
    ordered = dict.fromkeys([*first, *rest, *autotuned])
    return [p for p in ordered if only in p.name]


def file_name(gpu: str, date: str, commit: str | None) -> str:
    """As "h200-2026-11-25-65c87ff.json" for "NVIDIA H200".

    Args:
        date: ISO 8601, with or without a time.
        commit: 40 digits, with "-dirty" behind them if files were changed.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    digits, dirty, _ = (commit or "unknown").partition("-dirty")
    return f"{slug}-{date[:10]}-{digits[:7]}{dirty}.json"


class Record:
    """What was measured so far, as the file at `path` has it.

    Raises:
        BenchmarkError: the file is there and is not one of these.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"cases": {}}
        if path.exists():
            try:
                self.data = json.loads(path.read_text())
            except ValueError as error:
                raise benchmark.BenchmarkError(f"{path} is not JSON: {error}") from error
            if not isinstance(self.data, dict) or not isinstance(self.data.get("cases"), dict):
                raise benchmark.BenchmarkError(f"{path} is not a result file of gpu.py")

    def done(self, name: str) -> bool:
        """Whether a case is in it, without an error."""
        entry = self.data["cases"].get(name)
        return entry is not None and entry["error"] is None

    def put(self, key: str, value: Any) -> None:
        """Set one part of it, and write the file."""
        self.data[key] = value
        self._write()

    def put_case(self, name: str, entry: dict[str, Any]) -> None:
        """Set one case, and write the file."""
        self.data["cases"][name] = entry
        self._write()

    def _write(self) -> None:
        text = benchmark.json_text(_finite(self.data))
        benchmark.write_atomically(self.path, text.encode())


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_case(planned: Planned) -> list[Result]:
    """Run one case on the GPU."""
    case = planned.case()
    unmeasured = without_choices() if planned.untuned else contextlib.nullcontext()
    with unmeasured, quiet_autotuning(), benchmark.ProgressBar() as progress:
        return benchmark.run_case(
            case,
            benchmark.load_model(case.model),
            benchmark.random_images(case.batch_size, case.image_size),
            variants=planned.variants,
            repeats=_REPEATS,
            limit_s=_LIMIT_S,
            progress=progress,
        )


@contextlib.contextmanager
def quiet_autotuning() -> Iterator[None]:
    """In here Inductor prints no tables of what it tried, nor what did not fit."""
    logger = logging.getLogger("torch._inductor.select_algorithm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    tables = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    try:
        with torch._inductor.config.patch(tables):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def without_choices() -> Iterator[None]:
    """In here nothing was measured on this machine."""
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory() as empty:
        os.environ[_CACHE] = empty
        gpu_choice.forget_measured()
        try:
            yield
        finally:
            os.environ.pop(_CACHE)
            if before is not None:
                os.environ[_CACHE] = before
            gpu_choice.forget_measured()


def run_cases(
    planned: Sequence[Planned],
    record: Record,
    *,
    deadline: float,
    run: Callable[[Planned], list[Result]],
    after: Callable[[Planned, list[Result], str | None], None] = lambda case, results, error: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Planned]:
    """Measure what is not yet in the file, until the time is used up.

    Args:
        deadline: of `clock`; no case starts after it. One that is under way is finished.
        run: measures a case; what it raises is recorded in the case's place.
        after: told each case, its results and what `run` raised, once they are in the file.

    Returns:
        The cases that there was no time for.
    """
    waiting = [p for p in planned if not record.done(p.name)]
    for number, case in enumerate(waiting):
        begin = clock()
        if begin >= deadline:
            return waiting[number:]
        results: list[Result] = []
        error = None
        try:
            results = run(case)
        except Exception as failure:  # out of memory, or whatever a peer's makers thought of
            error = one_line(failure)
        entry = {
            "results": [result.to_dict() for result in results],
            "error": error,
            "seconds": round(clock() - begin, 1),
        }
        record.put_case(case.name, entry)
        after(case, results, error)
    return []
