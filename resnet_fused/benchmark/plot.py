"""The plot of a benchmark: images per second of each variant, as bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from .case import Result
from .report import check_plot, write_atomically

_FUSED, _OTHER = "#1b9e77", "#b3b3b3"


def write_plot(results: Sequence[Result], path: Path) -> None:
    """Draw bars with whiskers from the 20 % to the 80 % quantile, and write them to `path`.

    Variants without a speed are left out.

    Raises:
        BenchmarkError: matplotlib is missing, or `path` cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = results[0]
    names, speeds, low, high, labels = [], [], [], [], []
    for r in results:
        if (
            r.images_per_second is None
            or r.p20_ms is None
            or r.p80_ms is None
            or r.speedup_vs_eager is None
        ):
            continue
        names.append(r.variant)
        speeds.append(r.images_per_second)
        low.append(max(r.images_per_second - 1e3 * r.batch_size / r.p80_ms, 0.0))
        high.append(max(1e3 * r.batch_size / r.p20_ms - r.images_per_second, 0.0))
        labels.append(f"{r.images_per_second:.1f} ({r.speedup_vs_eager:.2f}x)")

    figure = Figure(figsize=(8, 1.4 + 0.5 * max(len(names), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = [_FUSED if name == "fused" else _OTHER for name in names]
    axes.barh(names, speeds, xerr=[low, high], color=colours, ecolor="#404040", capsize=3)
    for i, (speed, above, label) in enumerate(zip(speeds, high, labels, strict=True)):
        weight = "bold" if names[i] == "fused" else "normal"
        axes.annotate(
            label,
            (speed + above, i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontweight=weight,
        )
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("images per second (whiskers: 20 % to 80 % quantile)")
    axes.set_title(
        f"{first.model}, {first.mode}, {first.dtype}, batch {first.batch_size}, "
        f"{first.image_size}x{first.image_size}, {first.device}, {first.threads} threads",
        fontsize="medium",
    )
    axes.spines[["top", "right"]].set_visible(False)

    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    write_atomically(path, buffer.getvalue())
