"""Memory that runs out at every allocation of the compiled library in turn.

Each gives a Python exception, or a result where memory was found after all; the process lives, the
next call gives the same bits, and nothing of the library's memory is lost. Of an operation's
allocations eight fail here, evenly spread; RESNET_FUSED_LONG=1 takes all, and more operations.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_out_of_memory import CASES, CONVOLUTIONS

from resnet_fused.backends import native_conv

HERE = Path(__file__).parent
ROOT = HERE.parent
LONG = bool(os.environ.get("RESNET_FUSED_LONG"))

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="preloads a library"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="sanitizers have their own allocators"),
]


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("allocations") / "failing.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", path]
    subprocess.run([*command, HERE / "failing_allocations.cpp"], check=True)
    return path


USUAL = ("passes", "evaluation", "training")
PARTS = {"convolutions": list(CONVOLUTIONS)} | {
    name: [name] for name in CASES if name in USUAL or (LONG and name not in CONVOLUTIONS)
}


@pytest.mark.parametrize("part", PARTS)
def test_every_allocation_fails_in_turn(part: str, preload: Path) -> None:
    import torch

    names = PARTS[part]
    dtype = torch.bfloat16 if "bfloat16" in part else torch.float32
    if reason := native_conv.unusable(dtype):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", HERE / "run_out_of_memory.py", *names],
        capture_output=True, text=True, timeout=900,
        env={
            **os.environ, "LD_PRELOAD": str(preload), "OMP_NUM_THREADS": "2",
            "MOST_FAILURES": "100000" if LONG else "8",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        found = re.search(rf"^{name}: (\d+) allocations, raised (\d+)$", done.stdout, re.MULTILINE)
        assert found, f"{name} is missing in {done.stdout}"
        assert min(map(int, found.groups())) > 0, "nothing failed: the test shows nothing"
