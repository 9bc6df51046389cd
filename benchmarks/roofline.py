"""Floors: the least time that a network's convolutions can take on a GPU, from counting.

    python benchmarks/roofline.py resnet50 --batch-size 256 --dtype bf16

Inference, for a convolution that reads i bytes, writes o, and has w bytes of weights:

* unfused: every operator is a pass of its own. Convolution i + w + o, batch norm 2 o, activation
  2 o, addition 3 o; the floor is bytes / bandwidth, as if arithmetic hid behind other passes.
* epilogue: one pass of i + w + o, and o for a residual; the floor is the larger of
  bytes / bandwidth and operations / peak, layer by layer.
* arithmetic: operations / peak.

Training, forward and backward; the floors are made in the same ways. With i = o eager makes 19
passes over an activation and full fusion 9:

* eager: 3 i + 3 o + 3 w for the convolution and its two gradients; batch norm 3 o forward, as it
  reads twice, and 5 o backward; activation 2 o and 3 o; addition 3 o and, for the sum of gradients
  where the shortcut branches off, 3 o.
* fused: i + w + o forward, as batch norm's statistics are taken while the output is written and it
  is applied while the next convolution loads; o to take backward's sums beside the gradient that
  comes in; i + w + 2 o for each of the two gradients, as batch norm's own is computed while they
  load. A block's end adds 3 o forward (addition in a pass of its own) and 2 o backward (the
  shortcut's gradient, and the output for the activation's mask).

The first convolution needs no gradient of its input. Weights are counted once a call, whatever the
batch; a strided 1x1 convolution as if it read all of its input. Linear and pooling layers are left
out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import resnet_fused
from resnet_fused import benchmark, cli
from resnet_fused.benchmark import measure
from resnet_fused.benchmark.case import DTYPES
from resnet_fused.conv_choice import ConvProblem
from resnet_fused.graph.observe import conv_inputs
from resnet_fused.ops.schema import ACTIVATIONS

# Measured on an H200; TF32 is half of bfloat16 by the tensor cores' design, not measured.
PEAKS = {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12}
BANDWIDTH = 4.3e12

_COPY_BYTES = 2 << 30  # forty times the L2 of an H200
_MATMUL_SIZE = 8192  # 1.1e12 operations: a millisecond or more


@dataclass(frozen=True)
class Ceilings:
    """What a GPU does at most: operations and bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Layer:
    """One convolution with the batch norm, addition and activation behind it."""

    name: str
    problem: ConvProblem
    itemsize: int
    batch_norm: bool
    act: str
    residual: bool
    reads_image: bool

    @property
    def stage(self) -> str:
        """The network's part that it is in: "layer1" of "layer1.0.conv1"."""
        return self.name.partition(".")[0]

    @property
    def taps(self) -> int:
        """Products of one output."""
        p = self.problem
        return p.kernel[0] * p.kernel[1] * p.channels // p.groups

    @property
    def output_numbers(self) -> int:
        p = self.problem
        return p.batch * p.out_channels * p.out_size[0] * p.out_size[1]

    @property
    def flops(self) -> int:
        """Of the convolution: a product and an addition are two."""
        return 2 * self.output_numbers * self.taps

    @property
    def input_bytes(self) -> int:
        p = self.problem
        return self.itemsize * p.batch * p.channels * p.size[0] * p.size[1]

    @property
    def weight_bytes(self) -> int:
        return self.itemsize * self.problem.out_channels * self.taps

    @property
    def output_bytes(self) -> int:
        return self.itemsize * self.output_numbers

    @property
    def epilogue_bytes(self) -> int:
        """Of one pass: input, weights, output and the residual."""
        outputs = 2 if self.residual else 1
        return self.input_bytes + self.weight_bytes + outputs * self.output_bytes

    @property
    def unfused_bytes(self) -> int:
        """Of a pass for every operator."""
        outputs = 1 + 2 * self.batch_norm + 2 * (self.act != "none") + 3 * self.residual
        return self.input_bytes + self.weight_bytes + outputs * self.output_bytes

    @property
    def training_flops(self) -> int:
        """Of the convolution and its two gradients."""
        return (2 if self.reads_image else 3) * self.flops

    @property
    def eager_training_bytes(self) -> int:
        """Of a step with a pass for every operator."""
        outputs = 3 + 8 * self.batch_norm + 5 * (self.act != "none") + 6 * self.residual
        everything = 3 * (self.input_bytes + self.weight_bytes) + outputs * self.output_bytes
        return everything - self._input_gradient_bytes(1)

    @property
    def fused_training_bytes(self) -> int:
        """Of a step with everything fused."""
        outputs = 3 + 3 * self.batch_norm + 5 * self.residual
        everything = 3 * (self.input_bytes + self.weight_bytes) + outputs * self.output_bytes
        return everything - self._input_gradient_bytes(2 if self.batch_norm else 1)

    def _input_gradient_bytes(self, outputs: int) -> int:
        """What the first convolution of a network saves."""
        each = self.input_bytes + self.weight_bytes + outputs * self.output_bytes
        return each if self.reads_image else 0

    def floor_s(self, ceilings: Ceilings) -> float:
        """Seconds of one pass with everything in the convolution's epilogue."""
        return max(self.epilogue_bytes / ceilings.bandwidth, self.flops / ceilings.flops)

    def training_floor_s(self, ceilings: Ceilings) -> float:
        """Seconds of a fully fused training step."""
        moved = self.fused_training_bytes / ceilings.bandwidth
        return max(moved, self.training_flops / ceilings.flops)


