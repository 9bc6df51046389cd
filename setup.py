"""The compiled library; all other metadata is in pyproject.toml.

``resnet_fused._C_cpu`` uses the stable ABI of LibTorch and no Python API, so one build serves every
Python >= 3.10 and torch >= 2.11. It is loaded with ``torch.ops.load_library``. Build with
``pip install --no-build-isolation .``: an isolated build would download another torch.
"""

import glob
import os
import shutil

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"resnet_fused: torch cannot be imported here ({error}). Install torch first, then build "
        "with: pip install --no-build-isolation ."
    ) from error

TORCH_2_11 = "0x020b000000000000"

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

# make sanitize: reads out of bounds and undefined behaviour end the process. Python's own -fwrapv
# would hide overflows, and makes the compiler take eight times as long.
if os.environ.get("RESNET_FUSED_SANITIZE") == "1":
    LINK = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
    COMPILE += [*LINK, "-fno-sanitize-recover=undefined", "-fno-wrapv", "-O1", "-g1"]

cpu = CppExtension(
    "resnet_fused._C_cpu",
    sorted(glob.glob("csrc/cpu/*.cpp")),
    define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
    py_limited_api=True,
)


class Build(BuildExtension):
    """Builds nothing, with one warning, where there is no GCC or Clang."""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            self.warn(
                f"no C++ compiler ({compiler!r} not found; set CXX to name one): resnet_fused is "
                "installed without its compiled CPU kernels, and runs as plain PyTorch on the CPU"
            )
            self.extensions = []
        super().run()


setup(
    ext_modules=[cpu],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
