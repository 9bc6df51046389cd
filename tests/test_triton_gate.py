"""Every Triton kernel compiles for every chip, without a GPU, and its text is as it must be."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_host  # noqa: E402
import torch  # noqa: E402

from resnet_fused.backends.triton.configs import CONFIGS, Config  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.mark.timeout(1500)
def test_gate(tmp_path: Path) -> None:
    file = tmp_path / "gate.csv"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gate_triton.py", "--csv", file],
        capture_output=True, text=True, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {row["arch"] for row in rows} == {"80", "90", "100", "120"}
    cases = [row["case"] for row in rows]
    assert all(any(config.name in case for case in cases) for config in CONFIGS)


def test_gate_finds_what_is_wrong() -> None:
    """The reader of the text itself: each rule broken once."""
    import gate_triton as gate

    narrow = """
    %0 = arith.muli %a, %b : tensor<64xi32> loc(#loc)
    %1 = arith.extsi %0 : tensor<64xi32> to tensor<64xi64> loc(#loc)
    %2 = tt.splat %p : !tt.ptr<f16> -> tensor<64x64x!tt.ptr<f16>> loc(#loc)
    %3 = tt.addptr %2, %o : tensor<64x64x!tt.ptr<f16>>, tensor<64x64xi32> loc(#loc)
    %4 = tt.load %3, %m : tensor<64x64x!tt.ptr<f16>> loc(#loc)
    """
    found = gate.narrow_offsets(narrow)
    assert len(found) == 2 and "32-bit offsets" in found[0] and "widened" in found[1]
    assert (
        gate.narrow_offsets(narrow.replace("64x64xi32", "64x64xi64").replace("muli", "addi")) == []
    )


def test_kernels_are_compiled_ahead_and_not_launched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As tuning has it; what cannot be compiled raises where it is launched."""
    from resnet_fused.backends.triton import conv_bn_act, launch

    monkeypatch.setattr(triton.runtime.driver, "_active", bench_host.Driver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    conv_bn_act.conv_kernel.device_caches.clear()
    x = torch.empty(1, 64, 4, 4, dtype=torch.float16, device="meta").to(
        memory_format=torch.channels_last
    )
    weight = torch.empty(64, 64, 1, 1, dtype=torch.float16, device="meta")
    options = ([1, 1], [0, 0], [1, 1], 1)

    def run(config: Config, act: str = "relu") -> None:
        conv_bn_act.conv_bn_act(x, weight, None, None, None, *options, act, 0.0, config, "ieee")

    good = [Config(64, 64, 64, 4, 3), Config(64, 32, 64, 4, 3)]
    bad = Config(64, 48, 64, 4, 3)  # no power of two
    with launch.compiling_ahead():
        for config in (*good, bad):
            run(config)
    found = [compiled for name, compiled in launch.compiled_kernels() if name == "conv_kernel"]
    assert len(found) == 2 and all("wgmma" in compiled.asm["ptx"] for compiled in found)
    with pytest.raises(Exception, match=r"48|power"):
        run(bad)
    conv_bn_act.conv_kernel.device_caches.clear()


def test_threads_that_met_in_the_parser_compile_again() -> None:
    """CPython 3.11's parser says so by SystemError, of a source in which nothing is wrong."""
    from resnet_fused.backends.triton import launch

    left = [SystemError("AST constructor recursion depth mismatch (before=33, after=74)")] * 3

    def compiled(name: str) -> str:
        if left:
            raise left.pop()
        return name

    with launch._Compilers(1) as threads:
        assert threads.submit(compiled, name="kernel").result() == "kernel"
        left += [SystemError("always")] * 100
        with pytest.raises(SystemError, match="always"):
            threads.submit(compiled, "kernel").result()
