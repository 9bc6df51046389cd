"""Results for people (table, plot) and for programs (JSON)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from .case import BenchmarkError, Result

_HEADER = ("variant", "median ms", "20%", "80%", "images/s", "speed-up", "relative error")
_NEEDS_MATPLOTLIB = (
    "plots need matplotlib; install it with: pip install 'resnet_fused[cli]', or leave out --plot"
)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO
) -> None:
    """Write a table to `stream`: by rich where it is installed, else in aligned columns.

    All columns but the first and the last are aligned to the right.
    """
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        # Narrow enough for 80 columns; only the last column may wrap.
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        last = len(header) - 1
        for i, name in enumerate(header):
            justify: Literal["left", "right"] = "left" if i in (0, last) else "right"
            table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=i != last)
        for row in rows:
            bold = "bold green" if row[0] == "fused" else None
            table.add_row(*(escape(cell) for cell in row), style=bold)
        Console(file=stream).print(table)
        return
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print(title, file=stream)
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if i in (0, len(header) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=stream)


def print_results(results: Sequence[Result], stream: TextIO) -> None:
    """The table of one case, and below it why a variant has no speed."""
    first = results[0]
    training = first.mode == "training"
    title = (
        f"{first.model}, {first.mode}, {first.dtype}, batch {first.batch_size}, "
        f"{first.image_size}x{first.image_size}, {first.device}, {first.threads} threads"
    )
    header = (*_HEADER[:-1], "peak MiB", *(("saved MiB",) if training else ()), _HEADER[-1])
    rows = []
    for r in results:
        numbers = [
            *(_milliseconds(value) for value in (r.median_ms, r.p20_ms, r.p80_ms)),
            _number(r.images_per_second, ".1f"),
            _number(r.speedup_vs_eager, ".2f", "x"),
            _number(_mib(r.peak_memory_bytes), ".0f"),
        ]
        if training:
            numbers.append(_number(_mib(r.saved_bytes), ".1f"))
        outcome = _number(r.relative_error, ".1e") if r.error is None else "FAILED"
        rows.append([r.variant, *numbers, outcome])
    print_table(title, header, rows, stream)
    for r in results:
        if r.error is not None:
            print(f"{r.variant}: {r.error}", file=stream)


def json_text(data: dict[str, Any]) -> str:
    """`data` as JSON with a newline at the end; numbers that JSON has not are an error."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def check_writable(path: Path) -> None:
    """Find out before the work whether `path` can be written after it.

    Raises:
        BenchmarkError: it is a folder, or its folder is missing or may not be written.
    """
    folder = path.parent
    if path.is_dir():
        raise BenchmarkError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise BenchmarkError(f"cannot write {path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror or error}") from error


def check_plot(path: Path) -> None:
    """Find out before the work whether a plot can be made at `path`.

    Raises:
        BenchmarkError: matplotlib is missing, or `path` cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError(_NEEDS_MATPLOTLIB)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise BenchmarkError(f"cannot plot to {path}: its name must end in .png, .pdf or .svg")
    check_writable(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`, entirely or not at all.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _milliseconds(value: float | None) -> str:
    return _number(value, ".2f" if value is not None and value < 100 else ".0f")


def _mib(value: int | None) -> float | None:
    return None if value is None else value / 2**20
