"""`make sanitize-threads` sees a race where there is one, and none where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("planted_race.cpp")
SANITIZED = "libtsan" in os.environ.get("LD_PRELOAD", "")

pytestmark = pytest.mark.skipif(not SANITIZED, reason="runs in `make sanitize-threads`")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators, compiled as the library is."""
    path = tmp_path_factory.mktemp("race") / "planted_race.so"
    command = [
        "g++", "-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-fPIC", "-shared",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", str(SOURCE), "-o", str(path),
        *(f"-I{p}" for p in include_paths()), *(f"-L{p}" for p in library_paths()),
        "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=environment)
    return path


def run(library: Path, operator: str) -> subprocess.CompletedProcess[str]:
    """The operator called in a process of its own, whose reports are not the whole run's."""
    code = (
        "import torch\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "torch.set_num_threads(4)\n"
        f"print(torch.ops.planted_race.{operator}(4))\n"
    )
    options = " ".join(o for o in os.environ["TSAN_OPTIONS"].split() if "log_path" not in o)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "TSAN_OPTIONS": options},
    )  # fmt: skip


def test_a_planted_race_is_reported(library: Path) -> None:
    done = run(library, "racy")
    assert "ThreadSanitizer: data race" in done.stderr
    assert SOURCE.name in done.stderr
    assert done.returncode == 66


def test_regions_are_ordered_by_their_ends(library: Path) -> None:
    done = run(library, "ordered")
    assert (done.returncode, done.stdout, done.stderr) == (0, "400\n", "")


def test_the_library_is_the_sanitized_one() -> None:
    maps = Path("/proc/self/maps").read_text()
    import resnet_fused

    folder = Path(resnet_fused.__file__).parent
    assert folder.parts[-3] == "sanitized_threads" and str(folder / "_C_cpu") in maps
    assert torch.ops.resnet_fused._cpu_isa()
