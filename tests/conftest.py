"""What every test starts from: a fixed seed, and no global setting left changed by the test
before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

# Nobody's measured choices decide what is tested.
os.environ["RESNET_FUSED_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "no resnet_fused cache")


@pytest.fixture(autouse=True)
def fixed_start() -> Iterator[None]:
    """Seed torch, and put back the thread count, the default dtype and the gradient mode
    afterwards.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty starts as NaN, so that an element a kernel forgets shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
