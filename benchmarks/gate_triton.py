"""Compiles every Triton kernel for every chip, without a GPU, and reads what came out.

    python benchmarks/gate_triton.py --csv benchmarks/results/triton_gate.csv

The library's own launchers run on meta tensors, and what they would launch is compiled for compute
capability 8.0, 9.0, 10.0 and 12.0: each operator x dtype, and convolutions x every tile size that
can be selected. Of each kernel's PTX and metadata is demanded:

* relu by comparison, or a maximum that keeps NaN: never ``max.f32``;
* 64-bit offsets: no pointer is made from a 32-bit product that was widened afterwards;
* matrix instructions in convolutions: wgmma on 9.0, tcgen05 on 10.0, mma.sync elsewhere;
* no spills, no more shared memory than the chip has.

Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused import benchmark
from resnet_fused.backends.triton import bn_act, conv_bn_act, scale_shift_act
from resnet_fused.backends.triton.configs import SHARED_BYTES, Config, candidates
from resnet_fused.conv_choice import ConvProblem
from resnet_fused.ops.schema import ACTIVATIONS

ARCHS = (80, 90, 100, 120)
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
TINY = ((1, 1, 1, 1), (3, 1, 1, 1), (1, 64, 1, 1), (1, 1, 5, 5), (2, 3, 1, 7))
"""Sizes of 1 are constants to Triton, and take other ways through its compiler."""
LONG = (1 << 16, 3, 256, 256)
"""More pixels than 32 bits count."""

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What one launch is compiled from."""

    kernel: str  # a module of backends/triton and a name in it
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[object]]]
    options: dict[str, int]


@dataclass(frozen=True)
class Build:
    """One launch to be compiled for one chip."""

    case: str
    launch: Launch
    arch: int
    matrix: bool