@dataclass(frozen=True)
class Floors:
    """Sums over layers, in seconds."""

    unfused: float
    epilogue: float
    arithmetic: float
    training_eager: float
    training_fused: float

    @classmethod
    def of(cls, layers: Sequence[Layer], ceilings: Ceilings) -> Floors:
        return cls(
            sum(layer.unfused_bytes for layer in layers) / ceilings.bandwidth,
            sum(layer.floor_s(ceilings) for layer in layers),
            sum(layer.flops for layer in layers) / ceilings.flops,
            sum(layer.eager_training_bytes for layer in layers) / ceilings.bandwidth,
            sum(layer.training_floor_s(ceilings) for layer in layers),
        )


def network_layers(
    model: str, *, batch_size: int, image_size: int = 224, dtype: str = "bf16"
) -> list[Layer]:
    """The convolutions of a network, in the order in which they run; nothing is computed.

    Raises:
        BenchmarkError: there is no such model.
    """
    with torch.device("meta"):
        network = benchmark.load_model(model).eval()
        images = torch.empty(batch_size, 3, image_size, image_size)
    patterns = {
        name: entry.pattern.split("-")
        for entry in resnet_fused.explain(network).entries
        for name in entry.modules
    }
    layers: list[Layer] = []
    for name, seen in conv_inputs(network, [images]).items():
        conv = network.get_submodule(name)
        assert isinstance(conv, torch.nn.Conv2d) and not isinstance(conv.padding, str)
        pattern = patterns.get(name, [])
        problem = ConvProblem(
            batch=seen.shape[0],
            channels=seen.shape[1],
            size=(seen.shape[2], seen.shape[3]),
            out_channels=conv.out_channels,
            kernel=(conv.kernel_size[0], conv.kernel_size[1]),
            stride=(conv.stride[0], conv.stride[1]),
            padding=(conv.padding[0], conv.padding[1]),
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
            bf16=dtype == "bf16",
        )
        layers.append(
            Layer(
                name=name,
                problem=problem,
                itemsize=DTYPES[dtype].itemsize,
                batch_norm="bn" in pattern,
                act=next((part for part in pattern if part in ACTIVATIONS), "none"),
                residual="add" in pattern,
                reads_image=not layers,
            )
        )
    return layers


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes, measured."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [
        measure.time_once(lambda: target.copy_(source), device=device, count=5) for _ in range(5)
    ]
    return 2 * _COPY_BYTES / (min(times) / 1e3)


def matmul_rate(device: torch.device, dtype: str) -> float:
    """Operations a second of a large product of random matrices, measured.

    Random, because a GPU multiplies zeros at less power and therefore at a higher clock.
    """
    n = _MATMUL_SIZE
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    with measure.tensor_float_32(dtype == "tf32"):
        times = [
            measure.time_once(lambda: torch.mm(a, b), device=device, count=10) for _ in range(5)
        ]
    return 2 * n**3 / (min(times) / 1e3)


def measured(device: torch.device, dtype: str) -> Ceilings:
    """The ceilings of this machine's GPU."""
    return Ceilings(matmul_rate(device, dtype), copy_bandwidth(device))


