"""Rows for people: a line each, or one line for each operator as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .draw import DTYPES
from .measure import Row

HEADER = (
    "operator", "result", "variant", "dtype", "held to", "error", "eager's", "ratio", "of budget",
    "", "worst case",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row below :data:`HEADER`."""
    return [
        row.operator, row.result, row.variant, row.dtype, row.promise, f"{row.error:.1e}",
        f"{row.eager_error:.1e}", "-" if row.ratio is None else f"{row.ratio:.2f}",
        f"{row.used:.2f}", "ok" if row.ok else "WRONG", row.shape,
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """How many there are and how many are wrong, and which comes nearest to its budget."""
    wrong = sum(not row.ok for row in rows)
    worst = max(rows, key=lambda row: row.used)
    where = f"{worst.operator} {worst.result}, {worst.variant}, {worst.dtype}, {worst.promise}"
    return (
        f"{len(rows)} results, {wrong or 'none'} WRONG; "
        f"nearest to its budget, at {worst.used:.2f}: {where}"
    )


def markdown(rows: Sequence[Row]) -> str:
    """For each operator and dtype the row that uses up most of its budget."""
    present = {row.dtype for row in rows}
    dtypes = [dtype for dtype in (*DTYPES, "autocast") if dtype in present]
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        before = worst.get((row.operator, row.dtype))
        if before is None or row.used > before.used:
            worst[row.operator, row.dtype] = row
    lines = ["| operator | " + " | ".join(dtypes) + " |", "|---" * (len(dtypes) + 1) + "|"]
    for operator in dict.fromkeys(row.operator for row in rows):
        found = (worst.get((operator, dtype)) for dtype in dtypes)
        lines.append(
            f"| {operator} | " + " | ".join("" if r is None else _cell(r) for r in found) + " |"
        )
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.error == 0:
        return "exact"
    ratio = "" if row.ratio is None else f" ({row.ratio:.2f})"
    return f"{row.error:.1e} / {row.eager_error:.1e}{ratio}{'' if row.ok else ' WRONG'}"
