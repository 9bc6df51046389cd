"""Everything that is measured on a GPU, the most valuable first: what ``make gpu`` runs.

    python benchmarks/gpu.py [--budget SECONDS] [--cases SUBSTRING] [--out DIR]
    python benchmarks/gpu.py --profile conv_bn_act

Measures the GPU's ceilings, tunes for the first cases, runs the cases (gpu_cases.py) and the tables
of single operators (gpu_layers.py), and says at the end what came out (gpu_summary.py). All of it
is in one result file, which is written after every step; another run with the same file, that of
the day and the commit, goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_layers
import gpu_profile
import gpu_summary
import roofline
import torch
from gpu_cases import Planned, Record

from resnet_fused import benchmark, cli, tuning_cache
from resnet_fused.benchmark import Result
from resnet_fused.benchmark.case import one_line
from resnet_fused.benchmark.gpu_algorithms import tune
from resnet_fused.benchmark.tuned import Tuned
from resnet_fused.ops import gpu_choice

_DEVICE = torch.device("cuda")
_MODEL, _BATCH_SIZE, _DTYPE = "resnet50", 256, "bf16"  # of the tables
_TUNE_REPEATS = 5
_TUNING_SHARES = {"inference": 0.2, "training": 0.1}  # of the budget, for a case


def gpu(args: argparse.Namespace) -> int:
    """Do what the arguments say; 1 if something of the library's own failed or is wrong."""
    begin = time.monotonic()
    planned = gpu_cases.planned_cases(args.cases)
    if args.dry_run:
        for case in planned:
            print(f"{case.name}: {', '.join(case.variants)}")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: this torch sees no GPU; nothing to run")
        return 0
    if args.profile is not None:
        layers = roofline.network_layers(_MODEL, batch_size=_BATCH_SIZE, dtype=_DTYPE)
        gpu_profile.subjects(args.profile, layers)  # a wrong name is told before the work
        ceilings = roofline.measured(_DEVICE, _DTYPE)
        gpu_profile.profile(args.profile, layers, ceilings, _DEVICE, _DTYPE)
        return 0
    names = [case.name for case in planned]
    if args.again in names:
        planned = planned[names.index(args.again) + 1 :]
    run = Run(args, begin)
    left = run.everything(planned)
    data = run.record.data
    print()
    for line in gpu_summary.summary(data, left):
        print(line)
    files = [run.record.path]
    try:
        files += gpu_summary.write_plots(data, run.record.path)
    except Exception as error:  # a picture is no reason to fail
        print(f"no plots: {one_line(error)}")
    print("written: " + ", ".join(map(str, files)))
    return 1 if gpu_summary.is_wrong(data) else 0


