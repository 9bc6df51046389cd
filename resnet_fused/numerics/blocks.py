"""Whole blocks as fuse() runs them: a ResNet's, and the worst that the fuzzer has found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.api import fuse
from resnet_fused.parity import Promise

from .block import BlockCase, Conv, Outcome, Part, double, run
from .draw import size_text
from .eager import FEW, convolutions, has_tails, library_is_wrong, ways
from .measure import Draw, Results, Variant, without_onednn

WORST = Path(__file__).parent / "worst_cases.json"
"""Of each dtype and mode, by ``tests/fuzz/fuzz.py --worst``."""

_NEXT_SEED = 1_000_003
_POINT = {"kernel": (1, 1), "padding": (0, 0)}
_HALF = {"stride": (2, 2)}


def _conv(outputs: int, **options: Any) -> Conv:
    """SiLU has no corner, where rounding would decide a derivative."""
    return Conv(outputs, **{"act": "silu", **options})


_DOWN = _conv(64, **_POINT, **_HALF, act="none")
BLOCKS: Mapping[str, tuple[Part, int]] = {
    "basic block": (Part((_conv(64), _conv(64)), "identity"), 64),
    "basic block, projection": (Part((_conv(64, **_HALF), _conv(64)), "projection", _DOWN), 32),
    "bottleneck": (
        Part((_conv(32, **_POINT), _conv(32), _conv(128, **_POINT)), "identity"), 128,
    ),
    "stem": (
        Part((_conv(32, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),), pool=True), 3,
    ),
}  # fmt: skip
"""And the channels of their input."""


@dataclass(frozen=True)
class NetworkCase:
    """A :class:`BlockCase` with other numbers in each draw, the first with its own."""

    case: BlockCase
    kinds: tuple[str, ...] | None = None
    """The results to look at, None for all."""

    @property
    def shape(self) -> str:
        """The input's, and what replays it."""
        c = self.case
        size = size_text((c.batch, c.channels, c.height, c.width))
        return f"{size}, {c.mode}, {c.layout}, {len(c.parts)} parts, seed {c.seed}"

    @cached_property
    def cornered(self) -> bool:
        """In training through an activation with one, or with few values; or tensors of few."""
        few = any(conv.outputs < FEW for conv in convolutions(self.case))
        return has_tails(self.case) or (few and self.case.mode != "eval")

    def draw(self, number: int, in_force: AbstractContextManager[object]) -> Draw:
        """The case with its seed moved on."""
        case = replace(self.case, seed=self.case.seed + _NEXT_SEED * number)
        plain, base = case.build()
        truth = _tensors(run(case, double(plain), base.double(), exact=True))
        wrong = library_is_wrong(case, plain, base, truth)
        with without_onednn() if wrong else nullcontext():
            fused = fuse(plain, memory=case.memory)
            with in_force:
                ours = _tensors(run(case, fused, base))
            eager = [_tensors(outcome) for outcome in ways(case, plain, base)]
        _give_a_size(ours, eager, truth)
        _leave_out_overflow(ours, eager, truth)
        seen = _by_kind(ours)
        looked_at = {name: seen[name] for name in self.kinds or seen}
        return Draw(looked_at, [_by_kind(tensors) for tensors in eager], _by_kind(truth))


def evaluation(dtype: str) -> Iterator[Variant]:
    """Each block with ReLU, as fuse() runs it in one call."""
    for name, (part, _) in _blocks(dtype):
        convs = tuple(replace(conv, act="relu") for conv in part.convs)
        case = _case(name, replace(part, convs=convs), dtype, "eval")
        promise: Promise = "default" if dtype == "float32" else "parity"
        yield Variant(name, "evaluation", dtype, promise, [NetworkCase(case)])


def training(dtype: str) -> Iterator[Variant]:
    """A training step of each block; "autocast" has float32 parameters beside bfloat16.

    Of a stem in a narrow dtype without gradients: rounding decides which of a window's values is
    the largest.
    """
    for name, (part, _) in _blocks(dtype):
        narrow = dtype not in ("float32", "float64")
        kinds = ("output", "running statistics") if narrow and part.pool else None
        for memory in ("default",) if part.pool else ("default", "low"):
            case = replace(_case(name, part, dtype, "train"), memory=memory)
            words = "training" if memory == "default" else "training, memory='low'"
            yield Variant(name, words, dtype, "parity", [NetworkCase(case, kinds)])


def _blocks(dtype: str) -> Iterator[tuple[str, tuple[Part, int]]]:
    """On a CPU float16 and float64 are PyTorch's convolutions in every block alike."""
    for name, block in BLOCKS.items():
        if dtype not in ("float16", "float64") or name == "bottleneck":
            yield name, block


def _case(name: str, part: Part, dtype: str, mode: str) -> BlockCase:
    size = 45 if part.pool else 20
    threads = torch.get_num_threads()
    return BlockCase(
        4, BLOCKS[name][1], size, size - 3, (part,), dtype, mode, threads=threads
    )  # fmt: skip


def fuzzed(dtype: str) -> Iterator[Variant]:
    """The worst of a dtype's random networks, one for each mode."""
    for row in json.loads(WORST.read_text()) if WORST.exists() else ():
        if row["dtype"] == dtype:
            case = BlockCase.from_dict(row["case"])
            admits = (case.dtype, case.mode, case.policy) == ("float32", "eval", "default")
            promise: Promise = "default" if admits else "parity"
            yield Variant("worst of the fuzzer", row["mode"], dtype, promise, [NetworkCase(case)])


def _tensors(outcome: Outcome) -> dict[str, Tensor]:
    """What running a case gave; of one that raises there is nothing to measure."""
    if outcome.error is not None:
        raise outcome.error
    found = outcome.tensors.items()
    return {name: t for name, t in found if t.is_floating_point() and name != "input"}


def _give_a_size(
    ours: dict[str, Tensor], eager: Sequence[dict[str, Tensor]], truth: dict[str, Tensor]
) -> None:
    """A bias in front of a batch norm has no gradient; what is computed is rounding of what
    cancels, beside which only the other gradients have a size.
    """
    sizes = {name: _size(t) for name, t in truth.items() if name.startswith("gradient")}
    largest = max(sizes.values(), default=0.0)
    for name in [name for name, size in sizes.items() if size < 1e-9 * largest]:
        exact = truth[name]
        for tensors in (ours, *eager):
            difference = (tensors[name].double() - exact) / largest
            tensors[name] = difference.to(tensors[name].dtype)
        truth[name] = torch.zeros_like(exact)


def _leave_out_overflow(
    ours: dict[str, Tensor], eager: Sequence[dict[str, Tensor]], truth: dict[str, Tensor]
) -> None:
    """What is not finite in eager PyTorch, and of the same kind here, though finite in float64."""
    for name, exact in truth.items():
        overflows = exact.isfinite() & ~eager[0][name].isfinite()
        if not overflows.any():
            continue
        special, of_eager = (t[name][overflows].nan_to_num(0, 1, -1) for t in (ours, eager[0]))
        if torch.equal(special, of_eager):
            for tensors in (ours, *eager, truth):
                tensors[name] = tensors[name].masked_fill(overflows, 0.0)


def _by_kind(tensors: Mapping[str, Tensor]) -> Results:
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        kind = name
        if name.startswith("gradient of "):
            kind = "grad_input" if name == "gradient of input" else "grad_parameters"
        if name.startswith("buffer "):
            kind = "running statistics"
        found.setdefault(kind, []).append(tensor)
    return dict(found)


def _size(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
