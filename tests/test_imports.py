"""The shape of the package: imports run downwards only, and its public names change on purpose
only.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fused
from resnet_fused import functional, models

ROOT = Path(resnet_fused.__file__).parent

# The floors, from the top: a file imports from lower floors and from its own folder.
FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"benchmark", "numerics"},
    {"models"},  # plain definitions, and `fused=True`, which asks api for it
    {"api", "capture"},
    {"graph"},
    {"modules"},
    {"functional", "packing"},
    {"ops"},
    {"backends"},
    {"fold", "parity", "tuning_cache", "checks", "kept", "policy", "conv_choice"},
    {"process_lock"},
]
ANYWHERE = {"ops.schema"}  # only definitions: backends implement what is defined there
FILES = sorted(p for p in ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(name: str) -> int:
    head = name.split(".")[0]
    found = [i for i, floor in enumerate(FLOORS) if head in floor]
    assert found, f"{name} is on no floor: put it on one in this test and in ARCHITECTURE.md"
    return found[0]


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, also inside functions, without its name."""
    names: set[str] = set()
    own = ("resnet_fused." + module_name(path)).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    tree = ast.parse(path.read_text())
    quiet = {
        n
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        if node in quiet:
            continue
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` names a module; `from module import name`
            # names the module itself
            for alias in node.names:
                inner = ROOT.joinpath(*f"{source}.{alias.name}".split(".")[1:])
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                names.add(f"{source}.{alias.name}" if is_module else source)
    inside = {
        n.removeprefix("resnet_fused").lstrip(".")
        for n in names
        if n.split(".")[0] == "resnet_fused"
    }
    return {n or "api" for n in inside}  # what the package itself offers comes from api


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "resnet_fused")
def test_imports_run_downwards(path: Path) -> None:
    name = module_name(path)
    if not name:
        pytest.skip("the package's own __init__ re-exports from everywhere")
    for other in imported(path):
        if other in ANYWHERE or other.split(".")[0] == name.split(".")[0]:
            continue
        assert floor_of(other) > floor_of(name), (
            f"{name} imports {other}, which is above it or beside it"
        )


def test_imports_have_no_circle() -> None:
    edges = {module_name(p): imported(p) for p in FILES if module_name(p)}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in edges.get(name, ()):
                if other != name:
                    visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: module_name(p) or "top"
)
def test_init_files_only_re_export(path: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom)
    for node in ast.parse(path.read_text()).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, (ast.Assign, ast.AnnAssign)) and "__all__" in ast.unparse(node)
        version = isinstance(node, (ast.Assign, ast.AnnAssign)) and "__version__" in ast.unparse(
            node
        )
        assert isinstance(node, allowed) or text or names or version, ast.unparse(node)


def test_public_names() -> None:
    assert set(resnet_fused.__all__) - {"__version__"} == {
        "Captured",
        "Entry",
        "Explanation",
        "FusionError",
        "Verification",
        "capture",
        "explain",
        "functional",
        "fuse",
        "models",
        "precision",
        "unfuse",
        "verify",
    }
    assert all(hasattr(resnet_fused, name) for name in resnet_fused.__all__)
    public = {
        n
        for n, v in vars(functional).items()
        if callable(v) and getattr(v, "__module__", "") == functional.__name__
    }
    assert {n for n in public if not n.startswith("_")} == {
        "conv_bn_act",
        "scale_shift_act",
        "bn_act",
    }
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"} <= set(vars(models))


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "resnet_fused")
def test_no_catch_all_names(path: Path) -> None:
    assert not {"utils", "misc", "helpers", "common"} & set(module_name(path).split("."))


def test_import_needs_neither_torchvision_nor_the_command_line() -> None:
    """Importing the package is quick and brings no optional package in."""
    heavy = "torchvision timm matplotlib rich onnxruntime openvino hypothesis pytest"
    code = f"import sys, resnet_fused; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT.parent,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_typed() -> None:
    assert (ROOT / "py.typed").exists()
    assert importlib.import_module("resnet_fused.__main__")
