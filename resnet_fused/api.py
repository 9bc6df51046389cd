"""fuse, unfuse, explain and verify: what a user calls on a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused import checks, packing, policy
from resnet_fused.backends import gpu_kernels, native_conv, onednn
from resnet_fused.conv_choice import LIBRARY
from resnet_fused.graph.analyse import Candidate, analyse
from resnet_fused.graph.observe import Observed, conv_inputs
from resnet_fused.graph.rewrite import apply, remove
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.select import native_unusable
from resnet_fused.parity import MORE_DRAWS, Comparison, error_budget, mean, median, relative_error

Model = TypeVar("Model", bound=nn.Module)


class FusionError(ValueError):
    """fuse(strict=True) met a convolution or batch norm that cannot be fused."""


def fuse(
    model: Model,
    *,
    inplace: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    memory: str = "default",
) -> Model:
    """Make a residual network faster: run every conv-BN(-add)(-activation) in it as one step.

    Equivalent to the model itself, in training and evaluation, on every device: parameters,
    buffers, names, state-dict keys, hooks and classes (``isinstance``) stay. Works on instances:
    each module whose own forward holds such a run gets a forward that runs it fused.

    Args:
        model: any module. Nothing is needed of it as a whole; blocks whose forward cannot be
            traced are left as they are.
        inplace: change this model instead of a copy.
        filter_fn: asked with the qualified name and the module for the first module of each run
            (a convolution, or the batch norm of a pre-activation run); False leaves it alone.
        strict: raise if any convolution or batch norm is left unfused.
        memory: what a residual block keeps for backward in training. "default": each
            convolution's output and the block's, about 0.8 of eager PyTorch's bytes. "low": all
            but the last convolution's, which is computed again; 0.5 of the bytes for about a tenth
            more time.

    Returns:
        The fused copy, or `model` itself. Fusing a fused model changes nothing.

    Raises:
        TypeError: model is not a module.
        ValueError: memory is neither "default" nor "low".
        FusionError: strict, and something cannot be fused; the message lists it with reasons.

    After an exception the model is as it was. Paper: He et al. (2015) for the blocks, Jacob et
    al. (2018) for folding.
    """
    checks.module("model", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function, got {type(filter_fn).__name__}")
    if memory not in ("default", "low"):
        raise ValueError(f"memory: expected 'default' or 'low', got {memory!r}")
    target = model if inplace else copy.deepcopy(model)
    analysis = analyse(target, filter_fn, low_memory=memory == "low")
    left = [c for c in analysis.candidates if c.reason]
    if strict and left:
        lines = "\n".join(f"  {' '.join(c.modules)}: {c.reason}" for c in left)
        raise FusionError(f"strict: {len(left)} candidates cannot be fused:\n{lines}")
    apply(analysis.plans)
    return target


def unfuse(model: Model, *, inplace: bool = False) -> Model:
    """Undo :func:`fuse`: every instance gets its class and its own forward back.

    Args:
        model: a fused model, with whatever weights it has by now; others come back unchanged.
        inplace: change this model instead of a copy.

    Raises:
        TypeError: model is not a module.
    """
    checks.module("model", model)
    target = model if inplace else copy.deepcopy(model)
    remove(target.modules())
    return target


@dataclass(frozen=True)
class Entry:
    """What became of one run, or of one convolution or batch norm that is in none."""

    modules: tuple[str, ...]
    status: str
    """"fused"; "fusible": it would be; or "skipped"."""
    pattern: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """An :class:`Entry` for every convolution and batch norm of a model; prints as a table."""

    entries: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {"entries": [asdict(e) for e in self.entries]}

    def __str__(self) -> str:
        rows = [("status", "pattern", "modules", "backend or reason")]
        rows += [
            (e.status, e.pattern or "-", " ".join(e.modules), e.reason or e.backend)
            for e in self.entries
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        fused = sum(e.status != "skipped" for e in self.entries)
        skipped = len(self.entries) - fused
        return "\n".join([*lines, f"{fused} runs fused or fusible, {skipped} skipped"])


def explain(model: nn.Module, *inputs: Tensor) -> Explanation:
    """Say for every convolution and batch norm: fused by which backend, or skipped and why.

    Args:
        model: fused or not; of an unfused one it says what :func:`fuse` would do.
        inputs: an example of what its forward takes. With it, each convolution is named the
            algorithm that runs it in evaluation, which depends on shape, batch, threads, the
            precision policy and what was measured (``python -m resnet_fused tune``).

    Raises:
        TypeError: model is not a module, or an input is not a tensor.
    """
    checks.module("model", model)
    checks.tensors("inputs", inputs)
    seen = conv_inputs(model, inputs) if inputs else {}
    return Explanation(tuple(_entry(model, c, seen) for c in analyse(model).candidates))


def _entry(model: nn.Module, candidate: Candidate, seen: Mapping[str, Observed]) -> Entry:
    if candidate.reason:
        return Entry(candidate.modules, "skipped", candidate.pattern, "", candidate.reason)
    status = "fused" if candidate.fused else "fusible"
    backend = _backend(model, candidate, seen)
    return Entry(candidate.modules, status, candidate.pattern, backend, "")


def _backend(model: nn.Module, candidate: Candidate, seen: Mapping[str, Observed]) -> str:
    """Which code `auto` takes for a run with the model's present device and dtype."""
    first = model.get_submodule(candidate.modules[0])
    tensor = next((t for t in (*first.parameters(), *first.buffers())), None)
    if tensor is None:
        return "reference"
    passes = "reference" if native_unusable(tensor) else "native"
    if tensor.is_cuda:
        kernels = "native" if gpu_kernels.compiled(tensor) else "triton"
        passes = "eager PyTorch" if gpu_kernels.unusable(tensor) else kernels
    if not candidate.pattern.startswith("conv"):
        return passes
    if tensor.is_cuda and passes in ("native", "triton"):
        algorithm = _gpu_algorithm(first, seen.get(candidate.modules[0]))
        return f"eval: {algorithm}; training: library conv + {passes}, or what was measured"
    if tensor.device.type == "cpu" and onednn.unusable(tensor.dtype) is None:
        algorithm = _algorithm(first, seen.get(candidate.modules[0]))
        own = native_conv.unusable(tensor.dtype) is None
        block = "by shape in blocks and stems, else " if own else ""
        return f"eval: {algorithm}; training: {block}library conv + {passes}"
    return f"library conv + {passes}"


