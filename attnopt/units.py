"""Amounts of memory and numbers, as every report, message and table writes them."""

from __future__ import annotations

MIB = 1 << 20


def bytes_text(size: float) -> str:
    """Bytes in binary units to three digits: 64 MiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size:.0f} B"


def number_text(value: float) -> str:
    """A number as a file would hold it: 1048576, 0.96875."""
    return str(int(value)) if float(value).is_integer() else str(value)
