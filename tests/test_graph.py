"""Graph rewriting over the whole zoo: what is found, and that nothing but the speed changes.

Every model is held to eager PyTorch in evaluation (outputs, inputs changed in place, side effects)
and in training (outputs, all gradients, running statistics, over two steps). A `fuse` that does
nothing fails here, and so does one that fuses what it must leave alone.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from block_zoo import NETWORKS, ZOO, ZooEntry, build, example
from tolerance import (
    assert_all_parity,
    assert_parity,
    assert_same_layout,
    double_model,
    flatten,
    relative_error,
)
from torch import Tensor, nn

import resnet_fused

EVERYTHING = {**ZOO, **NETWORKS}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def in_layout(inputs: tuple[Tensor, ...], layout: str) -> tuple[Tensor, ...]:
    return tuple(x.clone(memory_format=LAYOUTS[layout]) for x in inputs)


def other_layout(inputs: tuple[Tensor, ...]) -> str:
    return "nhwc" if all(x.is_contiguous() for x in inputs) else "nchw"


def evaluate(model: nn.Module, inputs: tuple[Tensor, ...], entry: ZooEntry) -> list[Tensor]:
    """Outputs, then the inputs as the call left them, then what the model stored."""
    model.eval()
    with torch.no_grad():
        output = model(*inputs, **entry.kwargs)
    return [*flatten(output), *inputs, *flatten(entry.observe(model))]


def train(model: nn.Module, inputs: tuple[Tensor, ...], entry: ZooEntry) -> dict[str, Tensor]:
    """Two training steps without an optimizer: outputs, gradients and buffers by name."""
    model.train()
    torch.manual_seed(5)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result: dict[str, Tensor] = {}
    for step in range(2):
        output = flatten(model(*[leaf * 1.0 for leaf in leaves], **entry.kwargs))
        generator = torch.Generator().manual_seed(11)
        loss = sum(
            (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum()
            for y in output
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        result |= {f"output {i} of step {step}": y.detach() for i, y in enumerate(output)}
    result |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    result |= {
        f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None
    }
    result |= {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}
    return result


def assert_training_parity(
    fused: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...], entry: ZooEntry
) -> None:
    """Eager's own error is the larger of its errors in the two layouts: one run of a small model
    may be lucky.
    """
    reference = train(double_model(plain), tuple(x.double() for x in inputs), entry)
    other = train(copy.deepcopy(plain), in_layout(inputs, other_layout(inputs)), entry)
    actual, eager = train(fused, inputs, entry), train(plain, inputs, entry)
    assert list(actual) == list(eager)
    for name, value in other.items():
        if relative_error(value, reference[name]) > relative_error(eager[name], reference[name]):
            eager[name] = value
    sizes = {
        n: r.double().abs().max().item()
        for n, r in reference.items()
        if n.startswith("gradient") and r.numel()
    }
    largest = max(sizes.values(), default=0.0)
    for name, value in actual.items():
        # A bias in front of a batch normalisation has no gradient; what is computed is
        # rounding of what cancels.
        vanishes = sizes.get(name, largest) < 1e-9 * largest
        assert_parity(
            value, eager[name], reference[name], what=name, scale=largest if vanishes else None
        )


def fused_runs(model: nn.Module) -> dict[str, str]:
    return {
        e.modules[0]: e.pattern for e in resnet_fused.explain(model).entries if e.status == "fused"
    }


@pytest.mark.parametrize("name", EVERYTHING)
def test_finds_what_is_expected(name: str) -> None:
    entry = EVERYTHING[name]
    fused = resnet_fused.fuse(build(name).eval())
    entries = resnet_fused.explain(fused).entries
    found = fused_runs(fused)
    for first, pattern in entry.fused.items():
        assert re.fullmatch(pattern, found.get(first, "")), f"{first}: {found}, {entries}"
    inside = {module for e in entries if e.status == "fused" for module in e.modules}
    assert not inside & set(entry.never)
    reasons = {e.modules[0]: e.reason for e in entries if e.status == "skipped"}
    assert all(reasons.values()), f"a skip without a reason: {reasons}"
    for first, pattern in entry.skipped.items():
        assert first in reasons, f"{first} is not explained: {entries}"
        assert re.search(pattern, reasons[first], re.IGNORECASE), reasons[first]


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_module_is_explained_once(name: str) -> None:
    """No run is told twice, every name exists, and no conv or normalisation is forgotten."""
    model = resnet_fused.fuse(build(name).eval())
    names = {n for n, _ in model.named_modules(remove_duplicate=False)}
    entries = resnet_fused.explain(model).entries
    for entry in entries:
        assert entry.status in ("fused", "skipped"), entry
        assert set(entry.modules) <= names
    runs = [(e.modules, e.pattern) for e in entries]
    assert len(runs) == len(set(runs)), runs
    told = {m for e in entries for m in e.modules}
    assert {
        n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
    } <= told


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_evaluation_is_eagers(name: str, layout: str) -> None:
    entry, plain = EVERYTHING[name], build(name)
    fused = resnet_fused.fuse(plain)  # found in training mode, run in evaluation mode
    inputs = in_layout(example(name), layout)
    reference_inputs = tuple(x.double() for x in inputs)
    eager_inputs = copy.deepcopy(inputs)
    actual = evaluate(fused, inputs, entry)
    eager = evaluate(plain, eager_inputs, entry)
    assert_all_parity(
        actual, eager, evaluate(double_model(plain), reference_inputs, entry), what=name
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "biased_block",
        "pre_activation",
        "squeeze_excite",
        "two_streams",
        "sequential_bottleneck",
        "view_after_run",
    ],
)
def test_layout_is_eagers(name: str, layout: str) -> None:
    """What leaves the model has eager's strides, so that a `.view` after it works as before."""
    plain, inputs = build(name), in_layout(example(name), layout)
    eager = evaluate(plain, inputs, ZOO[name])
    for a, e in zip(evaluate(resnet_fused.fuse(plain), inputs, ZOO[name]), eager, strict=True):
        assert_same_layout(a, e, what=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.trainable])
