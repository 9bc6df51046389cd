"""The compiled libraries; all other metadata is in pyproject.toml.

``resnet_fused._C_cpu`` and ``_C_cuda`` use the stable ABI of LibTorch and no Python API, so one
build serves every Python >= 3.10 and torch >= 2.11. They are loaded with
``torch.ops.load_library``. Build with ``pip install --no-build-isolation .``: an isolated build
would download another torch.

The CUDA library is built wherever nvcc is, GPU or not (setup_cuda.py), unless
RESNET_FUSED_NO_CUDA_BUILD=1.
"""

import glob
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"resnet_fused: torch cannot be imported here ({error}). Install torch first, then build "
        "with: pip install --no-build-isolation ."
    ) from error

sys.path.insert(0, str(Path(__file__).parent))  # pip builds without it
import setup_cuda

# GCC or Clang. Values are kept, NaN and signed zeros too: never -ffast-math.
COMPILE = [
    "-O3",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]
LINK = []

# make mutate: compiled often and run briefly. Python's own -fwrapv makes the compiler take eight
# times as long.
if level := os.environ.get("RESNET_FUSED_OPTIMIZE"):
    COMPILE += [f"-O{level}", "-fno-wrapv"]

# make sanitize: reads out of bounds and undefined behaviour end the process. Python's own -fwrapv
# would hide overflows. make sanitize-threads: data races are reported.
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize=vptr"],
    "threads": ["-fsanitize=thread"],
}
# Such a build is run here, and threads are the same in every instruction set.
if sanitizer := os.environ.get("RESNET_FUSED_SANITIZE"):
    if sanitizer == "threads" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        COMPILE.append("-DRESNET_FUSED_NO_AVX512")
    LINK = SANITIZERS[sanitizer]
    COMPILE += [*LINK, "-fno-wrapv", "-O1", "-g1"]
    if sanitizer == "memory":
        COMPILE += ["-fno-sanitize-recover=undefined"]

cpu = CppExtension(
    "resnet_fused._C_cpu",
    sorted(glob.glob("csrc/cpu/*.cpp")),
    define_macros=[("TORCH_TARGET_VERSION", setup_cuda.TORCH_2_11)],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
    py_limited_api=True,
)


cuda = Extension(
    "resnet_fused._C_cuda",
    sorted(glob.glob("csrc/cuda/*.cu")),
    depends=sorted(glob.glob("csrc/c*/*.*h")),
    py_limited_api=True,
)


class Build(BuildExtension):
    """Leaves a library out, with one warning, where its compiler is missing."""

    def run(self) -> None:
        left_out = set()
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            left_out.add(cpu.name)
            self.warn(
                f"no C++ compiler ({compiler!r} not found; set CXX to name one): resnet_fused is "
                "installed without its compiled CPU kernels, and runs as plain PyTorch on the CPU"
            )
        if os.environ.get("RESNET_FUSED_NO_CUDA_BUILD") == "1":
            left_out.add(cuda.name)
        elif (reason := setup_cuda.missing()) is not None:
            left_out.add(cuda.name)
            self.warn(
                f"{reason}: resnet_fused is installed without its compiled CUDA kernels; on a GPU "
                "it has Triton's. RESNET_FUSED_NO_CUDA_BUILD=1 silences this"
            )
        self.extensions = [ext for ext in self.extensions if ext.name not in left_out]
        super().run()

    def build_extensions(self) -> None:
        every = self.extensions
        self.extensions = [ext for ext in every if ext.name == cpu.name]
        if self.extensions:
            super().build_extensions()
        self.extensions = every
        if cuda.name in (ext.name for ext in every):
            try:
                setup_cuda.build(Path(self.get_ext_fullpath(cuda.name)))
            except setup_cuda.CompileError as error:
                without = "RESNET_FUSED_NO_CUDA_BUILD=1 builds without"
                raise SystemExit(f"{error}\nresnet_fused: nvcc failed; {without}") from error


setup(
    ext_modules=[cpu, cuda],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