def _gpu_algorithm(conv: nn.Module, observed: Observed | None) -> str:
    """What runs a convolution in evaluation on a GPU, for the input it was seen with."""
    if observed is None:
        return "by shape (explain with an example names it)"
    assert isinstance(conv, nn.Conv2d)
    padding = packing.conv_padding(conv)
    assert padding is not None  # the matcher leaves such convolutions alone
    data = torch.empty(observed.shape, dtype=observed.dtype, device="meta")
    chosen = gpu_choice.choose(
        "inference", data, conv.weight, conv.stride, padding, conv.dilation, conv.groups
    )
    return "library conv + one triton pass" if chosen == gpu_choice.LIBRARY else chosen


def _algorithm(conv: nn.Module, observed: Observed | None) -> str:
    """What runs a convolution in evaluation, for the input it was seen with."""
    if observed is None:
        return "by shape (explain with an example names it)"
    assert isinstance(conv, nn.Conv2d)
    folded = packing.fold_of(conv, None, observed.dtype) if observed.channels_last else None
    problem = None if folded is None else folded.problem(observed.shape)
    chosen = LIBRARY if problem is None else packing.choose(problem, policy.current())
    return "library conv + one pass" if chosen == LIBRARY else chosen


@dataclass(frozen=True)
class Verification:
    """How far a fused model and eager PyTorch are from float64, and whether that is good enough."""

    ok: bool
    relative_error: float
    eager_relative_error: float
    budget: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def verify(model: nn.Module, *inputs: Tensor, training: bool = False) -> Verification:
    r"""Compare a model fused and unfused with the same model in float64 on the same inputs.

    The error is :math:`\max|y - y_{64}| / \max|y_{64}|` over the outputs; in training also over
    all gradients (of the outputs' sum of squares, taken as one vector) and over the running
    statistics, the worst of which is given. It may be twice eager PyTorch's own error in the same
    dtype, the larger of its errors in the two memory formats, plus one rounding.

    What misses that on these inputs is held by the mean of nine more, in which each value differs
    from the given one by up to a twentieth; in training by the median, as a ReLU near its corner
    moves a gradient by any factor.

    Args:
        model: fused or not; neither it nor its statistics change.
        inputs: what its forward takes.
        training: compare a training step instead of an evaluation.

    Raises:
        TypeError: model is not a module, or an input is not a tensor.
    """
    checks.module("model", model)
    checks.tensors("inputs", inputs)
    fused = fuse(model)
    eager = unfuse(fused)
    other = unfuse(fused).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact = unfuse(fused).double()

    def compared(inputs: Sequence[Tensor]) -> list[Comparison]:
        results = zip(
            _results(exact, [_widened(v) for v in inputs], training),
            _results(eager, inputs, training),
            _results(other, [_channels_last(v) for v in inputs], training),
            _results(fused, inputs, training),
            strict=True,
        )
        rows = []
        for truth, theirs, others, ours in results:
            eager_error = max(relative_error(theirs, truth), relative_error(others, truth))
            budget = error_budget(eager_error, ours.dtype)
            rows.append(Comparison(relative_error(ours, truth), eager_error, budget))
        return rows

    rows = compared(inputs)
    if not all(row.ok for row in rows) and (training or not any(row.hopeless for row in rows)):
        draws = [rows, *(compared(_redrawn(inputs, i)) for i in range(MORE_DRAWS))]
        decides = median if training else mean
        every = [decides(draws_of_one) for draws_of_one in zip(*draws, strict=True)]
        rows = [row if row.ok else decided for row, decided in zip(rows, every, strict=True)]
    worst = max(rows, key=lambda row: row.used, default=Comparison(0.0, 0.0, 0.0))
    return Verification(all(row.ok for row in rows), *worst)


def _results(model: nn.Module, inputs: Sequence[Tensor], training: bool) -> list[Tensor]:
    """The outputs, and in training all gradients as one vector and the running statistics."""
    model.train(training)
    model.zero_grad()
    with torch.set_grad_enabled(training):
        outputs = list(_tensors(model(*(v.detach().clone() for v in inputs))))
        if not training:
            return outputs
        torch.stack([o.square().sum() for o in outputs]).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return [o.detach() for o in outputs] + [torch.cat(gradients)] * bool(gradients) + statistics


def _redrawn(inputs: Sequence[Tensor], number: int) -> list[Tensor]:
    """Inputs like the given ones whose roundings are others; whole numbers stay."""
    generator = torch.Generator().manual_seed(number)

    def factors(value: Tensor) -> Tensor:
        drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        return (1 + (2 * drawn - 1) / 20).to(value)

    return [v.detach() * factors(v) if v.is_floating_point() else v for v in inputs]


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
