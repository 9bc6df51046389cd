"""What a result file of ``gpu.py`` says in at most 60 lines, and as two plots."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from roofline import Ceilings, Floors, Layer, network_layers

from resnet_fused import benchmark

_MOST = {"cases": 24, "convolutions": 8, "passes": 6, "failures": 10}  # 60 lines with the rest
_WIDTH = 120  # of an error's line


class Comparison(NamedTuple):
    """The fastest of ours and the fastest of the peers, of one case."""

    name: str
    ours: dict[str, Any]
    peer: dict[str, Any]

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.peer["median_ms"] / self.ours["median_ms"]


def comparisons(data: dict[str, Any]) -> list[Comparison]:
    """One for each case in which both have a speed."""
    found = []
    for name, entry in data["cases"].items():
        timed = [r for r in entry["results"] if r["median_ms"] is not None]
        ours = [r for r in timed if r["variant"].startswith("fused")]
        peers = [r for r in timed if not r["variant"].startswith("fused")]
        if ours and peers:
            fastest = (min(results, key=lambda r: r["median_ms"]) for results in (ours, peers))
            found.append(Comparison(name, *fastest))
    return found


def failures(data: dict[str, Any]) -> list[str]:
    """A line for each case, variant, operator and other part that failed or is wrong."""
    lines = [f"{key}: {data[key]['error']}" for key in data if _is_error(data[key])]
    for name, entry in data["cases"].items():
        if entry["error"]:
            lines.append(f"{name}: {entry['error']}")
        lines += [f"{name} {r['variant']}: {r['error']}" for r in entry["results"] if r["error"]]
    rows = [*_rows(data, "convolutions"), *_rows(data, "passes")]
    lines += [f"{r['operator']} {r['layer']}: {r['error']}" for r in rows if r["error"]]
    return lines


def is_wrong(data: dict[str, Any]) -> bool:
    """Whether anything of the library itself failed; a peer may."""
    entries = data["cases"].values()
    ours = [r for e in entries for r in e["results"] if r["variant"].startswith("fused")]
    rows = [*_rows(data, "convolutions"), *_rows(data, "passes")]
    return any(r["error"] for r in (*ours, *rows)) or any(map(_is_error, data.values()))


def has_failed(part: Any) -> bool:
    """Whether a part of the file is an error, or a table with one in it."""
    return _is_error(part) or (isinstance(part, list) and any(r.get("error") for r in part))


def summary(data: dict[str, Any], left: int) -> list[str]:
    """The lines to print last.

    Args:
        left: how many cases there was no time for.
    """
    found = comparisons(data)
    environment = data["environment"]
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"])
    lines = [
        f"{gpus}, torch {environment['torch']}, commit {environment['commit']}",
        f"fastest of ours over the fastest peer, {len(found)} cases:",
    ]
    for c in found[: _MOST["cases"]]:
        floor = network_floor_ms(c.ours, data.get("ceilings", {}))
        of_floor = f", {floor / c.ours['median_ms']:.0%} of the floor" if floor else ""
        lines.append(
            f"  {c.ratio:5.2f}x  {c.name}: {c.ours['variant']} {c.ours['median_ms']:.3g} ms "
            f"({c.ours['images_per_second']:,.0f} images/s{of_floor}), {c.peer['variant']} "
            f"{c.peer['median_ms']:.3g} ms"
        )
    lines += _more(found, "cases")
    for key in ("convolutions", "passes"):
        timed = [r for r in _rows(data, key) if r["milliseconds"] is not None]
        if timed:
            lines.append(f"{key} that lose the most time above their floor, in one network:")
        for r in sorted(timed, key=_lost_ms, reverse=True)[: _MOST[key]]:
            lines.append(
                f"  {_lost_ms(r):6.3f} ms  {r['operator']} {r['layer']} x{r['count']}: "
                f"{r['milliseconds']:.3f} ms, {r['of_floor']:.0%} of the floor, {r['shape']}"
            )
    failed = failures(data)
    lines.append(f"failed or wrong: {len(failed) or 'nothing'}")
    lines += [f"  {line}"[:_WIDTH] for line in failed[: _MOST["failures"]]]
    lines += _more(failed, "failures")
    if left:
        lines.append(f"no time for {left} cases; start again to go on")
    return lines


def network_floor_ms(result: dict[str, Any], ceilings: dict[str, Any]) -> float | None:
    """The least that a case's convolutions take; None where the ceilings were not measured."""
    if result["dtype"] not in ceilings:
        return None
    floors = Floors.of(
        [
            replace(layer, problem=replace(layer.problem, batch=result["batch_size"]))
            for layer in _one_image(result["model"], result["image_size"], result["dtype"])
        ],
        Ceilings(**ceilings[result["dtype"]]),
    )
    training = result["mode"] == "training"
    return 1e3 * (floors.training_fused if training else floors.epilogue)


