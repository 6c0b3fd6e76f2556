"""The smallest change of settings that makes a model fit.

Changes that keep the weights come first, then smaller weights, then weights in host memory:

    kv_cache_dtype ▸ max_model_len ▸ max_num_seqs, max_num_batched_tokens ▸ enforce_eager ▸ gpu_memory_utilization
    fp8 on loading ▸ a 4-bit checkpoint ▸ a GGUF file, whose table and head are packed too ▸ cpu_offload_gb

Each of the first line is tried alone, then the first two of it, the first three and so on. Then each of the second line alone, then each
of these with one of the first line, then with the first two, and so on. cpu_offload_gb comes last, with the smallest weights.

Of the changes that are found, those that are not needed are removed again.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minivllm.errors import InvalidInput
from minivllm.planning.memory_plan import GIB, TYPICAL_REQUEST, MemoryPlan

FEWER_SEQS, FEWER_TOKENS = 32, 2048
LENGTH_STEP = 256  # tokens: suggested lengths are multiples


@dataclass(frozen=True, slots=True)
class Change:
    """Settings of the engine, or another storage of the weights, and the flags that say the same."""

    flags: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    quantization: str | None = None  # what-if


Evaluate = Callable[[Sequence[Change]], MemoryPlan]


def smallest_change(
    evaluate: Evaluate, keeping: Sequence[Change], smaller: Sequence[Change], *, offload: bool,
) -> tuple[Change, ...] | None:
    """The changes to make, () if none is needed, None if none helps.

    keeping, smaller: changes that keep the weights, and those that make them smaller, in the order in which to try them. offload: weights
    may stay in host memory.
    """
    for changes in _candidates(keeping, smaller):
        if _fit(evaluate, changes):
            return _needed(evaluate, changes)
    smallest = tuple(smaller[-1:])  # what stays in host memory is copied in each step, so it should be small
    for kept in (smallest, (*keeping, *smallest)) if offload else ():
        with contextlib.suppress(InvalidInput):
            plan = evaluate(kept)
            gib = math.ceil(10 * (plan.missing + plan.offloaded) / GIB) / 10
            changes = (*kept, Change(f"--cpu-offload-gb {gib:g}", {"cpu_offload_gb": gib}))
            if evaluate(changes).fits:
                return changes
    return None


def shorter(plan: MemoryPlan) -> Change | None:
    """max_model_len lowered to what fits, if that is still useful."""
    length = min(plan.tokens, plan.max_model_len) // LENGTH_STEP * LENGTH_STEP
    useful = length >= min(TYPICAL_REQUEST, plan.max_model_len / 2)
    return Change(f"--max-model-len {length}", {"max_model_len": length}) if useful else None


def _candidates(keeping: Sequence[Change], smaller: Sequence[Change]) -> Iterator[tuple[Change, ...]]:
    several = [tuple(keeping[:n]) for n in range(2, len(keeping) + 1)]
    yield ()
    yield from ((change,) for change in keeping)
    yield from several
    yield from ((change,) for change in smaller)
    for weights in smaller:
        yield from ((change, weights) for change in keeping)
        yield from ((*changes, weights) for changes in several)


def _fit(evaluate: Evaluate, changes: Sequence[Change]) -> bool:
    with contextlib.suppress(InvalidInput):  # the layers do not have as many GiB as cpu_offload_gb
        return evaluate(changes).fits
    return False


def _needed(evaluate: Evaluate, changes: tuple[Change, ...]) -> tuple[Change, ...]:
    for change in changes:
        fewer = tuple(other for other in changes if other is not change)
        if _fit(evaluate, fewer):
            return _needed(evaluate, fewer)
    return changes
