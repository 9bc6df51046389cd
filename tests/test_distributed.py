"""Several processes train as one: SyncBatchNorm, DDP and FSDP2 on gloo, against float64."""

from __future__ import annotations

import copy
import gc
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32",
    reason="this torch has no gloo",
)


def model(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    builders: dict[str, Callable[[], nn.Module]] = {
        "blocks": lambda: nn.Sequential(models.resnet50(num_classes=5).layer1[0]),
        "stem": lambda: models.resnet18(num_classes=5),
        "separate": lambda: nn.Sequential(
            nn.Conv2d(64, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(), nn.BatchNorm2d(8),
            nn.ReLU(),
        ),
    }  # fmt: skip
    made = builders[name]().train().to(dtype)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batch(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (7, 3, 40, 36) if name == "stem" else (7, 64, 12, 10)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    return images.to(dtype).to(memory_format=torch.channels_last)


def share(images: Tensor, rank: int, size: int, empty: bool = False) -> Tensor:
    """Unequal shares of the batch: 7 images become 4 and 3, or 3, 2, 1 and 1; or the last none."""
    cuts = [7, 0] if empty else {2: [4, 3], 4: [3, 2, 1, 1]}[size]
    return images.split(cuts)[rank]


def objective(y: Tensor) -> Tensor:
    return y.square().sum()


def outcome(module: nn.Module) -> dict[str, Tensor]:
    plain = getattr(module, "module", module)
    found = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    return found | {n: b for n, b in plain.named_buffers()}


def worker(
    rank: int, size: int, port: int, job: Callable[..., dict[str, Tensor]], args: Any, path: str
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        result = job(rank, size, *args)
        if rank == 0:
            torch.save(result, path)
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        # DistributedDataParallel is in a reference cycle and holds the group, whose threads would
        # meet the end of the process otherwise, now and then as std::terminate.
        gc.collect()
        dist.destroy_process_group()


def run(size: int, job: Callable[..., dict[str, Tensor]], path: Path, *args: Any) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = path / "result.pt"
    context = mp.spawn(worker, (size, port, job, args, str(file)), nprocs=size, join=False)
    end = time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for one another")
    return torch.load(file, weights_only=True)


def synchronised_step(
    rank: int, size: int, name: str, dtype: torch.dtype, empty: bool = False
) -> dict[str, Tensor]:
    """Forward and backward of a share; gradients added up, as those of a sum over images are."""
    fused = resnet_fused.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model(name, dtype)))
    assert all(e.status == "fused" for e in resnet_fused.explain(fused).entries)
    x = share(batch(name, dtype), rank, size, empty).clone().requires_grad_()
    objective(fused(x)).backward()
    for parameter in fused.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    assert x.grad is not None
    return outcome(fused) | {"x": x.grad}


def whole_step(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    plain = model(name, dtype)
    x = batch(name, dtype).requires_grad_()
    objective(plain(x)).backward()
    assert x.grad is not None
    return outcome(plain) | {"x": x.grad}


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [("blocks", 2, torch.float64), ("blocks", 4, torch.float64), ("stem", 2, torch.float64),
     ("stem", 4, torch.float64), ("separate", 2, torch.float64), ("separate", 4, torch.float64),
     # In float32 a ReLU of a deep network may flip, so only what is shallow.
     ("blocks", 2, torch.float32), ("separate", 4, torch.float32)],
)  # fmt: skip
def test_synchronised_batch_norm_is_one_process(
    name: str, size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    actual = run(size, synchronised_step, tmp_path, name, dtype)
    exact = whole_step(name, torch.float64)
    exact["x"] = share(exact["x"], 0, size)
    limit = 1e-9 if dtype == torch.float64 else 2e-3
    assert_same(actual, exact, limit)


def assert_same(actual: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    for key, wanted in exact.items():
        if key.endswith("num_batches_tracked"):
            assert actual[key] == wanted
            continue
        error = float((actual[key].double() - wanted).norm() / wanted.norm())
        assert error < limit, (key, error)


@pytest.mark.parametrize("name", ["blocks", "stem", "separate"])
def test_a_process_without_images_takes_part(name: str, tmp_path: Path) -> None:
    actual = run(2, synchronised_step, tmp_path, name, torch.float64, True)
    assert_same(actual, whole_step(name, torch.float64), 1e-9)


def empty_everywhere(rank: int, size: int) -> dict[str, Tensor]:
    fused = resnet_fused.fuse(
        nn.SyncBatchNorm.convert_sync_batchnorm(model("blocks", torch.float32))
    )
    with pytest.raises(ValueError, match="input: expected images in at least one process"):
        fused(batch("blocks", torch.float32)[:0])
    return {n: b for n, b in fused.named_buffers()}


def test_no_images_in_any_process_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    found = run(2, empty_everywhere, tmp_path)
    for name, buffer in model("blocks", torch.float32).named_buffers():
        assert torch.equal(found[name], buffer), name


def ddp_step(
    rank: int, size: int, options: dict[str, Any], accumulate: bool, fused: bool
) -> dict[str, Tensor]:
    module = model("blocks", torch.float64)
    if fused:
        module = resnet_fused.fuse(module)
    parallel = nn.parallel.DistributedDataParallel(module, **options)
    images = share(batch("blocks", torch.float64), rank, size)
    for i in range(3):
        if accumulate and i < 2:
            with parallel.no_sync():
                objective(parallel(images)).backward()
        else:
            objective(parallel(images)).backward()
    return outcome(parallel)


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [({}, False), ({"static_graph": True}, False), ({"find_unused_parameters": True}, False),
     ({}, True), ({"gradient_as_bucket_view": True}, True)],
    ids=str,
)  # fmt: skip
def test_distributed_data_parallel(
    options: dict[str, Any], accumulate: bool, tmp_path: Path
) -> None:
    fused, eager = (
        run(2, ddp_step, tmp_path, options, accumulate, which) for which in (True, False)
    )
    assert list(fused) == list(eager)
    for key, wanted in eager.items():
        torch.testing.assert_close(fused[key], wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max())


def sharded_step(rank: int, size: int, fused: bool) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # FSDP2 takes contiguous parameters only.
    module = model("stem", torch.float64).to(memory_format=torch.contiguous_format)
    if fused:
        module = resnet_fused.fuse(module)
    mesh = init_device_mesh("cpu", (size,))
    for layer in (module.layer1, module.layer2, module.layer3, module.layer4):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    images = share(batch("stem", torch.float64), rank, size)
    for _ in range(2):
        optimizer.zero_grad()
        objective(module(images)).backward()
        optimizer.step()
    return {n: p.full_tensor() for n, p in module.state_dict().items() if hasattr(p, "full_tensor")}


def test_fully_sharded(tmp_path: Path) -> None:
    fused, eager = (run(2, sharded_step, tmp_path, which) for which in (True, False))
    assert len(fused) > 50 and list(fused) == list(eager)
    for key, wanted in eager.items():
        torch.testing.assert_close(fused[key], wanted, rtol=1e-8, atol=1e-8)


def test_synchronised_batch_norm_alone_is_batch_norm() -> None:
    plain = model("blocks", torch.float32)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = batch("blocks", torch.float32)
    fused = resnet_fused.fuse(sync)
    assert torch.equal(fused(x), resnet_fused.fuse(plain)(x))
    assert torch.equal(fused.eval()(x), resnet_fused.fuse(fused).eval()(x))
