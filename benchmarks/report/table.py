"""Markdown tables that are also aligned in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A padded Markdown table; the first `left` columns are aligned left, the others right.

    >>> print(markdown(["model", "MB"], [["a", "1.5"]]))
    | model |  MB |
    | ----- | --: |
    | a     | 1.5 |
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [headers, *rows])) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def megabytes(size: float) -> str:
    """Bytes in MB (10^6), with two decimals below 10.

    >>> megabytes(1_234_567), megabytes(123_456_789)
    ('1.23 MB', '123.5 MB')
    """
    mb = size / 1e6
    return f"{mb:.1f} MB" if mb >= 10 else f"{mb:.2f} MB"


def readable(value: float) -> str:
    """A perplexity with two decimals, or four significant digits when huge.

    >>> readable(81.512), readable(1.5649e45)
    ('81.51', '1.565e+45')
    """
    return f"{value:.2f}" if value < 1e6 else f"{value:.4g}"
