"""Make a package of a fused model that runs without Python, and an input for it.

    python examples/cpp_inference/export.py --out FOLDER [--model NAME] [--batch-size N]
        [--image-size N] [--dtype float32|bfloat16|float16] [--device cpu|cuda]

writes MODEL.pt2, input.pt and expected.pt, what the fused model makes of that input in Python.

On a CPU the model is packaged as it runs: every operator that it calls for this input, beside the
weights that were folded and packed for them, becomes one call in the package. That goes where all
of these have kernels in C++. Otherwise (a convolution that is left to oneDNN, whose path depends
on the data; no compiled library), and on a GPU, torch.export's graph is packaged, in which Inductor
compiles the formula behind each convolution; it calls no operator of this library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import resnet_fused
from resnet_fused import benchmark
from resnet_fused.backends import native, reference
from resnet_fused.ops.schema import NAMESPACE, conv_output_size, fake

_ops = torch.ops.resnet_fused
_NUMBERS = 9  # that _packed_convs is given for each convolution (csrc/cpu/packed_conv.cpp)


def package(model: nn.Module, example: Tensor, path: Path) -> list[str]:
    """Package a fused model in evaluation for inputs like `example`, of its shape and layout.

    Returns:
        The schemas of the operators of this library that it calls. They stand in the package's
        metadata too, where a process without Python takes them from.

    Raises:
        ValueError: the model is in training.
    """
    if model.training:
        raise ValueError("model: expected one in evaluation (model.eval()), got one in training")
    with torch.no_grad():
        graph = as_it_runs(model, example)
        if graph is None:
            program, called = formula(model, example), []
        else:
            program, called = torch.export.export(graph, (example,)), operators_of(graph)
        schemas = sorted({str(op._schema) for op in called if op.namespace == NAMESPACE})
        numbers = (example.dim(), *example.shape, *example.stride())
        dtype = str(example.dtype).removeprefix("torch.")
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                "aot_inductor.metadata": {
                    "resnet_fused.operators": "\n".join(schemas),
                    "resnet_fused.input": " ".join(map(str, (dtype, *numbers))),
                }
            },
        )
    return schemas


def as_it_runs(model: nn.Module, example: Tensor) -> GraphModule | None:
    """What one call of the model calls, with the weights that were packed for it; None where that
    is not all in C++, or depends on the data.
    """
    if not example.is_cpu or not native.available:
        return None
    model(example)  # packs, which is no part of what is recorded
    graph = make_fx(model)(example)
    return graph if all(map(_is_compiled, operators_of(graph))) else None


def formula(model: nn.Module, example: Tensor) -> ExportedProgram:
    """torch.export's program, on a CPU with PyTorch's operators in the place of ours."""
    program = torch.export.export(model, (example,))
    if example.is_cuda:
        return program  # Inductor takes the operators apart itself (ops/gpu.py)
    formulas: dict[Any, Callable[..., Any]] = {
        _ops.conv_bn_act.default: reference.conv_bn_act,
        _ops.scale_shift_act.default: reference.scale_shift_act,
    }
    return program.run_decompositions(formulas)


def operators_of(graph: GraphModule) -> list[OpOverload]:
    """What a graph calls, in turn."""
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in targets if isinstance(target, OpOverload)]


def _is_compiled(operator: OpOverload) -> bool:
    """Whether it is PyTorch's own, or its kernel for the CPU is ours in C++.

    oneDNN's (namespace mkldnn) are neither: a bound on the data decides how they are called.
    """
    if operator.namespace != NAMESPACE:
        return operator.namespace == "aten"
    kernels = torch._C._dispatch_dump(operator._name).splitlines()
    return any(line.startswith("CPU: ") and ".cpp:" in line for line in kernels)


# What torch.export has to know of operators that are defined in C++.


def _channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


@fake("_packed_convs")
def _(input, residual, packed, weights, scales, shifts, steps, algorithms, acts, slopes, blocks):
    shape, remaining = tuple(input.shape), list(weights)
    for length in blocks:
        values = [shape, ()]
        for _ in range(length):
            source, _, *geometry = steps[:_NUMBERS]
            stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4))
            weight, steps = remaining.pop(0), steps[_NUMBERS:]
            values.append(conv_output_size(values[source], weight, stride, padding, dilation))
        shape = values[-1]
    return _channels_last(shape, input)


@fake("_average_pixels")
def _(input):
    return _channels_last((*input.shape[:2], 1, 1), input)


@fake("_scale_shift_act_")
def _(input, scale, shift, residual, act, slope):
    return None


def model_and_images(
    name: str, batch_size: int, image_size: int, dtype: torch.dtype, device: str
) -> tuple[nn.Module, Tensor]:
    """A model in evaluation and a batch for it, the same numbers every time."""
    model, images = benchmark.load_model(name), benchmark.random_images(batch_size, image_size)
    if benchmark.is_untrained(model):
        benchmark.randomise_batch_norm(model, benchmark.random_images(4, image_size))
    model = model.eval().to(device, dtype, memory_format=torch.channels_last)
    return model, images.to(device, dtype, memory_format=torch.channels_last)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--model", default="resnet18", help="as the command line takes it")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(arguments)
    try:
        benchmark.check_device(args.device)
        model, images = model_and_images(
            args.model, args.batch_size, args.image_size, getattr(torch, args.dtype), args.device
        )
    except benchmark.BenchmarkError as error:
        parser.error(str(error))
    model = resnet_fused.fuse(model)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{Path(args.model.replace(':', '_')).name}.pt2"
    schemas = package(model, images, path)
    with torch.no_grad():
        expected = model(images).cpu()
    torch.save(images.cpu(), args.out / "input.pt")
    torch.save(expected, args.out / "expected.pt")
    print(f"{path}: {len(schemas)} operators of resnet_fused")
    for schema in schemas:
        print(f"  {schema}")
    first = " ".join(f"{value:.6g}" for value in expected.flatten()[:4].tolist())
    print(f"expected.pt: {args.dtype} {list(expected.shape)}, first values {first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
