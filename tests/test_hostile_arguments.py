"""Every operator called directly, with one argument at a time that does not fit.

An operator must not trust who calls it: `torch.ops.resnet_fused` is open to everybody. A clear
exception or the right result, never a crash, a hang or memory that nobody wrote; and no argument
is changed. The kinds are hostile.py's, the good calls hostile_calls.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hostile
import pytest
import torch
from hostile import Spoilt
from hostile_calls import CPU, Arguments
from hostile_check import assert_unchanged, check_all, memory_of, result_of
from tolerance import flatten
from torch import Tensor

from resnet_fused.backends import native, native_conv

pytestmark = [
    pytest.mark.skipif(
        native_conv.unusable(torch.float32) is not None,
        reason=str(native_conv.unusable(torch.float32)),
    ),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300, method="thread"),  # a kernel does not come back for a signal
]

ELSEWHERE = {
    "_finish_conv_", "_cuda_conv", "_cuda_pack", "_cuda_train_conv", "_cuda_train_conv_input",
    "_train_pool_input", "_cuda_architecture",
}  # fmt: skip
"""Operators that run on CUDA tensors only: test_cuda_hostile_arguments.py."""


def operator(name: str) -> object:
    return getattr(torch.ops.resnet_fused, name.partition(":")[0])


def cases() -> list[object]:
    """By operator and argument, or element of a list."""
    found: dict[tuple[str, str], list[Spoilt]] = {}
    for name, good in CPU.items() if native.available else ():
        for spoilt in hostile.all_spoilt(good()):
            found.setdefault((name, spoilt.place), []).append(spoilt)
    return [pytest.param(n, some, id=f"{n}-{place}") for (n, place), some in found.items()]


def test_every_operator_has_a_good_call() -> None:
    names = {
        n.removeprefix("resnet_fused::").partition(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("resnet_fused::")
    }
    assert names == {name.partition(":")[0] for name in CPU} | (ELSEWHERE & names)


def test_there_are_as_many_kinds_as_promised() -> None:
    assert sum(map(len, hostile.TABLES.values())) >= 60


@pytest.mark.parametrize("name", CPU)
def test_good_call(name: str) -> None:
    """Guard of this file: what is spoilt below is fine as a whole, and named as in the schema."""
    arguments = CPU[name]()
    schema = operator(name).default._schema
    assert list(arguments) == [a.name for a in schema.arguments]
    result_of(operator(name), arguments)


@pytest.mark.parametrize(("name", "kinds"), cases())
def test_spoilt(name: str, kinds: list[Spoilt]) -> None:
    check_all(name, operator(name), CPU[name], kinds)


def shifted(t: Tensor, numbers: int) -> Tensor:
    """A tensor like `t` over the same memory, so many numbers further on."""
    memory = torch.cat([t.flatten(), t.flatten()[:8]])
    t.set_(memory, 0, t.shape, t.stride())
    return memory.as_strided(t.shape, t.stride(), numbers)


def as_residual(numbers: int) -> Callable[[Arguments], Arguments]:
    return lambda a: a | {"residual": shifted(a["input"], numbers)}


def in_input(name: str) -> Callable[[Arguments], Arguments]:
    return lambda a: a | {name: a["input"].as_strided((5,), (1,))}


def replaced(name: str, index: int, by: Callable[[list[Any]], Any]) -> Callable[..., Arguments]:
    def change(a: Arguments) -> Arguments:
        values = list(a[name])
        values[index] = by(values)
        return a | {name: values}

    return change


# Arguments that do not go together: the call, what is done to it, and whether it may come to a
# result, which is then that of arguments that share no memory.
TOGETHER: dict[str, tuple[str, Callable[[Arguments], Arguments], bool]] = {
    "residual is the input": ("_scale_shift_act_", as_residual(0), True),
    "residual lies a number further": ("_scale_shift_act_", as_residual(1), False),
    "residual lies a row further": ("_scale_shift_act_", as_residual(5), False),
    "scale lies in the input": ("_scale_shift_act_", in_input("scale"), True),
    "shift lies in the input": ("_scale_shift_act_", in_input("shift"), True),
    "the input twice": (
        "_scale_shift_act_", lambda a: a | {"input": a["input"][:1].expand(3, 5, 4, 6)}, False,
    ),
    "running twice": (
        "_update_running_statistics", replaced("running", 1, lambda v: v[0]), False,
    ),
    "counters twice": (
        "_update_running_statistics", replaced("counters", 1, lambda v: v[0]), False,
    ),
    "batch is running": (
        "_update_running_statistics", lambda a: a | {"batch": a["running"]}, False,
    ),
    "batch lies over running": (
        "_update_running_statistics",
        lambda a: a | {"batch": [shifted(r, 2) for r in a["running"]]}, False,
    ),
    "batch twice": ("_update_running_statistics", replaced("batch", 1, lambda v: v[0]), True),
    "packed for fewer outputs": (
        "_packed_convs: direct", replaced("packed", 0, lambda v: v[0][: v[0].numel() // 2]), False,
    ),
    "packed for another kernel": (
        "_packed_convs: winograd4", replaced("packed", 0, lambda v: v[1]), False,
    ),
    "packed a number": (
        "_packed_convs: winograd4", replaced("packed", 0, lambda v: v[0][:1].expand_as(v[0])),
        False,
    ),
    "packed every other number": (
        "_packed_convs: direct", replaced("packed", 0, lambda v: torch.cat([v[0]] * 2)[::2]), False,
    ),
    "packed of another algorithm": (
        "_packed_convs: winograd4", replaced("algorithms", 0, lambda v: "winograd4_late"), False,
    ),
    "every convolution reads itself": (
        "_packed_convs: direct", replaced("steps", 9, lambda v: 3), False,
    ),
    "two convolutions read each other": (
        "_train_block", lambda a: a | {"numbers": [3, -1, *a["numbers"][2:]]}, False,
    ),
    "a mask of no residual": (
        "_train_block_backward",
        lambda a: a | {"numbers": [*a["numbers"][:8], 22, *a["numbers"][9:]]}, False,
    ),
    "unknown bits": (
        "_train_block_backward",
        lambda a: a | {"numbers": [*a["numbers"][:8], 6 + 32, *a["numbers"][9:]]}, False,
    ),
    "a gradient of fewer images": (
        "_train_conv_backward", lambda a: a | {"grad": a["grad"][:1], "output": a["output"][:1]},
        False,
    ),
    "a gradient on its side": (
        "_train_conv_backward",
        lambda a: a | {k: a[k].transpose(2, 3) for k in ("grad", "output")}, False,
    ),
    "a pool of more": (
        "_train_conv_backward: pool",
        lambda a: a | {k: a[k][:, :, :2, :2] for k in ("grad", "positions")}, False,
    ),
    "places of a line": (
        "_train_conv_backward: pool", lambda a: a | {"positions": a["positions"].flatten()}, False,
    ),
    "a list for each of two": (
        "_max_pool2d", lambda a: a | {"kernel_size": [3, 3, 2], "stride": [2]}, False,
    ),
    "outputs without channels": (
        "_train_block_backward",
        lambda a: a | {
            "grad_output": torch.zeros(2, 0, 6, 5), "outputs": [torch.zeros(2, 0, 6, 5)] * 2,
            "statistics": [torch.zeros(0)] * 4,
        },
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOGETHER)
def test_arguments_that_do_not_go_together(kind: str) -> None:
    name, change, may_work = TOGETHER[kind]
    arguments = change(CPU[name]())
    before, apart = memory_of(arguments), copy.deepcopy(arguments)
    if not may_work:
        with pytest.raises(RuntimeError):
            operator(name)(**arguments)
        assert_unchanged(before, memory_of(arguments), set())
        return
    for a in arguments:  # a copy for each, as a copy of all would share memory again
        apart[a] = copy.deepcopy(arguments[a])
    results = (flatten(result_of(operator(name), given)) for given in (arguments, apart))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
