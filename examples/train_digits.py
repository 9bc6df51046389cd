"""Train the same network eager and fused: the same accuracy, in less time, with less memory.

    python examples/train_digits.py [--model NAME] [--steps N] [--seeds N] [--plot FILE]

Both start from the same weights and see the same images, one step each in turns, so that the times
compare. After a few hundred steps rounding has led them apart; whether further than two seeds are
from each other is what the last lines say.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import digits
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import benchmark, cli, models
from resnet_fused.benchmark import measure

VARIANTS = ("eager", "fused")
_WINDOW = 10  # steps that a loss is the mean of, where curves are compared


class Run:
    """One network in training: its losses and the time of each step."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer, self.schedule = digits.optimizer(model, steps)
        self.losses: list[float] = []
        self.milliseconds: list[float] = []

    def loss(self, data: digits.Digits) -> Tensor:
        """The loss of one batch."""
        return F.cross_entropy(self.model(data.images), data.labels)

    def step(self, data: digits.Digits) -> None:
        """Forward, backward and update."""

        def once() -> None:
            loss = self.loss(data)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

        self.milliseconds.append(measure.time_once(once, device=data.images.device))
        self.schedule.step()


def train(args: argparse.Namespace, seed: int, bar: benchmark.ProgressBar) -> list[dict[str, Any]]:
    """Train eager and fused from one seed."""
    training, test = digits.load(args.size)
    torch.manual_seed(seed)
    eager = models.MODELS[args.model](num_classes=10).train()
    eager = eager.to(memory_format=torch.channels_last)
    both = [eager, resnet_fused.fuse(copy.deepcopy(eager), memory=args.memory)]
    runs = [Run(model, args.steps) for model in both]
    for step in range(args.steps):
        data = digits.batch(training, step, batch_size=args.batch_size, seed=seed)
        for run in runs:
            run.step(data)
        bar(seed * args.steps + step + 1, args.seeds * args.steps, f"seed {seed}")
    return [
        {
            "variant": variant,
            "seed": seed,
            "loss": run.losses,
            "test_error": digits.test_error(run.model, test),
            "median_ms": measure.summarise(run.milliseconds).median_ms,
            "saved_bytes": measure.saved_bytes(run.model, lambda run=run: run.loss(data)),
        }
        for variant, run in zip(VARIANTS, runs, strict=True)
    ]


def smoothed(runs: list[dict[str, Any]], variant: str) -> Tensor:
    """``[seeds, steps]``: the losses of a variant, each the mean of a few steps."""
    losses = torch.tensor([r["loss"] for r in runs if r["variant"] == variant]).double()
    return losses.unfold(1, min(_WINDOW, losses.shape[1]), 1).mean(2)


def distance(runs: list[dict[str, Any]]) -> dict[str, float]:
    """How far fused is from eager, against how far eager's seeds are from one another.

    `between_seeds` is eager's standard deviation over the seeds, `fused_from_eager` the root of the
    mean square of the differences at the same seed, each the mean over the steps; `inside` is the
    share of steps at which fused's mean lies between eager's lowest and highest curve.
    """
    eager, fused = (smoothed(runs, variant) for variant in VARIANTS)
    mean = fused.mean(0)
    inside = (mean >= eager.amin(0)) & (mean <= eager.amax(0))
    return {
        "between_seeds": eager.std(0).mean().item(),
        "fused_from_eager": (fused - eager).square().mean(0).sqrt().mean().item(),
        "inside": inside.double().mean().item(),
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The loss of each variant: the mean over the seeds, and from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for variant, colour in zip(VARIANTS, ("#7f7f7f", "#1b9e77"), strict=True):
        curves = smoothed(runs, variant)
        steps = range(1, curves.shape[1] + 1)
        axis.fill_between(steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.25)
        axis.plot(steps, curves.mean(0), color=colour, label=f"{variant}, mean of {len(curves)}")
    axis.set(xlabel="step", ylabel=f"loss, mean of {_WINDOW} steps", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    digits.save(figure, path)


def experiment(args: argparse.Namespace) -> int:
    """Train all seeds, print both variants side by side, write the files."""
    if args.seeds < 2:
        raise benchmark.BenchmarkError("--seeds must be at least 2, to know how far seeds differ")
    runs: list[dict[str, Any]] = []
    with benchmark.ProgressBar() as bar:
        for seed in range(args.seeds):
            runs += train(args, seed, bar)
    rows, table = [], {}
    for variant in VARIANTS:
        mine = [r for r in runs if r["variant"] == variant]
        errors = 100 * torch.tensor([r["test_error"] for r in mine])
        median_ms = measure.summarise([r["median_ms"] for r in mine]).median_ms
        table[variant] = (median_ms, mine[0]["saved_bytes"])
        rows.append(
            (
                variant, f"{errors.mean():.2f}", f"{errors.min():.2f} to {errors.max():.2f}",
                f"{median_ms:.1f}", f"{mine[0]['saved_bytes'] / 2**20:.1f}",
            )
        )  # fmt: skip
    header = ("variant", "test error %", "over the seeds", "ms a step", "saved MiB")
    title = (
        f"{args.model} on digits, {args.size}x{args.size}, batch {args.batch_size}, "
        f"{args.steps} steps, {args.seeds} seeds"
    )
    benchmark.print_table(title, header, rows, sys.stdout)
    (eager_ms, eager_bytes), (fused_ms, fused_bytes) = table.values()
    apart = distance(runs)
    print(
        f"fused: {eager_ms / fused_ms:.2f}x as fast, {fused_bytes / eager_bytes:.2f}x the bytes\n"
        f"loss: fused differs from eager by {apart['fused_from_eager']:.4f}, seeds from each other "
        f"by {apart['between_seeds']:.4f}; fused's mean is inside eager's range at "
        f"{100 * apart['inside']:.0f} % of the steps"
    )
    if args.plot:
        plot(runs, Path(args.plot))
    cli.write_json(
        args.json,
        {
            "command": ["examples/train_digits.py", *args.argv],
            "environment": benchmark.environment(),
            "speedup": eager_ms / fused_ms,
            "saved_ratio": fused_bytes / eager_bytes,
            "loss": apart,
            "runs": runs,
        },
    )
    return 0


def main() -> int:
    """Parse the arguments and run the experiment."""
    parser = digits.experiment_parser("train_digits", __doc__, experiment, size=32)
    parser.add_argument("--model", choices=sorted(models.MODELS), default="resnet20")
    parser.add_argument("--memory", choices=("default", "low"), default="default")
    parser.add_argument("--steps", type=cli.positive, default=200, metavar="N")
    parser.add_argument("--seeds", type=cli.positive, default=5, metavar="N")
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
