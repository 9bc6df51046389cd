"""The command line: ``python -m resnet_fused info | explain | verify | bench | tune``.

Exit status: 0 done, 1 parity does not hold, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

import resnet_fused
from resnet_fused import benchmark, numerics, tuning_cache
from resnet_fused.benchmark import BenchmarkError, Case, Mode, Result

_IMAGE_SIZE, _VERIFY_BATCH = 224, 2
_MODEL_HELP = "resnet50, torchvision:resnet50, timm:resnet50d or path/to/file.py:factory"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of this program does."""

    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run_program(_parser(), argv)


def run_program(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, call the function that `parser` put at ``args.run``, return the exit status.

    Everything a user can cause becomes one line on stderr; a traceback is a bug of ours.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path's bytes need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = parser.parse_args(argv)
        args.argv = argv
        if args.json is not None and args.json != "-":
            benchmark.check_writable(Path(args.json))
        if getattr(args, "plot", None) is not None:
            benchmark.check_plot(Path(args.plot))
        command: Callable[[argparse.Namespace], int] = args.run
        status = command(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("resnet-fused: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BenchmarkError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    except (MemoryError, RuntimeError) as error:
        if not benchmark.out_of_memory(error):
            raise
        detail = f": {error}" if isinstance(error, MemoryError) and str(error) else ""
        return _fail(f"out of memory{detail}; try a smaller --batch-size or --image-size")


def run_bench(
    case: Case,
    model: torch.nn.Module,
    images: torch.Tensor,
    *,
    variants: Sequence[str],
    repeats: int,
    limit_s: float = math.inf,
    json_path: str | None,
    plot_path: str | None,
    command: Sequence[str],
) -> list[Result]:
    """Measure with a progress bar, print the table, write JSON and plot: all that ``bench`` does.

    With ``json_path`` "-" the JSON goes to stdout and the table to stderr. Arguments and errors
    as for :func:`resnet_fused.benchmark.run_case`.
    """
    with benchmark.ProgressBar() as progress:
        results = benchmark.run_case(
            case,
            model,
            images,
            variants=variants,
            repeats=repeats,
            limit_s=limit_s,
            progress=progress,
        )
    benchmark.print_results(results, sys.stderr if json_path == "-" else sys.stdout)
    write_json(
        json_path,
        {
            "environment": benchmark.environment(),
            "command": " ".join(command),
            "results": [result.to_dict() for result in results],
        },
    )
    if plot_path is not None:
        benchmark.write_plot(results, Path(plot_path))
    return results


def _info(args: argparse.Namespace) -> int:
    data = {**benchmark.environment(), "backends": benchmark.backends()}
    if args.json != "-":
        for key, value in data.items():
            if key == "packages":
                value = ", ".join(f"{name} {v or 'missing'}" for name, v in value.items())
            if key == "gpus":
                value = ", ".join(gpu["name"] for gpu in value) or "none"
            if key == "cpu_features":
                value = " ".join(value)
            if key != "backends":
                print(f"{key + ':':22} {'-' if value is None else value}")
        rows = [
            [name, "yes" if b["usable"] else "no", b["reason"] or "", b["cost"] or ""]
            for name, b in data["backends"].items()
        ]
        benchmark.print_table("backends", ("name", "usable", "why not", "cost"), rows, sys.stdout)
    write_json(args.json, data)
    return 0


def _explain(args: argparse.Namespace) -> int:
    case = case_of(args, model=args.model)
    model, images = _example(args.model, case)
    explanation = resnet_fused.explain(model, images)
    if args.json != "-":
        print(explanation)
    write_json(args.json, {"model": args.model, **explanation.to_dict()})
    return 0


_NUMERICS_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _verify(args: argparse.Namespace) -> int:
    _check_verify(args)
    return _verify_operators(args) if args.all else _verify_model(args)


def _check_verify(args: argparse.Namespace) -> None:
    if args.all == (args.model is not None):
        raise BenchmarkError("verify takes either a MODEL or --all")
    of_model = {"--training": args.training, "--batch-size": args.batch_size != _VERIFY_BATCH,
                "--image-size": args.image_size != _IMAGE_SIZE}  # fmt: skip
    of_all = {"--only": args.only is not None, "--markdown": args.markdown}
    wrong = [name for name, given in (of_model if args.all else of_all).items() if given]
    if wrong:
        raise BenchmarkError(f"{wrong[0]} goes with {'a MODEL' if args.all else '--all'}")


def _verify_operators(args: argparse.Namespace) -> int:
    """Every variant of every operator on a device."""
    case = case_of(args, model="all operators")
    dtypes = list(numerics.DTYPES) if args.dtype is None else [_NUMERICS_DTYPES[args.dtype]]
    variants = numerics.every(case.device, dtypes)
    if args.only is not None:
        variants = [v for v in variants if args.only in v.operator]
    if not variants:
        raise BenchmarkError(f"--only: no operator's name has {args.only!r} in it")
    with benchmark.ProgressBar() as progress, benchmark.tensor_float_32(case.dtype == "tf32"):
        rows = numerics.measure(variants, progress=progress)
    if args.json != "-":
        if args.markdown:
            print(numerics.markdown(rows))
        else:
            title = f"error against float64 beside eager PyTorch's, {case.device}"
            lines = [numerics.cells(row) for row in rows]
            benchmark.print_table(title, numerics.HEADER, lines, sys.stdout)
        print(numerics.summary(rows))
    ok = all(row.ok for row in rows)
    command = " ".join(("resnet-fused", *args.argv))
    data = {"environment": benchmark.environment(), "command": command, "ok": ok}
    write_json(args.json, {**data, "results": [row.to_dict() for row in rows]})
    return 0 if ok else 1


def _verify_model(args: argparse.Namespace) -> int:
    case = case_of(args, model=args.model, mode="training" if args.training else "inference")
    model, images = _example(args.model, case)
    verification = resnet_fused.verify(model, images, training=args.training)
    if args.json != "-":
        print(
            f"{args.model}: {'ok' if verification.ok else 'WRONG'}, relative error of fused "
            f"{verification.relative_error:.2e}, of eager {verification.eager_relative_error:.2e}, "
            f"budget {verification.budget:.2e} ({case.mode}, {case.dtype}, against float64)"
        )
    write_json(args.json, {"model": args.model, **verification.to_dict()})
    return 0 if verification.ok else 1


def _example(name: str, case: Case) -> tuple[torch.nn.Module, torch.Tensor]:
    """A case's model and images, ready to run, in channels_last."""
    images = benchmark.random_images(case.batch_size, case.image_size)
    model = benchmark.prepare_model(benchmark.load_model(name), images, case)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(case.device, case.torch_dtype, memory_format=torch.channels_last)
    return model, images


def _tune(args: argparse.Namespace) -> int:
    case = case_of(args, model=args.model)
    model, images = _example(args.model, case)
    with benchmark.ProgressBar() as progress, benchmark.tensor_float_32(case.dtype == "tf32"):
        tuned = benchmark.tune(
            model.eval(), images, repeats=args.repeats, progress=progress, training=args.training
        )
    names = sorted({name for t in tuned for name in t.milliseconds})
    if args.json != "-":
        rows = [
            [
                f"{t.layers[0]}" + (f" and {len(t.layers) - 1} more" if t.layers[1:] else ""),
                t.chosen,
                "" if t.chosen == t.expected else f"expected {t.expected}",
                *(f"{t.milliseconds[n]:.3f}" if n in t.milliseconds else "-" for n in names),
            ]
            for t in tuned
        ]
        header = ("convolution", "chosen", "", *(f"{name} ms" for name in names))
        benchmark.print_table(f"{args.model}, batch {case.batch_size}", header, rows, sys.stdout)
        print(f"kept in {tuning_cache.path()}")
    write_json(args.json, {"model": args.model, "tuned": [asdict(t) for t in tuned]})
    return 0


def _bench(args: argparse.Namespace) -> int:
    case = case_of(args, model=args.model, mode=args.mode)
    variants = benchmark.parse_peers(args.peers, case)
    results = run_bench(
        case,
        benchmark.load_model(args.model),
        benchmark.random_images(case.batch_size, case.image_size),
        variants=variants,
        repeats=args.repeats,
        json_path=args.json,
        plot_path=args.plot,
        command=("resnet-fused", *args.argv),
    )
    return 1 if any(r.variant == "fused" and r.error for r in results) else 0


def case_of(args: argparse.Namespace, *, model: str, mode: Mode = "inference") -> Case:
    """The case that the arguments of :func:`add_case_arguments` describe; sets torch's threads."""
    case = Case(
        model=model,
        mode=mode,
        device=args.device,
        dtype=args.dtype or "fp32",
        batch_size=args.batch_size,
        image_size=args.image_size,
        threads=args.threads,
    )
    torch.set_num_threads(case.threads)
    return case


def _parser() -> Parser:
    parser = Parser(
        prog="resnet-fused",
        description="Fused residual networks: what is fused, is it right, is it fast.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", metavar="FILE", help="write the result as JSON; - is stdout")
        return sub

    add("info", _info, "versions, processor, GPUs, and which backends are usable")
    explain = add("explain", _explain, "what would be fused in a model, and why the rest would not")
    explain.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    add_case_arguments(explain, batch_size=1)
    verify = add(
        "verify", _verify, "compare the fused model with float64; exit status 0 if it holds, else 1"
    )
    verify.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    verify.add_argument(
        "--all", action="store_true", help="instead of a model every variant of every operator"
    )
    verify.add_argument(
        "--only", metavar="TEXT", help="of --all, operators with this in their name"
    )
    verify.add_argument(
        "--markdown", action="store_true", help="of --all, print one line for each operator"
    )
    add_case_arguments(verify, batch_size=_VERIFY_BATCH, dtype=None)
    verify.add_argument(
        "--training", action="store_true", help="compare loss and gradients as well"
    )
    tune = add("tune", _tune, "time every algorithm for a model's convolutions, keep the fastest")
    tune.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    add_case_arguments(tune, batch_size=16)
    tune.add_argument("--training", action="store_true", help="tune for training steps (on a GPU)")
    tune.add_argument(
        "--repeats", type=positive, default=15, metavar="N", help="timed calls (default: 15)"
    )
    bench = add("bench", _bench, "measure a model against its peers")
    bench.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    add_case_arguments(bench, batch_size=16)
    bench.add_argument("--mode", choices=("inference", "training"), default="inference")
    bench.add_argument(
        "--peers",
        default="channels_last,compile",
        metavar="LIST",
        help="channels_last, compile, fused_low, on the CPU onnxruntime and openvino, on a GPU "
        "compile_max_autotune, eager_graph and fused_graph, with commas between, or all, or none; "
        "eager and fused are always measured (default: %(default)s)",
    )
    bench.add_argument(
        "--repeats", type=positive, default=20, metavar="N", help="timed steps (default: 20)"
    )
    bench.add_argument("--plot", metavar="FILE", help="draw the result (.png, .pdf or .svg)")
    return parser


def add_case_arguments(
    parser: argparse.ArgumentParser,
    *,
    batch_size: int,
    device: str = "cpu",
    dtype: str | None = "fp32",
) -> None:
    """Add --batch-size, --image-size, --dtype, --device and --threads."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        default=_IMAGE_SIZE,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default=dtype,
        help=f"tf32 on a GPU only (default: {dtype or 'fp32, with --all every one'})",
    )
    parser.add_argument(
        "--device", default=device, help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        metavar="N",
        help="threads of every variant (default: %(default)s)",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def write_json(path: str | None, data: dict[str, Any]) -> None:
    """Put `data` at `path`, on stdout for "-", nowhere for None."""
    if path is None:
        return
    text = benchmark.json_text(data)
    if path == "-":
        sys.stdout.write(text)
    else:
        benchmark.write_atomically(Path(path), text.encode())


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"resnet-fused: error: {line}", file=sys.stderr)
    return 2
