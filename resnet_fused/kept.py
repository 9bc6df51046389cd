"""Values made from tensors, kept as long as nothing they were made from has changed.

They are keyed on the identity, the version counter and the address of every tensor. So
``load_state_dict``, an optimizer step, assigning a parameter, ``.to()`` and any in-place change
outdate them. Writing through ``tensor.data`` or a NumPy view hides from the version counter, here
as in autograd.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from resnet_fused.process_lock import ProcessLock

T = TypeVar("T")


class Kept(Generic[T]):
    """A value made from tensors, kept as long as they and its options have not changed.

    Safe to share between threads and streams. A copy (deepcopy, pickle) starts empty.
    """

    _computes = True

    def __init__(self) -> None:
        # The tensors are kept alive with it, so that no other one can take an identity.
        self._kept: tuple[tuple[object, ...], Sequence[Tensor | None], T] | None = None
        self._lock = ProcessLock()

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return type(self), ()

    def get(
        self,
        options: tuple[object, ...],
        sources: Sequence[Tensor | None],
        make: Callable[[], T],
    ) -> T:
        """The value for these tensors, made now if need be."""
        key = options, _state(sources)
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[2]
        with self._lock.here(), torch.no_grad():
            kept = self._kept  # another thread may have made it, and launched with it
            if kept is not None and kept[0] == key:
                return kept[2]
            value = make()
            if _lasts(sources, wait=self._computes):
                self._kept = key, sources, value
        return value


class KeptPlan(Kept[T]):
    """The same of a value that is no tensor, nor has any but those of other kept values."""

    _computes = False


def _lasts(sources: Sequence[Tensor | None], *, wait: bool) -> bool:
    """Whether a value that was made now can be kept.

    Not in a dispatch mode: it may be of tensors without numbers. Not while a CUDA graph is
    recorded: nothing is computed then, and the memory is the graph's. Otherwise a GPU has computed
    it when this returns, as any stream may read it from now on.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    device = next((t.device for t in sources if t is not None and t.is_cuda), None)
    if device is None or not torch.cuda.is_initialized():
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    if wait:
        torch.cuda.current_stream(device).synchronize()
    return True


def _state(tensors: Sequence[Tensor | None]) -> object:
    if tensors and _fully_sharded():
        return object()
    try:
        return [None if t is None else (id(t), t._version, t.data_ptr()) for t in tensors]
    except RuntimeError:  # an inference tensor has no version: nothing made from it is kept
        warnings.warn(
            "resnet_fused packs the weights of this model again at every call, which is slow: the "
            "model was made or copied under torch.inference_mode(), so changes of its weights "
            "cannot be seen. Make, copy and fuse it outside; running it inside is fine",
            stacklevel=2,
        )
        return object()


def _fully_sharded() -> bool:
    """Whether this process has a model under FSDP2, which gathers new weights into old tensors.

    Neither version nor address tells of it.
    """
    states = sys.modules.get("torch.distributed._composable_state")
    return states is not None and bool(states._module_state_mapping)
