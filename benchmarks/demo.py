"""ResNet-50 on real photographs, plain PyTorch against fused: ``make demo``.

    python benchmarks/demo.py [--batch-size N] [--repeats N] [--peers LIST] [--plot FILE]

The weights are random (nothing is downloaded), so the classes mean nothing; speed and exactness
do not depend on what the weights are. The photographs are the two that scikit-learn brings,
cropped at random places.
"""

from __future__ import annotations

import argparse
import sys

import torch

from resnet_fused import benchmark, cli

_TIMING_LIMIT_S = 60.0  # a slow or busy machine gets fewer repeats, so that the demo stays short


def demo(args: argparse.Namespace) -> int:
    """Print the table and write the plot; 1 if the fused model's result is wrong."""
    case = cli.case_of(args, model="resnet50")
    print(
        f"ResNet-50 with RANDOM weights on {case.batch_size} crops of two real photographs, "
        f"{case.image_size}x{case.image_size}, on {case.device}.",
        flush=True,
    )
    torch.manual_seed(0)
    results = cli.run_bench(
        case,
        benchmark.load_model(case.model),
        benchmark.photographs(case.batch_size, case.image_size),
        variants=benchmark.parse_peers(args.peers, case),
        repeats=args.repeats,
        limit_s=_TIMING_LIMIT_S,
        json_path=args.json,
        plot_path=args.plot,
        command=("benchmarks/demo.py", *args.argv),
    )
    print(f"plot written to {args.plot}")
    return 1 if any(r.variant == "fused" and r.error for r in results) else 0


def main() -> int:
    """Parse the arguments and run the demo; the exit status is as the command line's."""
    parser = cli.Parser(prog="demo.py", description="ResNet-50 on real photographs.")
    parser.set_defaults(run=demo)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_case_arguments(parser, batch_size=16, device=device)
    parser.add_argument(
        "--repeats", type=cli.positive, default=9, metavar="N", help="timed steps of each variant"
    )
    parser.add_argument("--peers", default="channels_last,compile", help="as for bench")
    parser.add_argument("--plot", default="demo.png", metavar="FILE", help="(default: demo.png)")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
