"""Kinds of malformed arguments, each a way to spoil one good argument of an operator.

What a kind must lead to is the same for every operator. REFUSED: an exception. READ: an unusual
view of the same numbers, whose result is that of a plain copy. EITHER: an exception or that result,
as the operator likes. Over 400 lines, as the kinds are one table with what makes them beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

INF, NAN = float("inf"), float("nan")
MOST, LEAST = 2**63 - 1, -(2**63)


class Outcome(Enum):
    """What a call with a spoilt argument must come to."""

    REFUSED = 1
    READ = 2
    EITHER = 3


REFUSED, READ, EITHER = Outcome


@dataclass(frozen=True)
class Kind:
    """A way to spoil an argument, given a good one."""

    spoil: Callable[[Any], Any]
    outcome: Outcome


class NotApplicable(Exception):
    """A good argument that a kind cannot spoil."""


# ---- tensors -------------------------------------------------------------------------------------


def needs(condition: bool) -> None:
    if not condition:
        raise NotApplicable


def _quantized(t: Tensor) -> Tensor:
    needs(t.dtype == torch.float32)
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def _nested(t: Tensor) -> Tensor:
    needs(t.dim() > 1)
    return torch.nested.nested_tensor([t[0], t[0]])


def _mkldnn(t: Tensor) -> Tensor:
    needs(t.dtype == torch.float32)
    return t.contiguous().to_mkldnn()


def _csr(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1).to_sparse_csr()


def _with_storage(t: Tensor, numbers: int) -> Tensor:
    """A copy whose storage has this many more numbers than its strides reach."""
    needs(t.numel() > 0)
    copy = t.clone()
    copy.untyped_storage().resize_((t.numel() + numbers) * t.element_size())
    return copy


def _past_storage(t: Tensor) -> Tensor:
    """A view at an offset, whose storage ends before it."""
    needs(t.numel() > 0)
    view = torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape)
    view.untyped_storage().resize_(t.numel() * t.element_size())
    return view


def _spread_past_storage(t: Tensor) -> Tensor:
    """A view with gaps, whose storage would hold as many numbers without gaps."""
    needs(t.numel() > 1)
    view = t.new_zeros((*t.shape, 2))[..., 0]
    view.untyped_storage().resize_(t.numel() * t.element_size())
    return view


def _along(t: Tensor, dim: int, size: int) -> Tensor:
    """Of another size along a dimension."""
    needs(t.dim() > dim)
    index = torch.arange(size) % max(t.shape[dim], 1)
    return t.index_select(dim, index)


def _resized(dim: int, change: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    def spoil(t: Tensor) -> Tensor:
        needs(t.dim() > max(dim, 0) and t.dim() + dim >= 0)
        return _along(t, dim % t.dim(), change(t.shape[dim]))

    return spoil


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def spoil(t: Tensor) -> Tensor:
        needs(t.dtype != dtype)
        return t.to(dtype)

    return spoil


def _huge(t: Tensor) -> Tensor:
    """2^40 rows of one number each, of no memory."""
    needs(t.dim() > 0)
    return t.new_zeros(1).expand(2**40, *[1] * (t.dim() - 1))


def _all_huge(t: Tensor) -> Tensor:
    """2^60 numbers of no memory."""
    needs(t.dim() > 0)
    each = 2 ** (60 // t.dim())
    return t.new_zeros(1).expand([each] * t.dim())


def _spaced(t: Tensor) -> Tensor:
    needs(t.dim() > 0)
    view = t.new_full([2 * n for n in t.shape], 7)[tuple([slice(1, None, 2)] * t.dim())]
    return view.copy_(t)


def _offset(t: Tensor) -> Tensor:
    """At an address that only its element's size divides, in the same order."""
    memory = t.new_empty(t.numel() + 1)
    return memory.as_strided(t.shape, t.stride(), 1).copy_(t)


def _permuted(t: Tensor) -> Tensor:
    """With the strides of its dimensions in reverse order."""
    needs(t.dim() > 1)
    last = t.dim() - 1
    return t.permute(*range(last, -1, -1)).contiguous().permute(*range(last, -1, -1))


def _other_layout(t: Tensor) -> Tensor:
    needs(t.dim() == 4)
    last = t.is_contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def _overlapping(t: Tensor) -> Tensor:
    """Rows that begin one number after each other."""
    needs(t.dim() > 0 and t.numel() > 0)
    strides = [1] * t.dim()
    return t.flatten().repeat(2)[: sum(t.shape)].clone().as_strided(t.shape, strides)


def _negative(t: Tensor) -> Tensor:
    needs(t.dtype.is_floating_point)
    return torch._neg_view(-t)


