"""The paper's experiment: deeper plain networks get worse, deeper residual networks do not.

    python examples/degradation.py [--epochs N] [--seeds N] [--json FILE] [--plot FILE]

Trains the CIFAR networks of section 4.2, plain-20 and plain-56, ResNet-20 and ResNet-56 with
shortcuts A (zeros) and B (projections), fused, on handwritten digits, and draws their errors as
figure 6 of the paper does. He et al., https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import digits
import torch
import torch.nn.functional as F

from resnet_fused import benchmark, cli, models

NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"plain20": {}, "plain56": {}},
    "shortcut A": {"resnet20": {"shortcut": "A"}, "resnet56": {"shortcut": "A"}},
    "shortcut B": {"resnet20": {"shortcut": "B"}, "resnet56": {"shortcut": "B"}},
}
_LAST = 5  # epochs that a final error is the mean of


def train(
    name: str, options: dict[str, Any], args: argparse.Namespace, seed: int, tell: Any
) -> dict[str, Any]:
    """Train one network; its errors after each epoch."""
    training, test = digits.load(args.size)
    torch.manual_seed(seed)
    model = models.MODELS[name](fused=True, **options).train()
    model = model.to(memory_format=torch.channels_last)
    each = digits.steps_per_epoch(training, args.batch_size)
    optimizer, schedule = digits.optimizer(model, args.epochs * each)
    training_errors, test_errors = [], []
    begin = time.perf_counter()
    for epoch in range(args.epochs):
        wrong = 0
        for step in range(epoch * each, (epoch + 1) * each):
            images, labels = digits.batch(training, step, batch_size=args.batch_size, seed=seed)
            scores = model(images)
            F.cross_entropy(scores, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            wrong += int((scores.argmax(1) != labels).sum())
        training_errors.append(wrong / (each * args.batch_size))
        test_errors.append(digits.test_error(model, test))
        tell(epoch + 1)
    return {
        "network": name,
        **options,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_error": training_errors,
        "test_error": test_errors,
        "seconds": time.perf_counter() - begin,
    }


def final(run: dict[str, Any], what: str) -> float:
    """An error at the end, in percent."""
    return 100 * statistics.fmean(run[what][-_LAST:])


def summary(panels: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the figures say, one sentence for each kind of network."""
    sentences = []
    for kind, runs in panels.items():
        shallow, deep = (
            [r for r in runs if r["network"].endswith(depth)] for depth in ("20", "56")
        )
        parts = []
        for what in ("training_error", "test_error"):
            a, b = (statistics.fmean(final(r, what) for r in group) for group in (shallow, deep))
            parts.append(f"{what.replace('_', ' ')} {a:.2f} % -> {b:.2f} % ({b - a:+.2f})")
        sentences.append(f"{kind}, 20 -> 56 layers: {', '.join(parts)}")
    return sentences


def plot(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training error thin and dashed, test error bold, the mean over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (kind, runs) in zip(axes, panels.items(), strict=True):
        for name, colour in zip(
            dict.fromkeys(r["network"] for r in runs), ("C0", "C3"), strict=True
        ):
            mine = [r for r in runs if r["network"] == name]
            for what, style in (("training_error", "--"), ("test_error", "-")):
                errors = torch.tensor([r[what] for r in mine]) * 100
                axis.plot(
                    range(1, errors.shape[1] + 1), errors.mean(0), style, color=colour,
                    linewidth=1 if style == "--" else 2,
                    label=f"{name}, {what.removesuffix('_error')}",
                )  # fmt: skip
        axis.set(title=kind, xlabel="epoch", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    axes[0].set_ylabel("error, %")
    digits.save(figure, path)


def experiment(args: argparse.Namespace) -> int:
    """Train all networks, print a table and what it says, write the files."""
    panels: dict[str, list[dict[str, Any]]] = {kind: [] for kind in NETWORKS}
    count = args.seeds * sum(map(len, NETWORKS.values()))
    done = 0
    with benchmark.ProgressBar() as bar:
        for seed in range(args.seeds):
            for kind, networks in NETWORKS.items():
                for name, options in networks.items():
                    label = f"{name} ({kind}), seed {seed}"

                    def tell(epoch: int, label: str = label, before: int = done) -> None:
                        bar(before * args.epochs + epoch, count * args.epochs, label)

                    panels[kind].append(train(name, options, args, seed, tell))
                    done += 1
    rows = [
        (
            r["network"], kind, str(r["seed"]), f"{r['parameters']:,}",
            *(f"{final(r, what):.2f}" for what in ("training_error", "test_error")),
            f"{r['seconds']:.0f}",
        )
        for kind, runs in panels.items() for r in runs
    ]  # fmt: skip
    header = ("network", "kind", "seed", "parameters", "training error %", "test error %", "s")
    title = f"{args.epochs} epochs of digits, {args.size}x{args.size}, batch {args.batch_size}"
    benchmark.print_table(title, header, rows, sys.stdout)
    sentences = summary(panels)
    print(*sentences, sep="\n")
    if args.plot:
        plot(panels, Path(args.plot))
    cli.write_json(
        args.json,
        {
            "command": ["examples/degradation.py", *args.argv],
            "environment": benchmark.environment(),
            "summary": sentences,
            "runs": panels,
        },
    )
    return 0


def main() -> int:
    """Parse the arguments and run the experiment."""
    parser = digits.experiment_parser("degradation", __doc__, experiment, size=16)
    parser.add_argument("--epochs", type=cli.positive, default=60, metavar="N")
    parser.add_argument("--seeds", type=cli.positive, default=1, metavar="N")
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