def shape_text(problem: ConvProblem) -> str:
    """A convolution in a few characters: channels, size, outputs, kernel, stride, groups."""
    text = f"{problem.channels}x{problem.size[0]}x{problem.size[1]} > {problem.out_channels} "
    text += f"{problem.kernel[0]}x{problem.kernel[1]}/{problem.stride[0]}"
    return text if problem.groups == 1 else f"{text} g{problem.groups}"


def show(args: argparse.Namespace) -> int:
    """Print the floors of each layer and their sums."""
    if args.measure:
        ceilings = measured(benchmark.check_device("cuda"), args.dtype)
    else:
        peak = args.peak_tflops * 1e12 if args.peak_tflops else PEAKS[args.dtype]
        ceilings = Ceilings(peak, args.bandwidth_tbs * 1e12)
    layers = network_layers(
        args.model, batch_size=args.batch_size, image_size=args.image_size, dtype=args.dtype
    )
    rows = [_layer_row(layer, ceilings) for layer in layers]
    title = (
        f"{args.model}, {args.dtype}, batch {args.batch_size}, {args.image_size} pixels, at "
        f"{ceilings.flops / 1e12:.0f} TFLOP/s and {ceilings.bandwidth / 1e12:.2f} TB/s"
    )
    header = (
        "layer", "GFLOP", "MB", "unfused us", "epilogue us", "arithmetic us", "training eager MB",
        "training fused MB", "shape",
    )  # fmt: skip
    benchmark.print_table(title, header, rows, sys.stdout)
    print()
    _print_sums(layers, ceilings, args.batch_size)
    return 0


def _layer_row(layer: Layer, ceilings: Ceilings) -> list[str]:
    floors = Floors.of([layer], ceilings)
    bound = "memory" if floors.epilogue > floors.arithmetic else "arithmetic"
    return [
        layer.name,
        f"{layer.flops / 1e9:.1f}",
        f"{layer.epilogue_bytes / 1e6:.1f}",
        *(f"{1e6 * s:.1f}" for s in (floors.unfused, floors.epilogue, floors.arithmetic)),
        f"{layer.eager_training_bytes / 1e6:.0f}",
        f"{layer.fused_training_bytes / 1e6:.0f}",
        f"{shape_text(layer.problem)}, {bound}",
    ]


def _print_sums(layers: Sequence[Layer], ceilings: Ceilings, batch_size: int) -> None:
    """Microseconds an image, stage by stage."""
    stages: dict[str, list[Layer]] = {}
    for layer in layers:
        stages.setdefault(layer.stage, []).append(layer)
    blocks = [layer for layer in layers if layer.stage.startswith("layer")]
    groups = {**stages, "blocks": blocks, "all": list(layers)}
    rows = []
    for name, members in groups.items():
        f = Floors.of(members, ceilings)
        seconds = (f.unfused, f.epilogue, f.arithmetic, f.training_eager, f.training_fused)
        rate = f"{batch_size / f.epilogue:,.0f}" if members else "-"
        rows.append([name, *(f"{1e6 * s / batch_size:.2f}" for s in seconds), rate])
    header = (
        "stage", "unfused", "epilogue", "arithmetic", "training eager", "training fused",
        "images/s, epilogue",
    )  # fmt: skip
    benchmark.print_table("microseconds an image", header, rows, sys.stdout)


def main() -> int:
    """Parse the arguments and run; the exit status is as the command line's."""
    parser = cli.Parser(prog="roofline.py", description="The floors of a network's convolutions.")
    parser.set_defaults(run=show, json=None)
    parser.add_argument("model", metavar="MODEL", help="resnet50, torchvision:resnet50, ...")
    parser.add_argument("--batch-size", type=cli.positive, default=256, metavar="N")
    parser.add_argument("--image-size", type=cli.positive, default=224, metavar="N")
    parser.add_argument("--dtype", choices=tuple(PEAKS), default="bf16")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="(default: an H200's, 790; TF32 half of it)"
    )
    parser.add_argument(
        "--bandwidth-tbs", type=float, default=BANDWIDTH / 1e12, metavar="X",
        help="TB/s (default: an H200's, %(default)s)",
    )  # fmt: skip
    parser.add_argument("--measure", action="store_true", help="measure both on this GPU instead")
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