@lru_cache
def _one_image(model: str, image_size: int, dtype: str) -> list[Layer]:
    return network_layers(model, batch_size=1, image_size=image_size, dtype=dtype)


def write_plots(data: dict[str, Any], path: Path) -> list[Path]:
    """Draw the ratios of all cases and the layers under their roofs, beside the result file.

    Returns:
        What was written.

    Raises:
        BenchmarkError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise benchmark.BenchmarkError("matplotlib is not installed")
    written = []
    for kind, draw in (("speedups", _draw_ratios), ("layers", _draw_layers)):
        target = path.with_name(f"{path.stem}-{kind}.png")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained", dpi=120)
        if draw(figure, data):
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_png(buffer)
            benchmark.write_atomically(target, buffer.getvalue())
            written.append(target)
    return written


def _draw_ratios(figure: Any, data: dict[str, Any]) -> bool:
    found = comparisons(data)
    if not found:
        return False
    figure.set_size_inches(8, 1.4 + 0.3 * len(found))
    axes = figure.subplots()
    axes.barh([c.name for c in found], [c.ratio for c in found], color="#1b9e77")
    for i, c in enumerate(found):
        text = f"{c.ratio:.2f}x {c.peer['variant']}"
        axes.annotate(text, (c.ratio, i), xytext=(4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="#404040", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlim=(0, None), xlabel="images per second, fastest of ours over the fastest peer")
    return True


def _draw_layers(figure: Any, data: dict[str, Any]) -> bool:
    rows = [r for r in _rows(data, "convolutions") if r["milliseconds"] is not None]
    if not rows:
        return False
    peak, bandwidth = (data["ceilings"]["bf16"][key] for key in ("flops", "bandwidth"))
    axes = figure.subplots()
    intensity = [r["flops"] / r["bytes"] for r in rows]
    ours, library = "milliseconds", "library_conv_ms"
    for key, label, marker in ((ours, "conv_bn_act", "o"), (library, "convolution alone", "x")):
        rates = [r["flops"] / r[key] / 1e9 if r[key] else None for r in rows]
        axes.scatter(intensity, rates, label=label, marker=marker, s=28)
    ends = [min(intensity) / 1.5, peak / bandwidth, max(intensity) * 1.5]
    axes.plot(ends, [min(peak, x * bandwidth) / 1e12 for x in ends], color="black", linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte, all in the epilogue",
        ylabel="TFLOP/s", title="ResNet-50, bfloat16, batch 256: convolutions and measured roofs",
    )  # fmt: skip
    axes.legend(fontsize=8)
    return True


def _rows(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = data.get(key, [])
    return value if isinstance(value, list) else []


def _is_error(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("error"), str)


def _lost_ms(row: dict[str, Any]) -> float:
    return row["count"] * (row["milliseconds"] - row["floor_ms"])


def _more(items: Sequence[object], kind: str) -> list[str]:
    more = len(items) - _MOST[kind]
    return [f"  and {more} more in the result file"] if more > 0 else []
