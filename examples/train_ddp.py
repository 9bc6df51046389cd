"""Train on several processes, any of which may be killed.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_ddp.py --checkpoint run.pt

Each process takes its share of every batch. Every few steps rank 0 replaces the checkpoint,
atomically. torchrun starts all processes again when one dies; they go on from the checkpoint and
end, on a CPU, with the weights that the run would have had undisturbed, bit for bit. The same
command takes up a run that was stopped altogether.

``--sync-batch-norm`` normalises over the whole batch, fused: the result is then one process's.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

import digits
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resnet_fused
from resnet_fused import benchmark, cli, models


class Training:
    """Model, optimizer, schedule and the number of steps that were done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.recipe = {
            name: getattr(args, name)
            for name in ("model", "sync_batch_norm", "steps", "size", "batch_size", "seed")
        }
        torch.manual_seed(args.seed)
        model = models.MODELS[args.model](num_classes=10).train()
        if args.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(args.device, memory_format=torch.channels_last)
        self.model = resnet_fused.fuse(model, inplace=True)
        self.optimizer, self.schedule = digits.optimizer(self.model, args.steps)
        self.done = 0

    def save(self, path: Path) -> None:
        """Replace the checkpoint: whoever reads it finds the old one or the new one, whole."""
        data = io.BytesIO()
        torch.save(
            {
                "recipe": self.recipe,
                "done": self.done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            data,
        )
        benchmark.write_atomically(path, data.getvalue())

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was written.

        Raises:
            BenchmarkError: it was written by a run with other arguments.
        """
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != self.recipe:
            raise benchmark.BenchmarkError(
                f"--checkpoint {path} is another run's: {state['recipe']}; name another"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.done = state["done"]


def train(args: argparse.Namespace) -> int:
    """What each process does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if args.batch_size % size:
        raise benchmark.BenchmarkError(
            f"--batch-size must be a multiple of the {size} processes, got {args.batch_size}"
        )
    training_set, test_set = digits.load(args.size)
    training = Training(args)
    path = Path(args.checkpoint)
    if path.exists():
        training.load(path)
    if rank == 0:
        print(f"{size} processes, from step {training.done} to {args.steps}", flush=True)
    model = DistributedDataParallel(training.model)
    share = args.batch_size // size
    while training.done < args.steps:
        images, labels = digits.batch(
            training_set, training.done, batch_size=args.batch_size, seed=args.seed
        )
        mine = slice(rank * share, (rank + 1) * share)
        scores = model(images[mine].to(args.device))
        loss = F.cross_entropy(scores, labels[mine].to(args.device))
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.schedule.step()
        training.done += 1
        if training.done % args.every == 0 or training.done == args.steps:
            dist.all_reduce(loss.detach())
            if rank == 0:
                training.save(path)
                print(f"step {training.done}: loss {loss.item() / size:.4f}", flush=True)
    if rank == 0:
        test_set = digits.Digits(*(t.to(args.device) for t in test_set))
        error = digits.test_error(training.model, test_set)
        print(f"test error {100 * error:.2f} %", flush=True)
    dist.barrier()
    return 0


def run(args: argparse.Namespace) -> int:
    """Join the other processes: one GPU each if there are enough, else the CPU."""
    if "RANK" not in os.environ:
        raise benchmark.BenchmarkError("start it with torchrun: see the head of this file")
    local = int(os.environ["LOCAL_RANK"])
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if args.sync_batch_norm and not enough:
        raise benchmark.BenchmarkError(
            "--sync-batch-norm needs a GPU for each process: DistributedDataParallel takes no "
            "SyncBatchNorm on a CPU"
        )
    args.device = torch.device("cuda", local) if enough else torch.device("cpu")
    if enough:
        torch.cuda.set_device(args.device)
    # torchrun's store still holds the addresses of the processes that it has started again.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if enough else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        return train(args)
    finally:
        dist.destroy_process_group()


def main() -> int:
    """Parse the arguments and train."""
    parser = cli.Parser(prog="train_ddp.py", description=__doc__)
    parser.set_defaults(run=run, json=None)
    parser.add_argument("--checkpoint", default="train_ddp.pt", metavar="FILE")
    parser.add_argument("--model", choices=sorted(models.MODELS), default="resnet20")
    parser.add_argument("--sync-batch-norm", action="store_true")
    parser.add_argument("--steps", type=cli.positive, default=200, metavar="N")
    parser.add_argument("--every", type=cli.positive, default=10, help="steps from save to save")
    parser.add_argument("--size", type=cli.positive, default=16, help="of an image, in pixels")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="of all processes")
    parser.add_argument("--seed", type=int, default=0)
    return cli.run_program(parser)


if __name__ == "__main__":
    sys.exit(main())
