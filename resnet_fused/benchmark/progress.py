"""What a person sees while a measurement runs."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A bar on stderr if that is a terminal and rich is there, else a line for each stage."""

    def __init__(self) -> None:
        self._bar: Any = nullcontext()
        self._task: Any = None
        self._last = ""
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress

                self._bar = Progress(console=Console(stderr=True), transient=True)
            except ImportError:
                pass

    def __enter__(self) -> ProgressBar:
        bar = self._bar.__enter__()
        self._task = None if bar is None else bar.add_task("starting", total=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=what)
            return
        stage = "timing" if what.startswith("timing") else what
        if stage != self._last:
            print(f"resnet-fused: {stage} ({done}/{total})", file=sys.stderr)
        self._last = stage
