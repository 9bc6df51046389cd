"""Nothing is lost and nothing goes stale: state, identity, hooks, copies, threads, checkpoints of a
fused model.

The faults looked for are those that hurt in practice: a folded weight that outlives its parameter,
statistics updated twice, a hook that no longer fires, a half-rewritten model after an exception.
A list of such faults, and as long as that.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import block_zoo
import pytest
import torch
from block_zoo import ZOO, BiasedBlock, SequentialBlock, build, example
from tolerance import assert_parity, double_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import FusionError, explain, fuse, kept, models, unfuse
from resnet_fused.backends import native_conv
from resnet_fused.graph import rewrite

SHAPES_OF_STATE = [
    "biased_block",
    "sequential_bottleneck",
    "pre_activation",
    "cumulative",
    "no_affine",
    "vgg",
    "mixed",
    "shared_relu",
    "tied_weights",
    "parametrized",
    "hook_on_conv",
    "projection_without_norm",
]


def fused_count(model: nn.Module) -> int:
    return sum(e.status == "fused" for e in explain(model).entries)


def infer(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)


def assert_same_function(fused: nn.Module, plain: nn.Module, what: str, *inputs: Tensor) -> None:
    reference = infer(double_model(plain), *[x.double() for x in inputs])
    assert_parity(infer(fused, *inputs), infer(plain, *inputs), reference, what=what)


def network() -> nn.Module:
    """A stem and two blocks, one of them with a projection: small, with every kind of run."""
    torch.manual_seed(4)
    model = nn.Sequential(
        block_zoo.unit(3, 8, 3),
        SequentialBlock(8, 8, 1),
        SequentialBlock(8, 12, 2, block_zoo.unit(8, 12, 1, 2, act=False)),
    )
    return block_zoo.randomise(model)


def picture(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 11, 9, generator=torch.Generator().manual_seed(8))


# --- what stays the same --------------------


@pytest.mark.parametrize("name", SHAPES_OF_STATE)
def test_names_and_order_are_kept(name: str) -> None:
    plain = build(name)
    fused = fuse(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in fused.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in fused.state_dict().items())
    for (_, a), (_, b) in zip(fused.named_modules(), plain.named_modules(), strict=True):
        assert isinstance(a, type(b))


def test_copy_leaves_the_original_alone() -> None:
    plain = network()
    classes = [type(m) for m in plain.modules()]
    state = copy.deepcopy(plain.state_dict())
    attributes = [sorted(vars(m)) for m in plain.modules()]
    fused = fuse(plain)
    fused.train()(picture()).sum().backward()
    assert fused is not plain
    assert fused_count(fused) == 6
    assert [type(m) for m in plain.modules()] == classes
    assert [sorted(vars(m)) for m in plain.modules()] == attributes
    assert all(p.grad is None for p in plain.parameters())
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    shared = {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert not shared


def test_in_place_keeps_every_parameter() -> None:
    model = network()
    modules, parameters, buffers = (
        list(model.modules()),
        list(model.parameters()),
        list(model.buffers()),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = fuse(model, inplace=True)
    assert fused is model
    assert fused_count(model) == 6
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    before = [p.detach().clone() for p in parameters]
    model.train()(picture()).pow(2).sum().backward()
    optimizer.step()
    assert all(
        not torch.equal(a, b) for a, b in zip(before, parameters, strict=True) if a.dim() == 4
    )


def test_mode_and_requires_grad_are_kept() -> None:
    model = network().eval()
    model[1].train()
    model[0][0].weight.requires_grad_(False)
    fused = fuse(model)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in fused.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_twice_is_once() -> None:
    once = fuse(network())
    twice = fuse(once)
    assert [type(m).__mro__[1:] for m in twice.modules()] == [
        type(m).__mro__[1:] for m in once.modules()
    ]
    assert [str(e) for e in explain(twice).entries] == [str(e) for e in explain(once).entries]
    assert_same_function(twice, network(), "fused twice", picture())
    fuse(twice, inplace=True)
    assert [type(m) for m in unfuse(twice).modules()] == [type(m) for m in network().modules()]


def test_unfuse_restores_the_model() -> None:
    plain = network()
    fused = fuse(plain)
    back = unfuse(fused)
    assert back is not fused
    assert fused_count(fused) == 6
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in back.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert torch.equal(infer(back, picture()), infer(plain, picture()))
    assert unfuse(fused, inplace=True) is fused
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


def test_unfuse_of_a_plain_model_is_a_copy() -> None:
    plain = network()
    back = unfuse(plain)
    assert back is not plain
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]


def test_training_fused_is_training_unfused() -> None:
    """The same checkpoint after some optimizer steps, within the budget: fuse → train → unfuse
    loses nothing.
    """

    def trained(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model = model.to(dtype).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 11, 9, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(x).pow(2).mean().backward()
            optimizer.step()
        return model.state_dict()

    fused = fuse(network())
    trained(fused, torch.float32)
    actual = unfuse(fused).state_dict()
    eager, reference = trained(network(), torch.float32), trained(network(), torch.float64)
    assert list(actual) == list(eager)
    scale = max(v.abs().max().item() for k, v in reference.items() if k.endswith("weight"))
    for key, value in actual.items():
        # A bias in front of a normalisation moves by nothing but rounding.
        cancels = key.endswith("0.bias")
        assert_parity(value, eager[key], reference[key], what=key, scale=scale if cancels else None)


# --- copies --------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after_a_call"])
def test_duplicates_are_fused_and_independent(
    duplicate: Callable[[nn.Module], nn.Module], used: bool
) -> None:
    fused, x = fuse(network()).eval(), picture()
    if used:
        infer(fused, x)
    twin = duplicate(fused)
    assert fused_count(twin) == fused_count(fused) == 6
    assert all(
        isinstance(a, type(b)) for a, b in zip(twin.modules(), network().modules(), strict=True)
    )
    before = infer(fused, x)
    assert torch.equal(infer(twin, x), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(infer(fused, x), before)
    assert_same_function(twin, unfuse(twin), "the changed twin", x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_duplicates_leave_out_what_was_declined(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    fused = fuse(build("biased_block"), filter_fn=lambda name, module: name == "conv2")
    assert fused_count(fused) == fused_count(duplicate(fused)) == 1


def test_checkpoint_goes_both_ways_with_weights_only() -> None:
    fused, plain = fuse(network()), network()
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(0.01)
    infer(fused, picture())
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    plain.load_state_dict(state, strict=True)
    assert_same_function(fused, plain, "loaded into the plain model", picture())
    other = fuse(network())
    infer(other, picture())
    other.load_state_dict(plain.state_dict(), strict=True)
    assert_same_function(other, plain, "loaded into another fused model", picture())


def test_average_of_weights() -> None:
    fused, plain = fuse(network()), network()
    averages = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (fused, plain)]
    for average, model in zip(averages, (fused, plain), strict=True):
        infer(average, picture())
        for _ in range(2):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)
            average.update_parameters(model)
    assert_same_function(averages[0], averages[1], "the averaged model", picture())


# --- hooks --------------------


@pytest.mark.parametrize(
    "kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize(
    "where", ["1.conv1.0", "1.conv1.1", "1.conv1.2", "1.conv1", "1.relu", "1", "2.downsample.0"]
)
def test_a_hook_registered_after_fuse_fires(where: str, kind: str) -> None:
    """On a module whose forward a fused run took over as well: then the run goes back to eager."""
    calls: dict[str, int] = {}
    models = {"fused": fuse(network()).train(), "plain": network().train()}
    for key, model in models.items():
        model(picture())
        handle = getattr(model.get_submodule(where), kind)(
            lambda *_, key=key: calls.update({key: calls.get(key, 0) + 1})
        )
        model(picture().requires_grad_()).sum().backward()
        handle.remove()
        model(picture().requires_grad_()).sum().backward()
    assert calls.get("plain", 0) > 0
    assert calls.get("fused", 0) == calls["plain"]


def test_a_hook_that_changes_the_output_is_obeyed() -> None:
    fused, plain = fuse(network()), network()
    infer(fused, picture())
    for model in (fused, plain):
        model[1].conv1[0].register_forward_hook(lambda module, args, output: output * 2)
    assert_same_function(fused, plain, "with a hook", picture())


def test_global_hooks_fire_for_consumed_modules() -> None:
    seen: dict[str, list[str]] = {}
    for key, model in {"fused": fuse(network()).eval(), "plain": network().eval()}.items():
        names = {m: n for n, m in model.named_modules()}
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output, key=key, names=names: seen.setdefault(key, []).append(
                names[module]
            )
        )
        infer(model, picture())
        handle.remove()
    assert seen["fused"] == seen["plain"]


def test_hooks_from_before_are_kept() -> None:
    plain = network()
    plain[1].register_forward_hook(block_zoo.remember)
    plain[2].conv2[0].register_forward_hook(block_zoo.remember)
    fused = fuse(plain)
    infer(fused, picture())
    infer(plain, picture())
    assert torch.allclose(fused[1].seen, plain[1].seen, atol=1e-5)
    assert torch.allclose(fused[2].conv2[0].seen, plain[2].conv2[0].seen, atol=1e-5)


def test_state_dict_hooks_and_backward_hooks_on_parameters() -> None:
    fused = fuse(network())
    seen: list[str] = []
    fused[1].conv1[0].weight.register_hook(lambda grad: seen.append("weight"))
    fused[1].register_state_dict_post_hook(lambda *args: seen.append("state"))
    fused.train()(picture()).sum().backward()
    fused.state_dict()
    assert seen == ["weight", "state"]


# --- nothing goes stale --------------------


def load(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(21)
    state = {
        k: torch.rand(v.shape, generator=generator).to(v.dtype) + 0.5
        if v.dtype.is_floating_point
        else v
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)


def load_assign(model: nn.Module) -> None:
    model.load_state_dict(
        {k: v * 1.25 for k, v in model.state_dict().items() if v.dim()}, strict=False, assign=True
    )


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i % 5 + 1))
    optimizer.step()


def edit(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].conv1[0].weight[0, 0] += 1.0


def edit_data(model: nn.Module) -> None:
    model[1].conv1[0].weight.data = model[1].conv1[0].weight.data * 2.0


def edit_statistics(model: nn.Module) -> None:
    model[1].conv1[1].running_var.mul_(4.0)
    model[2].downsample[1].running_mean.add_(1.0)


def edit_norm(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].conv2[1].weight.neg_()
        model[1].conv1[0].bias.add_(0.5)


def replace(model: nn.Module) -> None:
    model[1].conv1[0].weight = nn.Parameter(model[1].conv1[0].weight.detach() * 3.0)


def replace_often(model: nn.Module) -> None:
    # the allocator likes to hand out the same address again, with the same version
    for factor in (2.0, 0.5, 3.0):
        value = model[1].conv1[0].weight.detach() * factor
        del model[1].conv1[0].weight
        model[1].conv1[0].weight = nn.Parameter(value)
        infer(model, picture())


def drop_bias(model: nn.Module) -> None:
    model[1].conv1[0].bias = None


def change_eps(model: nn.Module) -> None:
    model[1].conv1[1].eps = 0.3


def train_and_back(model: nn.Module) -> None:
    model.train()
    for seed in range(2):
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    model.eval()
    infer(model, picture())
    model.train()
    model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9)) * 3.0)


def norm_by_itself(model: nn.Module) -> None:
    # eager PyTorch's own kernel: it leaves running statistics at the same version
    bn = model[1].conv1[1]
    bn.train()
    bn(3.0 * torch.randn(4, bn.num_features, 8, 8, generator=torch.Generator().manual_seed(3)))
    bn.eval()


def swap_out_and_in(model: nn.Module) -> None:
    a, b = model[1].conv1[0], model[1].conv2[0]
    a.weight, b.weight = b.weight, a.weight


@pytest.mark.parametrize(
    "change",
    [
        load,
        load_assign,
        step,
        edit,
        edit_data,
        edit_statistics,
        edit_norm,
        replace,
        replace_often,
        drop_bias,
        change_eps,
        train_and_back,
        norm_by_itself,
        swap_out_and_in,
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_change_after_the_first_call_is_seen(
    change: Callable[[nn.Module], None], layout: torch.memory_format
) -> None:
    """In channels_last convolutions are folded too, else batch norms by themselves."""
    fused, plain, x = fuse(network()), network(), picture().to(memory_format=layout)
    first = infer(fused, x)
    infer(plain, x)
    change(fused)
    change(plain)
    assert not torch.equal(infer(fused, x), first)
    assert_same_function(fused, plain, change.__name__, x)


def test_nothing_is_kept_of_gathered_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers into the same tensor, at the same address and version."""
    fused, plain = fuse(network()), network()
    x = picture().to(memory_format=torch.channels_last)
    monkeypatch.setattr(kept, "_fully_sharded", lambda: True)
    infer(fused, x)
    for model in (fused, plain):
        model[1].conv1[0].weight.data.mul_(2.0)
    assert_same_function(fused, plain, "gathered", x)


