"""Plain text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table: columns padded to their widest cell, the first left-aligned, the others right-aligned; no final
    newline.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)} columns: {list(row)}")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def format_flops(value: float | None) -> str:
    """Format FLOPs as ``1.23e15``, a missing value as ``-``."""
    return "-" if value is None else f"{value:.2e}".replace("e+", "e")


def format_share(part: int, whole: int) -> str:
    """Format a share as ``all``, ``none`` or a percentage with three digits, such as ``0.521%``; ``whole`` is above 0."""
    if part in (0, whole):
        return "all" if part else "none"
    return f"{100 * part / whole:.3g}%"


def format_number(value: float | int | None) -> str:
    """Format a metric with grouped thousands and four significant digits; ``-`` for a missing value."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:#.4g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.3e}"