def test_training_is_eagers(name: str, layout: str) -> None:
    plain = build(name).eval()
    fused = resnet_fused.fuse(plain)  # found in evaluation mode, run in training mode
    assert_training_parity(fused, plain, in_layout(example(name), layout), ZOO[name])


@pytest.mark.parametrize("name", ["resnet14", "resnet34", "resnet152_swapped"])
def test_training_of_a_network_is_eagers(name: str) -> None:
    plain = build(name)
    inputs = in_layout(tuple(torch.cat([x, -x]) for x in example(name)), "nhwc")
    assert_training_parity(resnet_fused.fuse(plain), plain, inputs, NETWORKS[name])


@pytest.mark.parametrize("name", ["in_place_on_the_input", "conv_input_changed_after"])
def test_what_eager_cannot_differentiate_stays_an_error(name: str) -> None:
    model = resnet_fused.fuse(build(name)).train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(*[x.requires_grad_() * 1.0 for x in example(name)]).sum().backward()


@pytest.mark.parametrize("name", ["biased_block", "sequential_bottleneck", "pre_activation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_evaluation_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    entry, plain = ZOO[name], build(name).to(dtype)
    inputs = example(name, dtype)
    reference = evaluate(double_model(plain), tuple(x.double() for x in inputs), entry)[0]
    eager = evaluate(plain, copy.deepcopy(inputs), entry)[0]
    assert_parity(evaluate(resnet_fused.fuse(plain), inputs, entry)[0], eager, reference, what=name)


def test_optional_arguments_are_not_frozen() -> None:
    """A block that was traced with its defaults obeys what it is called with."""
    plain = build("keyword_arguments").eval()
    fused = resnet_fused.fuse(plain)
    x, shortcut = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, shortcut), {}),
        ((x,), {"shortcut": shortcut}),
        ((x,), {"activate": False}),
        ((x, shortcut), {"activate": False}),
        ((), {"x": x}),
        ((x, None), {}),
    ]
    reference_model = double_model(plain)
    for args, kwargs in calls:
        double = tuple(a if a is None else a.double() for a in args)
        double_kwargs = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        reference = reference_model(*double, **double_kwargs)
        assert_parity(
            fused(*args, **kwargs),
            plain(*args, **kwargs),
            reference,
            what=f"{len(args)} {sorted(kwargs)}",
        )


def test_wrong_calls_are_still_type_errors() -> None:
    fused = resnet_fused.fuse(build("biased_block")).eval()
    with pytest.raises(TypeError):
        fused()
    with pytest.raises(TypeError):
        fused(torch.zeros(1, 8, 4, 4), nonsense=1)