def test_nothing_is_kept_of_fake_weights() -> None:
    """In a dispatch mode what is made of real weights may have no numbers."""
    norm = block_zoo.randomise(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fused = fuse(norm)
    assert fused_count(fused) == 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        infer(fused, picture())
    assert_same_function(fused, norm, "after a fake call", picture())


@pytest.mark.skipif(
    native_conv.unusable(torch.float32) is not None, reason="algorithms are oneDNN's alone"
)
@pytest.mark.parametrize("kind", ["a convolution", "a block", "a block in training"])
def test_another_policy_after_the_first_call_is_seen(kind: str) -> None:
    block = models.resnet18().layer1[0].to(memory_format=torch.channels_last)
    plain = nn.Sequential(block.conv1, block.bn1, block.relu) if "conv" in kind else block
    x = torch.randn(2, 64, 28, 28).to(memory_format=torch.channels_last)

    def run(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled("training" in kind):
            output: Tensor = model.train("training" in kind)(x)
            return output.detach()

    fused = fuse(plain)
    first = run(fused)
    with resnet_fused.precision("strict"):
        second, anew = run(fused), run(fuse(plain))
    assert torch.equal(second, anew)
    assert not torch.equal(first, second), "the policies choose different algorithms here"


def test_an_input_changed_in_place_is_looked_at_again() -> None:
    """A bound on it, which lets oneDNN activate, was kept at the first call."""
    plain, x = build("depthwise"), example("depthwise")[0]
    x = x.contiguous(memory_format=torch.channels_last)
    fused = fuse(plain)
    infer(fused, x)
    x[0, 1, 4, 3] = float("nan")
    ours, eager = infer(fused, x), infer(plain, x)
    assert eager.isnan().any() and torch.equal(ours.isnan(), eager.isnan())


def test_a_frozen_norm_alone_learns() -> None:
    """Statistics and convolutions are fixed: its weight and bias have gradients all the same."""
    models_ = [fuse(network()), network(), double_model(network())]
    for model in models_:
        model.eval().requires_grad_(False)
        norm = model[1].conv1[1].requires_grad_(True)
        x = picture().to(norm.weight.dtype, memory_format=torch.channels_last)
        model(x).square().sum().backward()
    norms = [model[1].conv1[1] for model in models_]
    assert_parity(*(norm.weight.grad for norm in norms), what="gradient of the weight")
    assert_parity(*(norm.bias.grad for norm in norms), what="gradient of the bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_conversion_after_the_first_call(dtype: torch.dtype) -> None:
    fused, plain, x = fuse(network()), network(), picture()
    infer(fused, x)
    assert_same_function(fused.to(dtype), plain.to(dtype), str(dtype), x.to(dtype))
    assert_same_function(fused.float(), plain.float(), "and back", x)


def test_layout_of_the_model_after_the_first_call() -> None:
    fused, plain, x = fuse(network()), network(), picture()
    infer(fused, x)
    for model in (fused, plain):
        model.to(memory_format=torch.channels_last)
    assert_same_function(fused, plain, "channels_last weights", x)
    assert infer(fused, x).is_contiguous(memory_format=torch.channels_last)


def test_a_run_frozen_in_parts() -> None:
    """Half of the statistics frozen by hand, as fine-tuning does: each normalisation goes by its
    own mode.
    """
    models = [fuse(network()), network(), double_model(network())]
    for model in models:
        model.train()
        model[1].conv1[1].eval()
        model[2].conv2.eval()
    out = [m(picture().to(m[0][0].weight.dtype)) for m in models]
    assert_parity(*out, what="output")
    for (name, a), b, r in zip(
        models[0].named_buffers(), models[1].buffers(), models[2].buffers(), strict=True
    ):
        assert_parity(a, b, r, what=name)


# --- an exception in the middle --------------------


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(n: int, error: type[BaseException]) -> None:
    model = network().eval()
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    before = infer(model, picture())
    calls = 0

    def breaks(name: str, module: nn.Module) -> bool:
        nonlocal calls
        calls += 1
        if calls == n:
            raise error("in the filter")
        return True

    with pytest.raises(error, match="in the filter"):
        fuse(model, inplace=True, filter_fn=breaks)
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(infer(model, picture()), before)
    assert fused_count(fuse(model, inplace=True)) == 6


@pytest.mark.parametrize("n", range(3))
def test_an_exception_while_plans_are_applied(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some instances have their new class by then."""
    model = network().eval()
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    calls = iter(range(9))

    def breaks(module: nn.Module, plan: Any) -> Any:
        if next(calls) == n:
            raise KeyboardInterrupt
        return plan

    monkeypatch.setattr(rewrite, "open_children", breaks)
    with pytest.raises(KeyboardInterrupt):
        fuse(model, inplace=True)
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes


def test_strict_failure_leaves_the_model_as_it_was() -> None:
    model = build("mixed")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(FusionError):
        fuse(model, inplace=True, strict=True)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("training", [False, True])
def test_an_exception_in_a_call_leaves_the_model_usable(training: bool) -> None:
    fused, plain = fuse(network()).train(training), network().train(training)
    for model in (fused, plain):
        with pytest.raises((RuntimeError, ValueError)):
            model(torch.zeros(1, 5, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), plain.buffers(), strict=True))
    assert_same_function(fused, plain, "after the exception", picture())


def test_fuse_wants_a_module() -> None:
    with pytest.raises(TypeError, match="model"):
        fuse(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filter_fn"):
        fuse(network(), filter_fn="conv1")  # type: ignore[arg-type]


# --- ways of calling --------------------


def test_threads_share_one_model() -> None:
    fused = fuse(network()).eval()
    pictures = [picture(i % 3 + 1) * (i + 1) for i in range(4)]
    wanted = [infer(unfuse(fused), x) for x in pictures]
    reference = [infer(double_model(unfuse(fused)), x.double()) for x in pictures]
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(8):
                assert_parity(
                    infer(fused, pictures[i]), wanted[i], reference[i], what=f"thread {i}"
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert not any(t.is_alive() for t in threads)


def _in_the_child(model: nn.Module, x: Tensor, pipe: Any) -> None:
    torch.set_num_threads(
        1
    )  # as DataLoader's workers do; with more, eager PyTorch itself hangs after a fork
    pipe.send(infer(model, x).numpy())
    model.train()(x).sum().backward()
    pipe.send(True)
    pipe.close()


def test_a_forked_child_of_a_warm_parent() -> None:
    """OpenMP's pool does not survive a fork: the child must get an answer, in time, wherever
    eager's child does.
    """
    context = multiprocessing.get_context("fork")
    fused, x = fuse(network()).eval(), picture()
    wanted = infer(fused, x)
    mine, theirs = context.Pipe()
    child = context.Process(target=_in_the_child, args=(fused, x, theirs))
    child.start()
    try:
        assert mine.poll(60), "the child hangs"
        reference = infer(double_model(unfuse(fused)), x.double())
        assert_parity(torch.from_numpy(mine.recv()), wanted, reference, what="in the child")
        assert mine.poll(60), "the child hangs in training"
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("training", [False, True])
def test_functional_call(training: bool) -> None:
    fused, plain, x = fuse(network()).train(training), network().train(training), picture()
    infer(fused, x)
    fused.train(training)
    own = copy.deepcopy(plain.state_dict())
    state = {k: v * 1.5 if v.dtype.is_floating_point else v.clone() for k, v in own.items()}
    results = []
    for model in (fused, plain, double_model(plain)):
        dtype = model[0][0].weight.dtype
        given = {
            k: v.to(dtype) if v.dtype.is_floating_point else v.clone() for k, v in state.items()
        }
        results.append((torch.func.functional_call(model, given, (x.to(dtype),)), given))
    assert_parity(*(r[0] for r in results), what="output")
    for key in state:
        assert_parity(*(r[1][key] for r in results), what=key)
    assert all(torch.equal(v, own[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("names", [["biased_block"], ["pre_activation"], ["biased_block"] * 2])
def test_gradient_checkpointing(names: list[str]) -> None:
    """The same gradients as eager's under checkpointing, and the statistics of a step without it:
    eager updates them again when it computes the activations again. (What comes last is not
    computed to its end, so one block by itself may miss its update for that reason alone.)
    """
    plain = nn.Sequential(*map(build, names)).train()
    fused = fuse(plain)
    grads: list[list[Tensor]] = []
    statistics: list[list[Tensor]] = []
    models = [fused, plain, double_model(plain)]
    for model in models:
        x = example(names[0])[0].to(next(model.parameters()).dtype).requires_grad_()
        output = checkpoint(model, x * 1.0, use_reentrant=False)
        statistics.append([b.clone() for b in model.buffers()])
        output.pow(2).sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    scale = max(g.abs().max().item() for g in grads[2])
    for (i, g), e, r in zip(enumerate(grads[0]), grads[1], grads[2], strict=True):
        assert_parity(
            g, e, r, what=f"gradient {i}", scale=scale if r.abs().max() < 1e-9 * scale else None
        )
    for (key, a), b, r in zip(fused.named_buffers(), *statistics[1:], strict=True):
        assert_parity(a, b, r, what=key)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool, layout: torch.memory_format) -> None:
    x = picture().to(memory_format=layout)
    fused, plain = fuse(network()).train(training), network().train(training)
    reference = double_model(plain)(x.double())
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, eager = fused(x), plain(x)
    assert actual.dtype == eager.dtype
    assert_parity(actual, eager, reference, what="under autocast")
    assert [b.dtype for b in fused.buffers()] == [b.dtype for b in plain.buffers()]
    if training:
        actual.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


def test_inference_mode_then_training() -> None:
    """What was packed under inference_mode must not reach autograd later."""
    fused, plain, x = fuse(network()).eval(), network().eval(), picture()
    with torch.inference_mode():
        assert fused(x).is_inference()
    reference_model = double_model(plain)
    outputs = []
    for model in (fused, plain, reference_model):
        out = model(x.to(model[0][0].weight.dtype))
        out.sum().backward()
        outputs.append(out)
    assert_parity(*outputs, what="evaluation with gradients")
    for (name, p), e, r in zip(
        fused.named_parameters(), plain.parameters(), reference_model.parameters(), strict=True
    ):
        assert_parity(p.grad, e.grad, r.grad, what=f"gradient of {name}")


def test_model_made_under_inference_mode() -> None:
    """Its parameters have no version counter: they must work all the same, and be read anew."""
    with torch.inference_mode():
        model = network().eval()
        fused, x = fuse(model), picture()
        with pytest.warns(UserWarning, match="made or copied under torch.inference_mode"):
            first = fused(x)
        fused[1].conv1[0].weight.mul_(2.0)
        model[1].conv1[0].weight.mul_(2.0)
        with pytest.warns(UserWarning, match="packs the weights of this model again"):
            second = fused(x)
        assert not torch.equal(first, second)
        reference = double_model(model)(x.double())
        assert_parity(second, model(x), reference, what="inference tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [False, True])
def test_one_odd_pixel_spreads_as_in_eager(value: float, training: bool) -> None:
    fused, plain, x = fuse(network()).train(training), network().train(training), picture()
    x[1, 2, 4, 4] = value
    with torch.no_grad():
        reference = double_model(plain)(x.double())
        eager = plain(x)
        assert not eager.isfinite().all()
        assert training or eager.isfinite().any()
        assert_parity(fused(x), eager, reference, what=str(value))


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch: int) -> None:
    fused, plain = fuse(network()), network()
    assert_same_function(fused, plain, f"batch {batch}", picture(batch))
    if batch:
        assert_parity(
            fused.train()(picture(batch)),
            plain.train()(picture(batch)),
            double_model(network()).train()(picture(batch).double()),
            what="training",
        )


def test_one_value_per_channel_is_eagers_error() -> None:
    fused = fuse(build("biased_block")).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(torch.zeros(1, 8, 1, 1))
    for (name, after), before in zip(
        fused.named_buffers(), build("biased_block").buffers(), strict=True
    ):
        assert torch.equal(after, before) or name.endswith(
            "num_batches_tracked"
        )  # eager counts before it looks


@pytest.mark.parametrize("kind", ["expanded", "sliced", "transposed", "offset"])
def test_odd_inputs(kind: str) -> None:
    base = torch.randn(4, 6, 20, 18)
    x = {
        "expanded": base[:1, :3].expand(3, 3, 20, 18),
        "sliced": base[::2, 1:6:2, ::2, 1::3],
        "transposed": base[:, :3].transpose(2, 3),
        "offset": base[1:, 3:, 3:],
    }[kind]
    assert_same_function(fuse(network()), network(), kind, x)


def test_trace_of_a_fused_model() -> None:
    fused, x = fuse(network()).eval(), picture()
    wanted = infer(fused, x)
    traced = torch.jit.trace(fused, x)
    reference = infer(double_model(network()), x.double())
    assert_parity(traced(x), wanted, reference, what="torch.jit.trace")


def test_symbolic_trace_of_a_fused_model() -> None:
    fused, x = fuse(network()).eval(), picture()
    traced = torch.fx.symbolic_trace(fused)
    reference = infer(double_model(network()), x.double())
    assert_parity(infer(traced, x), infer(network(), x), reference, what="torch.fx")


def test_deterministic_repeats() -> None:
    fused, x = fuse(network()).eval(), picture()
    first = infer(fused, x)
    assert all(torch.equal(infer(fused, x), first) for _ in range(20))


def test_apply_and_to_empty_reach_every_parameter() -> None:
    """Module-wide calls of torch.nn work: apply, requires_grad_, to_empty on meta."""
    fused = fuse(network())
    fused.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Conv2d) else None)
    plain = network()
    plain.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Conv2d) else None)
    assert_same_function(fused, plain, "apply", picture())
    moved = fused.to("meta").to_empty(device="cpu")
    moved.load_state_dict(plain.state_dict())
    assert_same_function(moved, plain, "meta and back", picture())


def test_repr_still_names_the_class() -> None:
    plain = BiasedBlock(8)
    assert "BiasedBlock" in repr(fuse(plain))
    assert "(conv1): Conv2d(8, 8" in repr(fuse(plain))


def test_a_module_added_later_is_not_touched() -> None:
    fused = fuse(nn.Sequential(*network(), nn.Identity()))
    fused.append(BiasedBlock(12))
    plain = nn.Sequential(*network(), nn.Identity(), copy.deepcopy(fused[-1]))
    assert_same_function(fused, plain, "with one more block", picture())
    assert fused_count(fuse(fused)) == 8


def test_zoo_has_no_shared_state() -> None:
    """Guard of this file: `build` gives equal, independent models."""
    a, b = build("biased_block"), build("biased_block")
    assert all(
        torch.equal(x, y) and x is not y
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )
    assert set(ZOO) >= set(SHAPES_OF_STATE)
    assert resnet_fused.__name__ == "resnet_fused"
