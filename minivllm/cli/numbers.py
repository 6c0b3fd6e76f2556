"""Numbers as users write them on the command line and in files: 32768, 32k, 32K, 2G, 512MiB, 90%."""
from __future__ import annotations

import argparse
import re
from fractions import Fraction

from minivllm.errors import shown

_NUMBER = re.compile(r"([+-]?\d[\d_]*(?:\.\d+)?) ?([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
LONGEST = 40  # characters


def whole_number(text: str) -> int:
    """An integer. As in vLLM, k, m, g and t are powers of 1,000, and K, M, G and T powers of 1,024. KB is 1,000 bytes, KiB 1,024."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= LONGEST else None
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a whole number such as 32768, 32k (32,000) or 32K (32,768), got {shown(text)}")
    number, letter, binary, byte = match.groups()
    base = 1024 if binary or (letter.isupper() and not byte) else 1000
    value = Fraction(number.replace("_", "")) * base ** _POWER[letter.lower()]
    if value.denominator != 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}, which is {float(value):.10g}")
    return int(value)


def real_number(text: str) -> float:
    """A floating-point number, or a percentage."""
    try:
        return float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {shown(text)}") from None


def gibibytes(text: str) -> float:
    """GiB without a unit, or a size such as 4G or 512MiB."""
    try:
        return float(text)
    except ValueError:
        return whole_number(text) / 2**30