@dataclass
class Row:
    """What came out of one build; `wrong` is empty if it passed."""

    case: str
    kernel: str
    arch: int
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    matrix_instruction: str = ""
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    """Compile everything; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="gate_triton.py", description="Gates without a GPU.")
    parser.add_argument("--csv", metavar="FILE", help="write the table, one row a kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args()
    if args.csv is not None:
        benchmark.check_writable(Path(args.csv))
    todo = list(builds())
    # Triton's own cache holds what was compiled before, from the same source.
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        rows = pool.map(compile_and_read, todo, chunksize=4)
    for row in rows:
        for wrong in row.wrong:
            print(f"{row.case}, sm_{row.arch}, {row.kernel}: {wrong}")
    failed = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} kernels compiled, {failed} wrong")
    if args.csv is not None:
        benchmark.write_atomically(Path(args.csv), table(rows).encode())
    return 1 if failed else 0


def table(rows: Sequence[Row]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    names = [f.name for f in fields(Row)]
    writer = csv.DictWriter(text, [*names, "triton"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        wrong = "; ".join(row.wrong)
        writer.writerow({**asdict(row), "wrong": wrong, "triton": triton.__version__})
    return text.getvalue()


def builds() -> Iterator[Build]:
    """Every kernel that can be selected, for every chip that selects it."""
    seen: list[tuple[int, Launch]] = []
    for case, arch, run, matrix in itertools.chain(norm_cases(), conv_cases()):
        for launch in recorded(run):
            if (arch, launch) not in seen:
                seen.append((arch, launch))
                yield Build(case, launch, arch, matrix and launch.kernel.endswith("conv_kernel"))


Case = tuple[str, int, Callable[[], object], bool]


def norm_cases() -> Iterator[Case]:
    """The batch-norm operators: each activation in bfloat16, relu in every dtype and layout."""
    for arch in ARCHS:
        for act in ACTIVATIONS:
            run = partial(norm_ops, torch.bfloat16, True, act)
            yield f"bn {act} bf16 nhwc", arch, run, False
        for dtype, nhwc in itertools.product(_TYPES, (True, False)):
            case = f"bn relu {_TYPES[dtype]} {'nhwc' if nhwc else 'nchw'}"
            yield case, arch, partial(norm_ops, dtype, nhwc, "relu"), False
        for shape, nhwc in itertools.product(TINY, (True, False)):
            case = f"bn relu fp16 {'nhwc' if nhwc else 'nchw'} {'x'.join(map(str, shape))}"
            yield case, arch, partial(norm_ops, torch.float16, nhwc, "relu", *shape), False

        run = partial(norm_ops, torch.float16, False, "relu", *LONG)
        yield f"bn relu fp16 nchw {'x'.join(map(str, LONG))}", arch, run, False


def norm_ops(dtype: torch.dtype, channels_last: bool, act: str, *shape: int) -> None:
    """All of them, with a residual and without, by default on a stage of ResNet."""
    x = meta(*(shape or (8, 64, 56, 56)), dtype=dtype, channels_last=channels_last)
    vectors = [meta(x.shape[1]) for _ in range(4)]
    weight, bias = vectors[2:]
    for residual in (None, x):
        scale_shift_act.scale_shift_act(x, weight, bias, residual, act, 0.1)
        bn_act.bn_act(x, residual, weight, bias, 1e-5, act, 0.1)
    bn_act.bn_act_backward(x, x, None, None, *vectors, 1e-5, act, 0.1, False)
    bn_act.bn_act_backward(x, x, None, x, *vectors, 1e-5, act, 0.1, True)


def conv_cases() -> Iterator[Case]:
    """Evaluation's convolution and training's two: each tile size, dtype and kind of kernel."""
    for arch, (dtype, precision) in itertools.product(ARCHS, precisions()):
        name = "tf32" if precision == "tf32" else _TYPES[dtype]
        matrix = precision != "ieee" or dtype != torch.float32
        for kernel, stride, groups in ((1, 1, 1), (3, 1, 1), (3, 2, 2), (7, 2, 1)):
            problem = ConvProblem(
                256, 256, (28, 28), 256, (kernel, kernel), (stride, stride),
                (kernel // 2, kernel // 2), (1, 1), groups,
            )  # fmt: skip
            tiny = replace(
                problem, batch=1, channels=groups, out_channels=groups, size=(stride, stride)
            )
            for config in candidates(tiny, dtype.itemsize, arch, precision)[:1]:
                run = partial(inference, tiny, config, dtype, precision)
                yield f"conv of one pixel {kernel}x{kernel} {name}", arch, run, False
            configs = candidates(problem, dtype.itemsize, arch, precision)
            for config in configs if stride == 1 else configs[:1]:
                case = f"{kernel}x{kernel} stride {stride} groups {groups} {name} {config.name}"
                arguments = (problem, config, dtype, precision)
                yield f"conv {case}", arch, partial(inference, *arguments), matrix
                if stride == 1 and dtype != torch.float32:
                    yield f"train {case}", arch, partial(training, *arguments), matrix


def precisions() -> Iterator[tuple[torch.dtype, str]]:
    """The data types, and float32 by TF32 as well."""
    yield from ((dtype, "ieee") for dtype in _TYPES)
    yield torch.float32, "tf32"


def inference(p: ConvProblem, config: Config, dtype: torch.dtype, precision: str) -> None:
    """y = relu(conv · scale + shift + residual)."""
    x, weight, y = tensors(p, dtype)
    scale = meta(p.out_channels)
    conv_bn_act.conv_bn_act(
        x, weight, scale, scale, y, p.stride, p.padding, p.dilation, p.groups, "relu", 0.0,
        config, precision,
    )  # fmt: skip


def training(p: ConvProblem, config: Config, dtype: torch.dtype, precision: str) -> None:
    """Forward behind a batch norm with relu, and the gradient of its input."""
    x, weight, y = tensors(p, dtype)
    vector = meta(p.channels)
    norm = conv_bn_act.Norm(vector, vector, vector, vector, 1e-5, "relu", 0.0)
    options = (p.stride, p.padding, p.dilation, p.groups)
    conv_bn_act.train_conv(x, norm, weight, None, *options, config, precision)
    conv_bn_act.train_conv_backward_input(
        y, weight, p.padding, p.dilation, x, x, norm, config, precision
    )


def tensors(p: ConvProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and output."""
    return (
        meta(p.batch, p.channels, *p.size, dtype=dtype),
        meta(p.out_channels, p.channels // p.groups, *p.kernel, dtype=dtype),
        meta(p.batch, p.out_channels, *p.out_size, dtype=dtype),
    )


def meta(
    *shape: int, dtype: torch.dtype = torch.float32, channels_last: bool | None = None
) -> Tensor:
    """A tensor without data."""
    nhwc = len(shape) == 4 if channels_last is None else channels_last
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def recorded(run: Callable[[], object]) -> list[Launch]:
    """What `run` would launch."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **meta: Any) -> None:
        launches.append(described(kernel, args, meta))

    original = JITFunction.run
    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


def described(kernel: JITFunction, args: tuple[Any, ...], meta: dict[str, Any]) -> Launch:
    """A launch as the compiler takes it, specialised as Triton's runtime does it."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in meta.items() if k in names}
    launch = Launch(
        f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", {}, {}, {},
        {k: v for k, v in meta.items() if k not in names},
    )  # fmt: skip
    for i, name in enumerate(names):
        value, constant = values[name], kernel.params[i].is_constexpr
        if isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            launch.attributes[(i,)] = [["tt.divisibility", 16]]
        elif constant or value is None or value is True or value == 1:
            kind = "constexpr"
            launch.constants[(i,)] = value
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                launch.attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = "fp32"
        launch.signature[name] = kind
    return launch


def compile_and_read(build: Build) -> Row:
    """Compile one launch and judge it."""
    launch = build.launch
    row = Row(build.case, launch.kernel, build.arch)
    try:
        compiled = compile_for(launch, build.arch)
    except Exception as error:  # whatever the compiler throws is the finding
        row.wrong.append(f"does not compile: {type(error).__name__}: {str(error)[:300]}")
        return row
    ptx = compiled.asm["ptx"]
    row.shared_bytes = compiled.metadata.shared
    row.registers, row.spilled_bytes = resources(compiled.asm["cubin"])
    if row.shared_bytes > SHARED_BYTES[build.arch]:
        row.wrong.append(f"{row.shared_bytes} bytes of shared memory")
    if row.spilled_bytes:
        row.wrong.append(f"{row.spilled_bytes} bytes spilled")
    if re.search(r"\b(max|min)(\.ftz)?\.f(16|32)\b", ptx):
        row.wrong.append("a maximum that drops NaN")
    found = [name for name in MATRIX.values() if name in ptx]
    row.matrix_instruction = found[0] if found else ""
    if build.matrix and MATRIX[build.arch] not in ptx:
        row.wrong.append(f"no {MATRIX[build.arch]}")
    row.wrong += narrow_offsets(compiled.asm["ttir"])
    return row


def compile_for(launch: Launch, arch: int) -> Any:
    """The compiled kernel."""
    module, _, name = launch.kernel.partition(".")
    modules = __import__("resnet_fused.backends.triton", fromlist=[module])
    kernel = getattr(getattr(modules, module), name)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory if the kernel stores any (STL), else 0."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            command = [tool, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("--dump-resource-usage")
        registers, local, stack = (
            int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "LOCAL", "STACK")
        )
        spills = local + stack > 0 and re.search(r"\bSTL\b", dump("--dump-sass")) is not None
    return registers, (local + stack) * spills


