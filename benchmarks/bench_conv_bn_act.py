"""Every distinct convolution of some networks, layer by layer: ours against oneDNN's fused one.

    python benchmarks/bench_conv_bn_act.py --json layers.json --plot roofline.png

For each: GFLOP/s counted as a direct convolution's; the fraction of the peak, which is the fastest
1x1 convolution of the run, ours or oneDNN's (Winograd exceeds it, as it multiplies less); the time
beside oneDNN's fused primitive; and the error beside oneDNN's, against float64. In turns, with
weights that are cold in the cache (resnet_fused/benchmark/algorithms.py).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused import benchmark, cli, conv_choice, packing, parity, policy
from resnet_fused.benchmark import algorithms as tuning
from resnet_fused.benchmark import measure
from resnet_fused.graph.observe import conv_inputs

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    """One convolution's figures."""

    model: str
    layer: str
    problem: str
    algorithm: str
    milliseconds: float
    onednn_milliseconds: float
    gflops: float
    flops_per_byte: float
    relative_error: float
    onednn_relative_error: float

    @property
    def speedup(self) -> float:
        """Over oneDNN's fused primitive."""
        return self.onednn_milliseconds / self.milliseconds


def layers(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON and picture."""
    rows: list[Layer] = []
    bandwidth = memory_gbps()
    with benchmark.ProgressBar() as progress:
        for model in args.models.split(","):
            rows += model_layers(args, model, {r.problem for r in rows}, progress)
    peak = peak_gflops(rows)
    slowest = min(rows, key=lambda r: r.speedup)
    table = [
        [
            f"{r.model} {r.layer}",
            r.algorithm,
            f"{r.milliseconds:.3f}",
            f"{r.onednn_milliseconds:.3f}",
            f"{r.speedup:.2f}x",
            f"{r.gflops:.0f}",
            f"{r.gflops / peak:.0%}",
            f"{r.relative_error:.1e}",
            f"{r.onednn_relative_error:.1e}",
        ]
        for r in rows
    ]
    header = (
        "layer", "algorithm", "ms", "oneDNN ms", "speed-up", "GFLOP/s", "of peak",
        "error", "oneDNN's",
    )  # fmt: skip
    title = (
        f"batch {args.batch_size}, {args.dtype}, {args.threads} threads; peak {peak:.0f} GFLOP/s"
    )
    benchmark.print_table(title, header, table, sys.stdout)
    print(f"slowest beside oneDNN: {slowest.model} {slowest.layer}, {slowest.speedup:.2f}x")
    if args.json:
        data = {
            "environment": benchmark.environment(),
            "command": "bench_conv_bn_act.py " + " ".join(args.argv),
            "peak_gflops": peak,
            "memory_gb_per_s": bandwidth,
            "layers": [{**asdict(r), "fraction_of_peak": r.gflops / peak} for r in rows],
        }
        benchmark.write_atomically(Path(args.json), benchmark.json_text(data).encode())
    if args.plot:
        write_roofline(rows, peak, bandwidth, title, Path(args.plot))
    return 0


def model_layers(
    args: argparse.Namespace,
    name: str,
    known: set[str],
    progress: benchmark.ProgressBar,
) -> list[Layer]:
    """The distinct convolutions of one network that were not seen before."""
    case = cli.case_of(args, model=name)
    model = benchmark.load_model(name).eval()
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size)
    images = images.to(memory_format=torch.channels_last)
    seen = conv_inputs(model.to(memory_format=torch.channels_last), [images])
    modules = dict(model.to(case.torch_dtype).named_modules())
    rows = []
    for done, (layer, observed) in enumerate(seen.items()):
        conv = modules[layer]
        assert isinstance(conv, torch.nn.Conv2d)
        folded = packing.fold_of(conv, None, case.torch_dtype)
        problem = None if folded is None else folded.problem(observed.shape)
        if problem is None or problem.key(case.threads) in known:
            continue
        known.add(problem.key(case.threads))
        progress(done, len(seen), f"timing {name} {layer}")
        chosen = packing.choose(problem, policy.current())
        names = tuple(dict.fromkeys((chosen, "onednn")))
        times = tuning.times(problem, conv, case.torch_dtype, names, args.repeats)
        errors = layer_errors(problem, conv, case.torch_dtype, names)
        flops, moved = work(problem)
        gflops = flops / times[chosen] / 1e6
        rows.append(
            Layer(
                name, layer, problem.key(case.threads), chosen, times[chosen], times["onednn"],
                gflops, flops / moved,
                errors[chosen], errors["onednn"],
            )
        )  # fmt: skip
    return rows


def work(problem: conv_choice.ConvProblem) -> tuple[int, int]:
    """Operations of the direct convolution, and bytes of input, weights and output."""
    height, width = problem.out_size
    taps = problem.kernel[0] * problem.kernel[1] * problem.channels // problem.groups
    outputs = problem.batch * height * width * problem.out_channels
    inputs = problem.batch * problem.channels * problem.size[0] * problem.size[1]
    numbers = inputs + outputs + problem.out_channels * taps
    return 2 * outputs * taps, numbers * (2 if problem.bf16 else 4)


def layer_errors(
    problem: conv_choice.ConvProblem,
    conv: torch.nn.Conv2d,
    dtype: torch.dtype,
    algorithms: tuple[str, ...],
) -> dict[str, float]:
    """Relative error against float64 on the first image, whose size the algorithm depends on."""
    x = tuning.example(problem, dtype)
    folded = packing.fold_of(conv, None, dtype)
    assert folded is not None
    with torch.no_grad():
        exact = torch.relu(
            torch.conv2d(
                x[:1].double(), conv.weight.double(), None, problem.stride, problem.padding,
                problem.dilation, problem.groups,
            )
        )  # fmt: skip
        found: dict[str, Tensor] = {
            a: packing.run(folded.prepare(problem, a), x, None, "relu", 0.0)[:1] for a in algorithms
        }
    return {a: parity.relative_error(y, exact) for a, y in found.items()}


def peak_gflops(rows: Sequence[Layer]) -> float:
    """The most that a 1x1 convolution reached, by whichever kernel."""
    plain = [r for r in rows if r.problem.split()[2] == "1x1"] or rows
    return max(r.gflops * max(1.0, 1 / r.speedup) for r in plain)


def memory_gbps() -> float:
    """Bytes read from memory per second by a sum over 256 MiB."""
    data = torch.ones(64 << 20)
    times = [measure.time_once(data.sum, device=CPU) for _ in range(10)]
    return data.numel() * 4 / min(times) / 1e6


def write_roofline(
    rows: list[Layer], peak: float, bandwidth: float, title: str, path: Path
) -> None:
    """GFLOP/s over arithmetic intensity, with the two roofs of a direct convolution."""
    benchmark.check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = {"direct": "#7570b3", "winograd4": "#1b9e77", "winograd2": "#66a61e"}
    for algorithm in sorted({r.algorithm for r in rows}):
        chosen = [r for r in rows if r.algorithm == algorithm]
        axes.scatter(
            [r.flops_per_byte for r in chosen], [r.gflops for r in chosen],
            label=f"resnet_fused: {algorithm}", color=colours.get(algorithm, "#d95f02"), s=28,
        )  # fmt: skip
    flops = [r.gflops * r.milliseconds for r in rows]
    axes.scatter(
        [r.flops_per_byte for r in rows],
        [f / r.onednn_milliseconds for f, r in zip(flops, rows, strict=True)],
        label="oneDNN fused", marker="x", color="#999999", s=28,
    )  # fmt: skip
    low, high = (f(r.flops_per_byte for r in rows) for f in (min, max))
    xs = [low / 1.5, peak / bandwidth, high * 1.5]
    axes.plot(xs, [min(peak, x * bandwidth) for x in xs], color="black", linewidth=1)
    axes.annotate("fastest 1x1 convolution", (high, peak), va="bottom", ha="right", fontsize=8)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte of a direct convolution",
        ylabel="GFLOP/s, counted as a direct convolution", title=title,
    )  # fmt: skip
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.set_dpi(120)
    FigureCanvasAgg(figure).print_png(buffer)
    benchmark.write_atomically(path, buffer.getvalue())


def main() -> int:
    """Parse the arguments and run; the exit status is as the command line's."""
    parser = cli.Parser(prog="bench_conv_bn_act.py", description="Convolutions layer by layer.")
    parser.set_defaults(run=layers)
    cli.add_case_arguments(parser, batch_size=16)
    parser.add_argument(
        "--models",
        default="resnet18,resnet50,resnext50_32x4d,wide_resnet50_2",
        metavar="LIST",
        help="networks with commas between (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=cli.positive, default=15, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the roofline (.png)")
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
