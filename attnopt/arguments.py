"""What the values on a command line may be: each reads one text, or says what was expected."""

from __future__ import annotations

import argparse


def whole_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers such as 1024,4096")
    numbers = [int(p) for p in parts]
    return sorted(set(numbers))


def names(text: str) -> list[str]:
    """Words between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers_or_none(text: str) -> list[int]:
    """Whole numbers of which 0 may be one."""
    found = [0] if "0" in [p.strip() for p in text.split(",")] else []
    rest = ",".join(p for p in text.split(",") if p.strip() != "0")
    return found + (whole_numbers(rest) if rest else [])


def count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def one_length(text: str) -> int:
    """Of a command that has --lengths too."""
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not one length; several go to --lengths")
    return count(text)


def number(text: str) -> float:
    """The number, or NaN, which no comparison takes."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def percent(text: str) -> float:
    value = number(text.removesuffix("%"))
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive percentage such as 1%")
    return value


def budget_percent(text: str) -> float:
    """A percentage that may be 0, which only dense keeps."""
    return 0.0 if number(text.removesuffix("%")) == 0 else percent(text)


def not_negative(text: str) -> float:
    return 0.0 if number(text) == 0 else positive(text)


def count_or_none(text: str) -> int:
    return 0 if text == "0" else count(text)


def speedup(text: str) -> float:
    value = number(text.lower().removesuffix("x"))
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a speed-up of at least 1 such as 2 or 1.5x")
    return value


UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def memory(text: str) -> tuple[str, float]:
    """("share", of dense), from 40% or 0.4; or ("bytes", of one sequence), from 512MiB or a whole number."""
    lower = text.strip().lower()
    unit = next((u for u in UNITS if lower.endswith(u)), "")
    if unit or (lower.isdecimal() and int(lower) > 1):
        value = number(lower.removesuffix(unit)) * UNITS.get(unit, 1)
        if 1 <= value < float("inf"):
            return "bytes", value
    share = number(lower.removesuffix("%")) / (100 if lower.endswith("%") else 1)
    if not unit and 0 < share <= 1:
        return "share", share
    raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 40% nor an amount such as 512MiB")


def positive(text: str) -> float:
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