def narrow_offsets(ttir: str) -> list[str]:
    """Loads and stores of tiles whose pointers no 64-bit offset, or a product of 32, went into."""
    defined: dict[str, str] = {}
    for line in ttir.splitlines():
        name, found, text = line.strip().partition(" = ")
        if found:
            defined[name.split(":")[0]] = text
    wrong = []
    for line in ttir.splitlines():
        access = re.search(r"tt\.(?:load|store) (%\w+).*tensor<\d+x\d+x!tt\.ptr", line)
        if access is None or "tensor<1x1x" in line:  # nothing to be added to the pointer
            continue
        wide = False
        pending, seen = [access[1]], set()
        while pending:
            text = defined.get(pending.pop(), "")
            wide |= bool(re.match(r"tt\.addptr.*i64>?(?: loc.*)?$", text))
            if re.match(r"tt\.(addptr|broadcast|splat|expand_dims|reshape)", text):
                operands = re.findall(r"%\w+", text.partition(" : ")[0])
                pending += [o for o in operands if o not in seen]
                seen |= set(operands)
        if not wide:
            wrong.append(f"32-bit offsets: {line.strip()[:80]}")
    for name, text in defined.items():
        operand = re.match(r"arith\.extsi (%\w+) : tensor", text)
        if operand and defined.get(operand[1], "").startswith("arith.muli"):
            wrong.append(f"a product of 32 bits is widened: {name}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