class Run:
    """One run: its file, and how much of its time is left."""

    def __init__(self, args: argparse.Namespace, begin: float) -> None:
        self.args = args
        self.begin = begin
        environment = benchmark.environment()
        gpu_name, date = torch.cuda.get_device_name(_DEVICE), environment["date"]
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        name = gpu_cases.file_name(gpu_name, date, environment["commit"])
        self.record = Record(folder / name)
        self.record.put("environment", environment)
        self.record.put("command", " ".join(["benchmarks/gpu.py", *args.argv]))

    @property
    def deadline(self) -> float:
        """When no further case starts."""
        return self.begin + self.args.budget

    def everything(self, planned: list[Planned]) -> int:
        """Measure, in the order of value; returns how many cases there was no time for."""
        self.part("ceilings", self.ceilings)
        self.use_choices()
        left = self.cases([p for p in planned if p.untuned])
        planned = [p for p in planned if not p.untuned]
        if not self.args.no_tune:
            first = planned[:3]
            again = bool(self.not_tuned(first))
            self.part("tuned", lambda: self.tune(first), again=again)
        left += self.cases(planned[:1])
        self.part("convolutions", lambda: self.table("conv_bn_act"))
        left += self.cases(planned[1:3])
        self.part("passes", lambda: self.table("scale_shift_act", "bn_act", "bn_act_backward"))
        return left + self.cases(planned[3:])

    def part(self, key: str, make: Callable[[], Any], *, again: bool = False) -> None:
        """Put what `make` returns into the file if it is missing, or `again`, and there is time."""
        known = self.record.data.get(key)
        retry = (again or gpu_summary.has_failed(known)) and self.args.again is None
        if (known is not None and not retry) or time.monotonic() >= self.deadline:
            return
        try:
            value = make()
        except Exception as error:  # a part that fails must not take the others with it
            value = {"error": one_line(error)}
            print(f"{key}: {value['error']}")
        self.record.put(key, value)
        self.tidy(self.args.again or "")

    def ceilings(self) -> dict[str, dict[str, float]]:
        """Of each dtype."""
        found = {dtype: roofline.measured(_DEVICE, dtype) for dtype in gpu_cases.DTYPES}
        for dtype, c in found.items():
            rates = f"{c.flops / 1e12:.0f} TFLOP/s, {c.bandwidth / 1e12:.2f} TB/s"
            print(f"{dtype}: {rates}", flush=True)
        return {dtype: asdict(c) for dtype, c in found.items()}

    def tune(self, planned: list[Planned]) -> list[dict[str, Any]]:
        """Choose the fastest algorithms for these cases; goes on where an earlier run stopped.

        Each problem is in the file as soon as it is done: a kernel that breaks the GPU's context
        takes nothing with it.
        """
        data = self.record.data
        rows = self.use_choices()

        def keep(tuned: Tuned) -> None:
            rows.append(asdict(tuned))
            self.record.put("tuned", rows)

        for entry in self.not_tuned(planned):
            if time.monotonic() >= self.deadline:
                break
            case, begin = entry.case(), time.monotonic()
            images = benchmark.random_images(case.batch_size, case.image_size)
            model: Any = benchmark.prepare_model(benchmark.load_model(case.model), images, case)
            model = model.to(case.torch_dtype, memory_format=torch.channels_last)
            images = images.to(_DEVICE, case.torch_dtype, memory_format=torch.channels_last)
            limit_s = self.args.budget * _TUNING_SHARES[case.mode]
            try:
                with benchmark.ProgressBar() as progress:
                    tune(
                        model, images, repeats=_TUNE_REPEATS, progress=progress,
                        training=case.mode == "training", limit_s=limit_s,
                        known={row["problem"] for row in rows}, keep=keep,
                        triton=not self.args.without_triton,
                    )  # fmt: skip
            except Exception as error:
                print(f"tuning {entry.name}: {one_line(error)}", flush=True)
                break
            if time.monotonic() - begin < limit_s:
                self.record.put("tuned_cases", [*data.get("tuned_cases", []), entry.name])
        self.use_choices()
        return rows

    def use_choices(self) -> list[dict[str, Any]]:
        """What the file has chosen holds from now on."""
        rows = [row for row in self.record.data.get("tuned") or [] if isinstance(row, dict)]
        if rows:
            chosen = {row["problem"]: row["chosen"] for row in rows}
            tuning_cache.update(gpu_choice.machine(0), chosen)
            gpu_choice.forget_measured()
        return rows

    def not_tuned(self, planned: list[Planned]) -> list[Planned]:
        """Of these cases those that are not tuned to the end, large batches first."""
        done = self.record.data.get("tuned_cases", [])
        left = [p for p in planned if p.name not in done]
        return sorted(left, key=lambda p: p.batch_size, reverse=True)

    def table(self, *operators: str) -> list[dict[str, Any]]:
        """Operators at ResNet-50's shapes."""
        ceilings = roofline.Ceilings(**self.record.data["ceilings"][_DTYPE])
        layers = roofline.network_layers(_MODEL, batch_size=_BATCH_SIZE, dtype=_DTYPE)
        rows = [
            row
            for operator in operators
            for row in gpu_layers.measure_operator(operator, layers, ceilings, _DEVICE, _DTYPE)
        ]
        title = f"{', '.join(operators)}: {_MODEL}'s shapes, {_DTYPE}, batch {_BATCH_SIZE}"
        gpu_layers.print_rows(rows, title)
        sys.stdout.flush()
        return [row.to_dict() for row in rows]

    def cases(self, planned: list[Planned]) -> int:
        """Measure cases; returns how many there was no time for."""
        left = gpu_cases.run_cases(
            planned,
            self.record,
            deadline=self.deadline,
            run=gpu_cases.measure_case,
            after=self.report,
        )
        return len(left)

    def report(self, case: Planned, results: list[Result], error: str | None) -> None:
        """Print what came out of a case."""
        if results:
            benchmark.print_results(results, sys.stdout)
        if error is not None:
            print(f"{case.name}: {error}")
        sys.stdout.flush()
        self.tidy(case.name)

    def tidy(self, done: str) -> None:
        """Free what the last step held; if it broke the GPU, start again behind the case `done`.

        After an illegal access every call of a process fails: only another process can go on.
        """
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"starting again, as the GPU's context is lost: {one_line(error)}", flush=True)
            left = max(self.deadline - time.monotonic(), 0.0)
            options = ["--budget", f"{left:.0f}", "--again", done]
            os.execv(sys.executable, [sys.executable, *sys.argv, *options])


def main() -> int:
    """Parse the arguments and run; the exit status is as the command line's."""
    parser = cli.Parser(prog="gpu.py", description="Everything that is measured on a GPU.")
    parser.set_defaults(run=gpu, json=None)
    parser.add_argument(
        "--budget", type=float, default=240.0, metavar="SECONDS",
        help="no case starts after so long (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument(
        "--cases", default="", metavar="SUBSTRING", help="only those whose name contains it"
    )
    parser.add_argument(
        "--out", default=str(Path(__file__).parent / "results"), metavar="DIR",
        help="where the result file goes (default: benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--no-tune", action="store_true", help="keep the choices there are")
    parser.add_argument(
        "--without-triton", action="store_true",
        help="tune without Triton's kernels, whose compilation takes long",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the cases in their order")
    parser.add_argument(
        "--profile", metavar="NAME", help="the kernels of an operator or of a layer of ResNet-50"
    )
    parser.add_argument("--again", metavar="CASE", help=argparse.SUPPRESS)  # Run.tidy
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
