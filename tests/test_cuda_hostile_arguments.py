"""The CUDA library's operators called directly, with one argument at a time that does not fit.

As test_hostile_arguments.py, in the emulator: an address outside of what CUDA knows would end the
process's use of a GPU, so that no later test could say anything.
"""

from __future__ import annotations

import hostile
import pytest
import torch
from cuda_case import HAS_GPU, MISSING, needs_cuda_kernels, operators
from hostile import Spoilt
from hostile_calls import cuda
from hostile_check import check_all, result_of
from test_hostile_arguments import ELSEWHERE

pytestmark = [
    needs_cuda_kernels,
    pytest.mark.skipif(HAS_GPU, reason="spoils CPU tensors for the emulator"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300, method="thread"),  # a kernel does not come back for a signal
]

CALLS = {} if HAS_GPU or MISSING is not None else cuda(operators())


def operator(name: str) -> object:
    return getattr(operators(), name.partition(":")[0])


def cases() -> list[object]:
    """By operator and argument, or element of a list."""
    found: dict[tuple[str, str], list[Spoilt]] = {}
    for name, good in CALLS.items():
        for spoilt in hostile.all_spoilt(good()):
            found.setdefault((name, spoilt.place), []).append(spoilt)
    return [pytest.param(n, some, id=f"{n}-{place}") for (n, place), some in found.items()]


def test_every_operator_has_a_good_call() -> None:
    names = {
        n.partition("::")[2].partition(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("resnet_fused_cuda_on_cpu::")
    }
    # What tests set in the emulator is no operator of the library.
    settings = {"_set_order", "_only_blocks", "_set_multiprocessors"}
    called = {name.partition(":")[0] for name in CALLS}
    assert names == called | settings
    assert called >= ELSEWHERE - {"_cuda_architecture"}


@pytest.mark.parametrize("name", CALLS)
def test_good_call(name: str) -> None:
    arguments = CALLS[name]()
    assert list(arguments) == [a.name for a in operator(name).default._schema.arguments]
    result_of(operator(name), arguments)


@pytest.mark.parametrize(("name", "kinds"), cases())
def test_spoilt(name: str, kinds: list[Spoilt]) -> None:
    check_all(name, operator(name), CALLS[name], kinds)
