"""Whether an operator survives one spoilt argument: a clear exception or the right result, and no
argument changed either way.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hostile import READ, REFUSED, NotApplicable, Spoilt, needs
from hostile_calls import PLAIN, Arguments
from tolerance import assert_parity, assert_within_policy, flatten, to_double
from torch import Tensor

ERRORS = (RuntimeError, TypeError, ValueError, IndexError, OverflowError, MemoryError)
TENSORS_OF_OTHER_DTYPES = re.compile("int|bool|float|complex")
DENSE = {
    "_packed_convs": ("packed", "scales", "shifts"),
    "_cuda_conv": ("input", "weights"),
    "_cuda_train_conv": ("input",),
    "_cuda_train_conv_input": ("grad",),
}
"""Arguments that are only read and still have to be dense, or channels_last: copying them would
cost what the operator is there to save, and its callers have them so."""
MOST_NUMBERS = 1 << 23  # of a result that is looked at


def strided(value: Any) -> list[Tensor]:
    """The tensors in an argument that have memory of their own to look at."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [
        t for t in values
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested
        and t.device.type == "cpu"
    ]  # fmt: skip


def memory_of(arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    """A copy of the bytes behind every tensor, those too that it does not show."""

    def all_bytes(t: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(t.detach().untyped_storage()).clone()

    return {name: [all_bytes(t) for t in strided(value)] for name, value in arguments.items()}


def plain_copy(arguments: dict[str, Any], good: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fresh tensors that lie like those of the good call.

    Raises:
        NotApplicable: there is no such tensor.
    """
    made: dict[int, Tensor] = {}

    def copy(value: Any, like: Any) -> Any:
        if isinstance(value, (list, tuple)):
            likes = like if isinstance(like, list) else []
            return [copy(v, likes[i] if i < len(likes) else None) for i, v in enumerate(value)]
        if isinstance(value, bytes):
            return value.decode()
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            needs(value.layout != torch._mkldnn and not value.is_quantized)
            dense = value.detach() if value.layout == torch.strided else value.to_dense()
            plain = dense.resolve_conj().resolve_neg()
            last = (
                isinstance(like, Tensor) and like.dim() == plain.dim() == 4
                and like.is_contiguous(memory_format=torch.channels_last)
            )  # fmt: skip
            order = torch.channels_last if last else torch.contiguous_format
            made[id(value)] = plain.clone(memory_format=order)
        return made[id(value)]

    return {name: copy(value, good[name]) for name, value in arguments.items()}


def written(operator: Any) -> set[str]:
    """The arguments that an operator's schema says it writes."""
    arguments = operator.default._schema.arguments
    return {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}


def result_of(operator: Any, arguments: Arguments) -> Any:
    """What it returns, or for an operator that writes, what is written then."""
    returned = operator(**arguments)
    names = written(operator)
    return [arguments[n] for n in arguments if n in names] if names else returned


def accepted(name: str, spoilt: Spoilt) -> bool:
    """What some operators take although others don't: any dtype, names that are not read, and a
    meta tensor where it is the only one.
    """
    if spoilt.kind == "meta":
        return name in ("batch_statistics", "_max_pool2d", "_average_pixels")
    if name == "_pool_clone":
        return TENSORS_OF_OTHER_DTYPES.match(spoilt.kind) is not None
    # A block's names say which kernels run forward, and which backward.
    return spoilt.argument == "names" and spoilt.element is not None and spoilt.element % 4 > 0


def check(name: str, operator: Any, good: Callable[[], Arguments], spoilt: Spoilt) -> None:
    """Call with one argument spoilt, and hold the outcome to what its kind says."""
    arguments = spoilt.apply(good())
    before = memory_of(arguments)
    try:
        result = result_of(operator, arguments)
    except ERRORS as error:
        assert_unchanged(before, memory_of(arguments), set())
        assert str(error).strip(), f"an error without a message: {error!r}"
        wants_dense = spoilt.argument in DENSE.get(name.partition(":")[0], ())
        may_refuse = (
            spoilt.outcome is not READ or wants_dense or spoilt.argument in written(operator)
        )
        assert may_refuse, f"{name} refuses {spoilt}, which is only read: {error}"
        return
    assert_unchanged(before, memory_of(arguments), written(operator))
    accepts = spoilt.outcome is not REFUSED or accepted(name, spoilt)
    assert accepts, f"{name} accepts {spoilt}: {short(result)}"
    if spoilt.kind == "meta":
        return  # as is the result
    assert_right(name, operator, result, spoilt.apply(good()), good())


def check_all(
    name: str, operator: Any, good: Callable[[], Arguments], kinds: Iterable[Spoilt]
) -> None:
    """`check` for several kinds; says all that are wrong."""
    wrong = []
    for spoilt in kinds:
        try:
            check(name, operator, good, spoilt)
        except NotApplicable:
            continue
        except Exception as error:
            wrong.append(f"{spoilt}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def assert_unchanged(
    before: dict[str, list[Tensor]], after: dict[str, list[Tensor]], but: set[str]
) -> None:
    for argument in before.keys() - but:
        pairs = zip(before[argument], after[argument], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{argument} was changed"


def short(result: Any) -> str:
    return ", ".join(f"{t.dtype} {tuple(t.shape)} of {t.device}" for t in flatten(result)) or repr(
        result
    )


def assert_right(
    name: str, operator: Any, result: Any, arguments: Arguments, good: Arguments
) -> None:
    """Hold a result to that of plain copies of the arguments, and to plain PyTorch's."""
    tensors = flatten(result)
    assert sum(t.numel() for t in tensors) <= MOST_NUMBERS, f"{name} makes {short(result)}"
    copies = plain_copy(arguments, good)
    again = result_of(operator, copy.deepcopy(copies))
    if isinstance(result, (float, int, str)):
        assert repr(result) == repr(again)
    plain = PLAIN.get(name)
    if plain is None:
        for i, (a, b) in enumerate(zip(tensors, flatten(again), strict=True)):
            if a.dtype == torch.float32 == b.dtype and a.shape == b.shape:
                # In another layout sums have another order.
                assert_within_policy(a, b, b.double(), "default", what=f"result[{i}]")
            else:
                assert_parity(a, b, b.double(), what=f"result[{i}]")
        return
    eager = plain(*copies.values())
    truth = plain(*to_double(list(copies.values())))
    if isinstance(eager, float):
        assert repr(float(result)) == repr(eager)
        return
    for i, rows in enumerate(zip(tensors, flatten(eager), flatten(truth), strict=True)):
        if name.startswith("_train_conv"):
            assert_within_policy(*rows, "default", what=f"result[{i}]")
        else:
            assert_parity(*rows, what=f"result[{i}]")
