"""The exact work of each benchmark row: prompts as token ids, output lengths, temperature. It is the same for every engine.

    row        requests                    prompt            output           figure
    cN         N at once                   128               128              output tokens / s
    mixed32    32 at once                  20..200           20..200          output tokens / s
    ttftL      one                         L                 1                median ms
    bsB        B at once, greedy           128               1, then 257      ms per further output token (TPOT)
    longBxL    B at once                   L                 1                seconds
    longtpotBxL    B at once               L, cached         1, then 257      ms per further output token (TPOT)
    nano       256 at once                 100..1024         100..1024        output tokens / s
    nano8gb    nano, with KV cache for 44,800 tokens               output tokens / s
    prefix     64 with a common prefix     2,048 + 64        64               seconds, with the prefix already cached

Output lengths are exact: end-of-sequence tokens are ignored. Rows and repetitions need different seeds: prompts of one seed begin with the
same tokens, whatever their number and length, so a prefix cache that holds one row's prompts would shorten another row. A seed may be a
string, such as the name of the row and the number of the repetition.
"""
from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_ID, LAST_ID = 100, 10_000  # of random prompts: within every vocabulary, above the special tokens at its start


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request with exactly `output_len` output tokens."""

    prompt_token_ids: tuple[int, ...]
    output_len: int
    temperature: float = 0.0


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randint(FIRST_ID, LAST_ID) for _ in range(count))


def uniform(count: int, prompt_len: int, output_len: int, seed: int | str = 0) -> list[WorkloadRequest]:
    """`count` greedy requests of one size: rows cN, bsB, ttftL, longBxL and longtpotBxL."""
    rng = random.Random(seed)
    return [WorkloadRequest(_tokens(rng, prompt_len), output_len) for _ in range(count)]


def mixed(count: int = 32, low: int = 20, high: int = 200, seed: int | str = 0) -> list[WorkloadRequest]:
    """Greedy requests of different sizes. The lengths (per request: prompt, then output) are the same for every seed."""
    lengths, rng = random.Random(0), random.Random(seed)
    sizes = [(lengths.randint(low, high), lengths.randint(low, high)) for _ in range(count)]
    return [WorkloadRequest(_tokens(rng, prompt_len), output_len) for prompt_len, output_len in sizes]


def nano(seed: int = 0) -> list[WorkloadRequest]:
    """nano-vllm's benchmark: all prompts are drawn first, then all output lengths. 133,966 output tokens with seed 0."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randint(0, LAST_ID) for _ in range(rng.randint(100, 1024))) for _ in range(256)]
    return [WorkloadRequest(prompt, rng.randint(100, 1024), temperature=0.6) for prompt in prompts]


def shared_prefix(
    count: int = 64, prefix_len: int = 2048, own_len: int = 64, output_len: int = 64, seed: int | str = 0
) -> tuple[WorkloadRequest, list[WorkloadRequest]]:
    """A request that puts the prefix into the cache, and requests that start with the prefix."""
    rng = random.Random(seed)
    prefix = _tokens(rng, prefix_len)
    return WorkloadRequest(prefix, 1), [WorkloadRequest(prefix + _tokens(rng, own_len), output_len) for _ in range(count)]


def output_tokens(requests: list[WorkloadRequest]) -> int:
    return sum(request.output_len for request in requests)


def check_requests() -> list[WorkloadRequest]:
    """A small mix whose greedy tokens are compared between engines before the measurement."""
    rng = random.Random(1)
    return [WorkloadRequest(_tokens(rng, length), 16) for length in (1, 7, 64, 200)]
