"""examples/cpp_inference: a fused model in a process without Python, and what it is packaged as."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tolerance import assert_parity, double_model
from torch import Tensor, nn

import resnet_fused
from resnet_fused.backends import native

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "cpp_inference"
FOLDER = ROOT / "build" / "cpp_inference" / "test"
LIBRARY = ROOT / "resnet_fused" / "_C_cpu.abi3.so"
SHAPE = (2, 3, 64, 64)


def missing() -> str | None:
    """What it takes to build the program and is not here, or None."""
    tools = ["cmake", os.environ.get("CXX", "g++").split()[0]]
    if torch.version.cuda is not None:
        tools.append("nvcc")  # find_package(Torch) wants it
    lacks = [tool for tool in tools if shutil.which(tool) is None]
    return f"no {' and no '.join(lacks)}" if lacks else None


needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@dataclass(frozen=True)
class Built:
    """The program, and what export.py wrote."""

    program: Path
    folder: Path

    @property
    def package(self) -> Path:
        return self.folder / "resnet18.pt2"

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *map(str, arguments)],
            env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def result(self, images: Tensor, tmp_path: Path, **environment: str) -> tuple[Tensor, str]:
        """What the program makes of a batch, and what it says on stderr."""
        torch.save(images, tmp_path / "input.pt")
        output = tmp_path / "output.pt"
        done = self.run(
            self.package, tmp_path / "input.pt", output, *libraries(), **environment
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return torch.load(output, weights_only=True), done.stderr


def libraries() -> list[Path]:
    return [LIBRARY] if native.available else []


def must(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def sources_of_a_package() -> str:
    """A digest of whatever a package is made of, the library's kernels aside."""
    isa = native.isa() if native.available else "none"
    digest = hashlib.sha256(f"{torch.__version__} {isa}".encode())
    for path in sorted([EXAMPLE / "export.py", *(ROOT / "resnet_fused").rglob("*.py")]):
        digest.update(path.read_bytes())
    if native.available:
        digest.update(LIBRARY.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One process at a time, of all workers of a test run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def built() -> Built:
    packages, digest = FOLDER / "package", sources_of_a_package()
    with only_one(FOLDER):
        must(
            "cmake", "-S", EXAMPLE, "-B", FOLDER / "cmake",
            f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch",
        )  # fmt: skip
        must("cmake", "--build", FOLDER / "cmake")
        if not (packages / digest).exists():
            shutil.rmtree(packages, ignore_errors=True)
            must(
                sys.executable, EXAMPLE / "export.py", "--out", packages,
                f"--batch-size={SHAPE[0]}", f"--image-size={SHAPE[2]}",
            )  # fmt: skip
            (packages / digest).touch()
    return Built(FOLDER / "cmake" / "cpp_inference", packages)


@pytest.fixture(scope="module")
def export() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpp_inference_export", EXAMPLE / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def resnet18(export: ModuleType) -> tuple[nn.Module, Tensor]:
    return export.model_and_images("resnet18", SHAPE[0], SHAPE[2], torch.float32, "cpu")


# --- the program


@needs_compiler
def test_the_same_as_in_python(
    built: Built, resnet18: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    model, images = resnet18
    # The package compares the sizes and strides of what operators return with what export.py said.
    actual, _ = built.result(images, tmp_path, AOTI_RUNTIME_CHECK_INPUTS="1")
    with torch.no_grad():
        assert_parity(actual, model(images), double_model(model)(images.double()))
    if native.available and native.isa() != "baseline":
        expected = torch.load(built.folder / "expected.pt", weights_only=True)
        assert torch.equal(actual, expected)


@needs_compiler
def test_other_layouts_and_what_is_not_finite(
    built: Built, resnet18: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    model, images = resnet18
    images = images.clone(memory_format=torch.contiguous_format)
    images[1, 2, 3, 4] = float("nan")
    actual, _ = built.result(images, tmp_path)
    with torch.no_grad():
        assert_parity(actual, model(images), double_model(model)(images.double()))


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the loader of glibc")
def test_no_python_in_the_process(
    built: Built, resnet18: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    _, loaded = built.result(resnet18[1], tmp_path, LD_DEBUG="files")
    assert "libtorch_cpu.so" in loaded
    assert all(str(library) in loaded for library in libraries())
    assert "libpython" not in loaded and "libtorch_python" not in loaded


ERRORS = {
    "no_package": (["{no}.pt2", "{input}", "{output}"], "there is no package {no}.pt2"),
    "no_library": (
        ["{package}", "{input}", "{output}", "{no}.so"],
        "cannot load the library {no}.so: cannot open shared object file",
    ),
    "not_a_library": (["{package}", "{input}", "{output}", "{input}"], "cannot load the library"),
    "no_input": (["{package}", "{no}.pt", "{output}", "{library}"], "cannot read the input {no}"),
    "not_a_package": (["{input}", "{input}", "{output}"], "{input}: "),
    "not_a_zip": (["{text}", "{input}", "{output}"], "{text}: "),
    "not_a_tensor": (
        ["{package}", "{list}", "{output}", "{library}"], "{list}: expected a tensor",
    ),
    "no_folder": (["{package}", "{input}", "{no}/o.pt", "{library}"], "cannot write the output"),
    "shape": (
        ["{package}", "{small}", "{output}", "{library}"],
        "input: expected float32 of shape [2, 3, 64, 64], got float32 of shape [2, 3, 32, 32]",
    ),
    "dtype": (
        ["{package}", "{double}", "{output}", "{library}"],
        "input: expected float32 of shape [2, 3, 64, 64], got float64 of shape [2, 3, 64, 64]",
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", ERRORS)
def test_errors(built: Built, name: str, tmp_path: Path) -> None:
    arguments, message = ERRORS[name]
    if "{library}" in arguments and not native.available:
        pytest.skip(str(native.reason))
    files = {
        "input": torch.zeros(SHAPE), "list": [1, 2], "small": torch.zeros(2, 3, 32, 32),
        "double": torch.zeros(SHAPE, dtype=torch.float64),
    }  # fmt: skip
    for file, value in files.items():
        torch.save(value, tmp_path / file)
    (tmp_path / "text").write_text("no package\n" * 1000)
    paths = {file: tmp_path / file for file in (*files, "text", "output", "no")}
    paths |= {"package": built.package, "library": LIBRARY}
    done = built.run(*(argument.format(**paths) for argument in arguments))
    assert done.returncode == 1, done.stderr
    assert f"cpp_inference: {message.format(**paths)}" in done.stderr
    assert not (tmp_path / "output").exists()


@needs_compiler
@pytest.mark.skipif(not native.available, reason=str(native.reason))
def test_a_library_that_is_not_named(built: Built, tmp_path: Path) -> None:
    done = built.run(built.package, built.folder / "input.pt", tmp_path / "output.pt")
    assert done.returncode == 1
    assert "no library that was named has a kernel of resnet_fused::" in done.stderr


@needs_compiler
@pytest.mark.skipif(not native.available, reason=str(native.reason))
def test_a_library_of_another_version(built: Built, tmp_path: Path) -> None:
    """As if an argument had got another name since."""
    changed = tmp_path / "changed.pt2"
    with zipfile.ZipFile(built.package) as old, zipfile.ZipFile(changed, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("metadata.json"):
                assert b"_average_pixels(Tensor input)" in data
                data = data.replace(b"_average_pixels(Tensor input)", b"_average_pixels(Tensor x)")
            new.writestr(item, data)
    done = built.run(changed, built.folder / "input.pt", tmp_path / "output.pt", LIBRARY)
    assert done.returncode == 1
    assert "the package is of another version than the library" in done.stderr


@needs_compiler
def test_usage(built: Built) -> None:
    done = built.run(built.package)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


# --- what is packaged


@pytest.mark.skipif(
    not native.available or native.isa() == "baseline", reason="convolutions are oneDNN's"
)
def test_a_network_is_packaged_as_it_runs(
    export: ModuleType, resnet18: tuple[nn.Module, Tensor]
) -> None:
    model, images = resnet18
    with torch.no_grad():
        graph = export.as_it_runs(resnet_fused.fuse(model), images)
    names = [operator._opname for operator in export.operators_of(graph)]
    assert names.count("_packed_convs") == 3  # the stem, all blocks, the classifier
    assert "conv_bn_act" not in names


def test_what_is_not_all_ours_is_packaged_as_its_formula(export: ModuleType) -> None:
    """A depthwise convolution is oneDNN's, and how that is called depends on the data."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.BatchNorm2d(8), nn.SiLU(),
    ).eval().to(memory_format=torch.channels_last)  # fmt: skip
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(model)
    with torch.no_grad():
        assert export.as_it_runs(fused, images) is None
        program = export.formula(fused, images)
        actual = program.module()(images)
        assert_parity(actual, model(images), double_model(model)(images.double()))
    assert not any("resnet_fused" in str(node.target) for node in program.graph.nodes)


def test_a_model_in_training_is_refused(export: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected one in evaluation"):
        export.package(nn.Linear(2, 2), torch.randn(2, 2), tmp_path / "model.pt2")


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "export.py"), "--model=resnet19", f"--out={tmp_path}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "unknown model 'resnet19' (did you mean resnet1" in done.stderr
