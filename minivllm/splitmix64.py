"""SplitMix64, a generator whose i-th output is computed from its seed and i alone (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014): output i = mix64(seed + (i + 1) * GOLDEN), modulo 2**64.
"""
from __future__ import annotations

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    """The output function on one Python integer, of which the lowest 64 bits count."""
    x &= MASK
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & MASK
    return x ^ (x >> 31)


def output(seed: int, number: int) -> int:
    """Output `number`, counted from 0, of the generator that starts at `seed`."""
    return mix64(seed + (number + 1) * GOLDEN)
