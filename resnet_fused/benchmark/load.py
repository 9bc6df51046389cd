"""From the MODEL argument of the command line to a module.

``resnet50`` (ours) · ``torchvision:resnet50`` · ``timm:resnet50d`` · ``path/to/file.py:factory``
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from resnet_fused.models import MODELS

from .case import BenchmarkError, one_line

# What torchvision's compiled part would define and its Python part needs to be there at import.
_TORCHVISION_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward": "(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width, "
    "int sampling_ratio, bool aligned) -> Tensor",
}
_torchvision_library: list[torch.library.Library] = []  # a library unregisters when it is freed


class LoadError(BenchmarkError):
    """MODEL cannot be loaded; the message says what was wrong and what to do."""


def load_model(name: str) -> nn.Module:
    """The module that `name` stands for, with random weights unless its factory loads some.

    The weights are the same every time, so that a figure can be had again.

    Raises:
        LoadError: for an unknown model, a package that is missing, a file or factory that is
            missing, and a factory that raises or does not return a module.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return _load(name)


def _load(name: str) -> nn.Module:
    prefix, _, rest = name.partition(":")
    if prefix == "torchvision" and rest:
        return _load_torchvision(rest)
    if prefix == "timm" and rest:
        return _load_timm(rest)
    path, separator, factory = name.rpartition(":")
    if separator and path.endswith(".py"):
        return _load_file(Path(path), factory)
    if name.endswith(".py"):
        raise LoadError(f"{name} needs the name of a function in it: {name}:FACTORY")
    if name not in MODELS:
        raise LoadError(
            f"unknown model {name!r}{_suggest(name, MODELS)}; other models are written "
            "torchvision:NAME, timm:NAME or path/to/file.py:FACTORY"
        )
    return MODELS[name]()


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part does not load (a CPU-only torch).

    Its Python part registers fakes for operators which only the compiled part defines, so the
    import fails there; the operators it asks for are declared (without a kernel) and the import
    tried again.

    Raises:
        LoadError: if it is not installed, or fails for another reason.
    """
    for _ in range(len(_TORCHVISION_SCHEMAS) + 1):
        try:
            return importlib.import_module("torchvision")
        except ModuleNotFoundError as error:
            raise _missing("torchvision", error) from error
        except (ImportError, RuntimeError) as error:
            found = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if found is None or found[1] not in _TORCHVISION_SCHEMAS:
                raise LoadError(f"torchvision cannot be imported: {one_line(error)}") from error
            _forget("torchvision")
            if not _torchvision_library:
                _torchvision_library.append(torch.library.Library("torchvision", "FRAGMENT"))
            _torchvision_library[0].define(found[1] + _TORCHVISION_SCHEMAS[found[1]])
    raise LoadError("torchvision cannot be imported: its operators could not be declared")


def _load_torchvision(name: str) -> nn.Module:
    models = import_torchvision().models
    if name not in models.list_models(module=models):
        raise LoadError(
            f"torchvision has no model {name!r}{_suggest(name, models.list_models(module=models))}"
        )
    return models.get_model(name, weights=None)


def _load_timm(name: str) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise _missing("timm", None)
    import_torchvision()
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise _missing("timm", error) from error
    if not timm.is_model(name):
        raise LoadError(f"timm has no model {name!r}{_suggest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


def _load_file(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise LoadError(f"there is no file {path}")
    if not factory:
        raise LoadError(f"{path} needs the name of a function in it: {path}:FACTORY")
    spec = importlib.util.spec_from_file_location(f"resnet_fused_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
    sys.path.insert(0, str(path.resolve().parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
        build = getattr(module, factory, None)
        if build is None:
            raise LoadError(f"{path} has no {factory!r}")
        if not callable(build):
            raise LoadError(f"{factory!r} in {path} is not a function")
        model = build()
    except LoadError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadError(f"{path}:{factory} raised {one_line(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not isinstance(model, nn.Module):
        raise LoadError(
            f"{path}:{factory} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _missing(package: str, error: ModuleNotFoundError | None) -> LoadError:
    lacking = package if error is None or error.name is None else error.name
    because = "" if lacking.startswith(package) else f" (it needs {lacking})"
    return LoadError(
        f"{package} cannot be imported{because}; install it with: pip install 'resnet_fused[bench]'"
    )


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]