def _imaginary(t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: strided, and negated when it is read."""
    needs(t.dtype in (torch.float32, torch.float64))
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(t: Tensor) -> Tensor:
        needs(t.dtype.is_floating_point)
        return torch.full_like(t, value)

    return spoil


def _bytes(t: Tensor) -> Tensor:
    """Places of a pool that are in no window."""
    needs(t.dtype == torch.uint8)
    return torch.full_like(t, 255)


TENSORS: dict[str, Kind] = {
    "none": Kind(lambda t: None, EITHER),
    "list": Kind(lambda t: t.tolist(), EITHER),
    "array": Kind(lambda t: t.float().numpy(), REFUSED),
    "text": Kind(lambda t: "tensor", REFUSED),
    "module": Kind(lambda t: nn.ReLU(), REFUSED),
    "int64": Kind(_as(torch.int64), REFUSED),
    "int32": Kind(_as(torch.int32), REFUSED),
    "int8": Kind(_as(torch.int8), REFUSED),
    "bool": Kind(_as(torch.bool), REFUSED),
    "float16": Kind(_as(torch.float16), EITHER),
    "bfloat16": Kind(_as(torch.bfloat16), EITHER),
    "float32": Kind(_as(torch.float32), EITHER),
    "float64": Kind(_as(torch.float64), EITHER),
    "complex64": Kind(_as(torch.complex64), REFUSED),
    "complex128": Kind(lambda t: t.to(torch.complex128).conj(), REFUSED),
    "float8": Kind(_as(torch.float8_e4m3fn), REFUSED),
    "float8 of other bits": Kind(_as(torch.float8_e5m2), REFUSED),
    "sparse": Kind(lambda t: t.to_sparse(), EITHER),
    "compressed sparse": Kind(_csr, EITHER),
    "mkldnn": Kind(_mkldnn, EITHER),
    "quantized": Kind(_quantized, REFUSED),
    "nested": Kind(_nested, REFUSED),
    "meta": Kind(lambda t: t.to("meta"), REFUSED),
    "scalar": Kind(lambda t: t.flatten()[0], EITHER),
    "flat": Kind(lambda t: t.flatten() if t.dim() > 1 else t[None], EITHER),
    "dimension more": Kind(lambda t: t[None], EITHER),
    "dimension less": Kind(lambda t: t[0], EITHER),
    "64 dimensions": Kind(lambda t: t[(None,) * (64 - t.dim())], EITHER),
    "more rows": Kind(_resized(0, lambda n: n + 1), EITHER),
    "fewer rows": Kind(_resized(0, lambda n: n - 1), EITHER),
    "no rows": Kind(_resized(0, lambda n: 0), EITHER),
    "more channels": Kind(_resized(1, lambda n: n + 1), EITHER),
    "fewer channels": Kind(_resized(1, lambda n: n - 1), EITHER),
    "no channels": Kind(_resized(1, lambda n: 0), EITHER),
    "wider": Kind(_resized(-1, lambda n: n + 3), EITHER),
    "narrower": Kind(_resized(-1, lambda n: n - 1), EITHER),
    "no columns": Kind(_resized(-1, lambda n: 0), EITHER),
    "sides exchanged": Kind(lambda t: t.transpose(-1, -2) if t.dim() == 4 else t, EITHER),
    "no memory": Kind(lambda t: _with_storage(t, -t.numel()), REFUSED),
    "a number less of memory": Kind(lambda t: _with_storage(t, -1), REFUSED),
    "memory before it": Kind(_past_storage, REFUSED),
    "memory for no gaps": Kind(_spread_past_storage, REFUSED),
    "2^40 rows": Kind(_huge, REFUSED),
    "2^60 numbers": Kind(_all_huge, REFUSED),
    "one row expanded": Kind(lambda t: t[:1].expand_as(t), READ),
    "one number expanded": Kind(lambda t: t.flatten()[0].expand(t.shape), READ),
    "overlapping": Kind(_overlapping, READ),
    "spaced": Kind(_spaced, READ),
    "offset by a number": Kind(_offset, READ),
    "permuted": Kind(_permuted, READ),
    "the other layout": Kind(_other_layout, READ),
    "more memory": Kind(lambda t: _with_storage(t, 5), READ),
    "negated view": Kind(_negative, READ),
    "imaginary part": Kind(_imaginary, READ),
    "of inference mode": Kind(_inference, READ),
    "with a gradient": Kind(lambda t: t.clone().requires_grad_(), EITHER),
    "NaN": Kind(_filled(NAN), READ),
    "255": Kind(_bytes, EITHER),
}


# ---- numbers, text, lists ------------------------------------------------------------------------


def constant(value: Any, outcome: Outcome) -> Kind:
    return Kind(lambda good: value, outcome)


WHOLE: dict[str, Kind] = {
    "0": constant(0, EITHER),
    "-1": constant(-1, EITHER),
    "two more": Kind(lambda n: n + 2, EITHER),
    "thousands": constant(40_000, EITHER),
    "2^31 - 1": constant(2**31 - 1, EITHER),
    "2^31": constant(2**31, EITHER),
    "2^32 + 1": constant(2**32 + 1, EITHER),
    "2^61 + 1": constant(2**61 + 1, EITHER),
    "2^62": constant(2**62, EITHER),
    "largest integer": constant(MOST, EITHER),
    "least integer": constant(LEAST, EITHER),
    "2^63": constant(2**63, REFUSED),
    "fraction": constant(1.5, REFUSED),
    "NaN for an integer": constant(NAN, REFUSED),
    "no integer": constant(None, REFUSED),
    "text for an integer": constant("1", REFUSED),
}

REAL: dict[str, Kind] = {
    "NaN": constant(NAN, EITHER),
    "infinity": constant(INF, EITHER),
    "minus infinity": constant(-INF, EITHER),
    "negative": constant(-2.0, EITHER),
    "negative zero": constant(-0.0, EITHER),
    "largest number": constant(3.4e38, EITHER),
    "least number": constant(5e-324, EITHER),
    "complex number": constant(1j, REFUSED),
    "no number": constant(None, REFUSED),
    "text for a number": constant("0.1", REFUSED),
    "tensor of two numbers": constant(torch.zeros(2), REFUSED),
}

TEXT: dict[str, Kind] = {
    "empty text": constant("", REFUSED),
    "unknown name": constant("swish", REFUSED),
    "capitals": Kind(lambda s: s.upper(), REFUSED),
    "space behind": Kind(lambda s: s + " ", REFUSED),
    "NUL behind": Kind(lambda s: s + "\0", REFUSED),
    "NUL before": Kind(lambda s: "\0" + s, REFUSED),
    "a million letters": Kind(lambda s: s * 1_000_000, REFUSED),
    "format": constant("%s%n{}", REFUSED),
    "not ASCII": Kind(lambda s: s.replace("e", "\N{CYRILLIC SMALL LETTER IE}") + "\u2028", REFUSED),
    "no text": constant(None, REFUSED),
    "number for text": constant(3, REFUSED),
    "bytes": Kind(lambda s: s.encode(), EITHER),
}

TRUTH: dict[str, Kind] = {
    "no truth": constant(None, EITHER),
    "text for truth": constant("True", REFUSED),
    "other truth": Kind(lambda b: not b, EITHER),
}

DTYPE: dict[str, Kind] = {
    "no dtype": constant(None, REFUSED),
    "name of a dtype": constant("float32", REFUSED),
    "code of a dtype": constant(10_000, REFUSED),
    "negative code": constant(-1, REFUSED),
    "quantized dtype": constant(torch.qint8, REFUSED),
    "bits": constant(torch.bits8, EITHER),
}

LISTS: dict[str, Kind] = {
    "empty list": constant([], EITHER),
    "one less": Kind(lambda v: v[:-1], EITHER),
    "one more": Kind(lambda v: [*v, *v[-1:]], EITHER),
    "twice": Kind(lambda v: [*v, *v], EITHER),
    "100 times": Kind(lambda v: v * 100, EITHER),
    "no list": constant(None, REFUSED),
    "list of nothing": Kind(lambda v: [None] * max(len(v), 1), REFUSED),
    "list of lists": Kind(lambda v: [v], REFUSED),
    "text for a list": constant("1111", REFUSED),
    "number for a list": constant(1, EITHER),
}

TABLES = {
    "Tensor": TENSORS, "int": WHOLE, "float": REAL, "str": TEXT, "bool": TRUTH,
    "ScalarType": DTYPE, "List": LISTS,
}  # fmt: skip


# ---- applied to an argument ----------------------------------------------------------------------


@dataclass(frozen=True)
class Spoilt:
    """One argument of a call, or one element of a list, and what becomes of it."""

    argument: str
    element: int | None
    table: str
    kind: str

    @property
    def place(self) -> str:
        return self.argument + ("" if self.element is None else f"[{self.element}]")

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}"

    @property
    def outcome(self) -> Outcome:
        return TABLES[self.table][self.kind].outcome

    def apply(self, good: dict[str, Any]) -> dict[str, Any]:
        """The arguments with one of them spoilt.

        Raises:
            NotApplicable: this one cannot be.
        """
        value = good[self.argument]
        spoil = TABLES[self.table][self.kind].spoil
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some tensors are deprecated, and made to be refused
            if self.element is None:
                bad = self._not_the_same(value, spoil)
            else:
                item = self._not_the_same(value[self.element], spoil)
                bad = [*value[: self.element], item, *value[self.element + 1 :]]
        return good | {self.argument: bad}

    @staticmethod
    def _not_the_same(value: Any, spoil: Callable[[Any], Any]) -> Any:
        try:
            bad = spoil(value)
        except (RuntimeError, IndexError, NotImplementedError) as error:
            raise NotApplicable from error  # torch makes no such tensor of it
        needs(bad is not value)
        return bad


def table_of(value: Any) -> str:
    """Which kinds spoil a value."""
    kinds = {
        Tensor: "Tensor", list: "List", bool: "bool", int: "int", float: "float", str: "str",
        torch.dtype: "ScalarType",
    }  # fmt: skip
    return next(name for kind, name in kinds.items() if isinstance(value, kind))


def all_spoilt(good: dict[str, Any]) -> Iterator[Spoilt]:
    """Every argument of a call, every element of a list, and every kind that may spoil it."""
    for argument, value in good.items():
        if value is None:
            continue
        table = table_of(value)
        yield from (Spoilt(argument, None, table, kind) for kind in TABLES[table])
        for i, element in enumerate(value if isinstance(value, list) else []):
            table = table_of(element)
            yield from (Spoilt(argument, i, table, kind) for kind in TABLES[table])