def test_attribute_changed_after_fuse_is_seen() -> None:
    """Python state that the forward reads is read at every call, not frozen when the block was
    traced.
    """

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.relu, self.power = nn.ReLU(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn1(self.conv1(x))) * self.power

    plain, x = Scaled().eval(), torch.randn(1, 3, 6, 6)
    fused = resnet_fused.fuse(plain)
    before = fused(x)
    fused.power = plain.power = 3.0
    assert_parity(fused(x), plain(x), double_model(plain)(x.double()), what="after the change")
    assert not torch.equal(before, fused(x))


@pytest.mark.parametrize("change", ["relu", "conv", "eps", "stride", "momentum"])
def test_submodules_changed_after_fuse_are_seen(change: str) -> None:
    """Replacing or editing a child of a fused block acts as it does on a plain one."""

    def edit(model: nn.Module) -> None:
        torch.manual_seed(2)
        if change == "relu":
            model.relu = nn.Tanh()
        elif change == "conv":
            model.conv1 = nn.Conv2d(8, 8, 1)
        elif change == "eps":
            model.bn1.eps = 0.5
        elif change == "stride":
            model.conv2.stride = model.conv1.stride = (1, 1)
            model.conv1.padding, model.conv1.dilation = (2, 2), (2, 2)
        else:
            model.bn2.momentum = 0.7

    plain = build("biased_block")
    fused = resnet_fused.fuse(plain)
    inputs = example("biased_block")
    evaluate(fused, inputs, ZOO["biased_block"])
    edit(plain)
    edit(fused)
    assert_training_parity(fused, plain, inputs, ZOO["biased_block"])
    reference = evaluate(
        double_model(plain), tuple(x.double() for x in inputs), ZOO["biased_block"]
    )
    eager = evaluate(plain, inputs, ZOO["biased_block"])
    assert_parity(
        evaluate(fused, inputs, ZOO["biased_block"])[0], eager[0], reference[0], what=change
    )


def test_swapped_network_is_odd_but_whole() -> None:
    """The literal argument order: strides 3, 4, 6, 3, and one block, then two a stage."""
    model = build("resnet50_swapped")
    stages = [getattr(model, f"layer{i}") for i in range(4)]
    assert [stage[0].conv2[0].stride[0] for stage in stages] == [3, 4, 6, 3]
    assert [len(stage) for stage in stages] == [1, 2, 2, 2]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_conv_of_a_network_is_fused(name: str) -> None:
    fused = resnet_fused.fuse(build(name))
    convs = {n for n, m in fused.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(fused_runs(fused)) == convs


def test_strict_refuses_a_model_with_a_skip() -> None:
    with pytest.raises(resnet_fused.FusionError, match=r"conv1.*hook|hook.*conv1") as caught:
        resnet_fused.fuse(build("hook_on_conv"), strict=True)
    assert isinstance(caught.value, ValueError)
    assert (
        fused_runs(resnet_fused.fuse(build("biased_block"), strict=True))
        == ZOO["biased_block"].fused
    )


def test_filter_decides_each_run() -> None:
    asked: list[tuple[str, type[nn.Module]]] = []

    def only_second(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name == "conv2"

    fused = resnet_fused.fuse(build("biased_block"), filter_fn=only_second)
    assert fused_runs(fused) == {"conv2": "conv-bn-add-relu"}
    assert sorted(asked) == sorted([("conv1", nn.Conv2d), ("conv2", nn.Conv2d)])
    pre = resnet_fused.fuse(build("pre_activation"), filter_fn=lambda name, module: False)
    assert fused_runs(pre) == {}


def test_explain_before_fuse_says_what_would_happen() -> None:
    entries = resnet_fused.explain(build("sequential_block")).entries
    assert {(e.modules, e.status, e.pattern) for e in entries} == {
        (("conv1.0", "conv1.1", "conv1.2"), "fusible", "conv-bn-relu"),
        (("conv2.0", "conv2.1", "relu"), "fusible", "conv-bn-add-relu"),
    }


def test_explain_prints_every_entry() -> None:
    report = resnet_fused.explain(resnet_fused.fuse(build("mixed")))
    text = str(report)
    for entry in report.entries:
        assert entry.modules[0] in text


def test_one_fused_instance_does_not_change_its_class() -> None:
    plain, other = build("biased_block"), build("biased_block")
    fused = resnet_fused.fuse(plain)
    assert isinstance(fused, type(plain))
    assert type(other).forward is type(plain).forward
    assert fused_runs(other) == {}
