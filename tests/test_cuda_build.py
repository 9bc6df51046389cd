"""How the CUDA library is built and loaded, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused.backends import native_cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup_cuda  # noqa: E402

missing = setup_cuda.missing()
needs_nvcc = pytest.mark.skipif(missing is not None, reason=str(missing))
LIBRARY = ROOT / "resnet_fused" / "_C_cuda.abi3.so"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


@needs_nvcc
def test_what_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_cuda, "ROOT", tmp_path)
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "number.cuh").write_text("#define NUMBER 1\n")
    for name in ("one", "two"):
        (folder / f"{name}.cu").write_text("__global__ void kernel(int* x) { *x = NUMBER; }\n")
    with pytest.raises(setup_cuda.CompileError, match='"NUMBER" is undefined'):
        compiled(("80",))
    for name in ("one", "two"):
        source = folder / f"{name}.cu"
        source.write_text('#include "number.cuh"\n' * (name == "one") + source.read_text())
    (folder / "two.cu").write_text("__global__ void kernel() {}\n")
    assert compiled(("80",)) == ["one", "two"]
    assert compiled(("80",)) == []
    (folder / "number.cuh").write_text("#define NUMBER 2\n")
    assert compiled(("80",)) == ["one"]
    assert compiled(("80", "90a")) == ["one", "two"]
    (folder / "two.cu").unlink()
    assert [p.stem for p in setup_cuda.compile_objects(nvcc(), ("80",))] == ["one"]


def compiled(archs: tuple[str, ...]) -> list[str]:
    """The stems of the files that are compiled now."""
    before = {p: p.stat().st_mtime_ns for p in setup_cuda.ROOT.glob("build/cuda/*/*.o")}
    objects = setup_cuda.compile_objects(nvcc(), archs)
    return [p.stem for p in objects if p.stat().st_mtime_ns != before.get(p)]


def nvcc() -> str:
    found = setup_cuda.find_nvcc()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("wanted", "archs"),
    [("90a", ("90a",)), ("80, 100+PTX", ("80", "100+PTX")), (" 89;90 ", ("89", "90a"))],
)
def test_architectures_are_named(
    wanted: str, archs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_CUDA_ARCHS", wanted)
    assert setup_cuda.architectures("no nvcc is asked") == archs


@needs_nvcc
def test_all_architectures_that_nvcc_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESNET_FUSED_CUDA_ARCHS", raising=False)
    assert setup_cuda.architectures(nvcc()) == setup_cuda.ARCHITECTURES
    monkeypatch.setattr(setup_cuda, "_output", lambda *command: "sm_75 sm_80 sm_89 sm_90")
    assert setup_cuda.architectures("one of CUDA 12.6") == ("80", "89", "90a")


def test_nvcc_is_found_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    compilers = [tmp_path / "a" / "nvcc", tmp_path / "bin" / "nvcc"]
    for compiler in compilers:
        compiler.parent.mkdir()
        compiler.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_cuda.find_nvcc() == str(compilers[1])
    monkeypatch.setenv("CUDACXX", str(compilers[0]))
    assert setup_cuda.find_nvcc() == str(compilers[0])
    assert "no C++ compiler for nvcc" in (setup_cuda.missing() or "")
    monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: None)
    assert "no CUDA compiler" in (setup_cuda.missing() or "")


@pytest.mark.parametrize(("switch", "warnings"), [("0", 1), ("1", 0)])
def test_without_nvcc_setup_warns_once_and_builds_the_rest(switch: str, warnings: int) -> None:
    done = run_python(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import setup_cuda\n"
        "setup_cuda.find_nvcc = lambda: None\n"
        "sys.argv = ['setup.py', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n",
        RESNET_FUSED_NO_CUDA_BUILD=switch,
        CXX="no-compiler",
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count("without its compiled CUDA kernels") == warnings
    assert said.count("without its compiled CPU kernels") == 1


@needs_nvcc
@pytest.mark.skipif(not LIBRARY.exists(), reason="not built: make .venv/.cuda")
def test_library_needs_nothing_that_torch_lacks_and_shows_nothing_of_cuda() -> None:
    """It cannot be loaded here, so that a misspelt name would be found on a GPU only."""

    def symbols(path: Path, kind: str) -> set[str]:
        done = subprocess.run(
            ["nm", "-D", f"--{kind}-only", path], capture_output=True, text=True, check=True
        )
        return {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}

    of_torch = symbols(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "defined")
    wanted = {name for name in symbols(LIBRARY, "undefined") if "torch" in name}
    assert "torch_library_impl" in wanted
    assert wanted - of_torch <= {"aoti_torch_get_current_cuda_stream"}
    assert not {name for name in symbols(LIBRARY, "defined") if "cuda" in name.lower()}


# --- loading


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_nothing_is_loaded_into_a_torch_without_cuda() -> None:
    assert not native_cuda.available
    assert native_cuda.reason == "this torch is built without CUDA"
    assert "without CUDA" in (native_cuda.unusable(0) or "")
    with pytest.raises(RuntimeError, match="not loaded"):
        native_cuda.architecture(0)


PRETEND = """
import pathlib
import torch
torch.version.cuda, torch.cuda.device_count = "13.0", lambda: {gpus}
glob, load = pathlib.Path.glob, torch.ops.load_library
found = [pathlib.Path("_C_cuda.abi3.so")] if {there} else []
pathlib.Path.glob = lambda p, pattern, **k: (
    iter(found) if pattern.startswith("_C_cuda") else glob(p, pattern, **k)
)
torch.ops.load_library = lambda path: None if "_C_cuda" in path else load(path)
from resnet_fused.backends import native_cuda
print(native_cuda.available, native_cuda.reason)
"""


@pytest.mark.parametrize(
    ("gpus", "there", "warnings"), [(1, False, 1), (0, False, 0), (1, True, 0)]
)
def test_a_missing_library_is_told_where_there_is_a_gpu(
    gpus: int, there: bool, warnings: int
) -> None:
    done = run_python(PRETEND.format(gpus=gpus, there=there), RESNET_FUSED_NO_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its compiled CUDA kernels") == warnings
    assert done.stdout.startswith("True None" if there else "False not built: no _C_cuda")


def test_the_library_is_left_alone_where_it_is_not_wanted() -> None:
    done = run_python(PRETEND.format(gpus=1, there=True), RESNET_FUSED_NO_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False switched off by RESNET_FUSED_NO_CUDA=1"
    assert "CUDA kernels" not in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(not native_cuda.available, reason=str(native_cuda.reason))
def test_it_has_code_for_this_gpu() -> None:
    major, minor = torch.cuda.get_device_capability(0)
    assert native_cuda.unusable(0) is None
    assert 80 <= native_cuda.architecture(0) <= 10 * major + minor
