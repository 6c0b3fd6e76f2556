"""The requests of a serving benchmark and their arrival times.

    random    lengths fixed, uniform within a ratio, or log-normal; random tokens, after an optional common prefix
    nano      `workloads.nano`: 256 requests with 100 to 1,024 input and output tokens
    trace     a file with one JSON object per line: the requests that a real server received, with their times

Arrivals are a renewal process with gamma-distributed gaps. Burstiness 1: a Poisson process; below 1: bursts; above 1:
more regular.
"""
from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minivllm.benchmarks.workloads import FIRST_ID, LAST_ID, nano
from minivllm.errors import InvalidInput

HASH_BLOCK = 512  # tokens per entry of a trace's hash_ids (as in the traces published with Mooncake, FAST '25)
_WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "they", "at", "be", "this", "have",
          "from", "or", "one", "had", "by", "word", "but", "not", "what", "all", "were", "we", "when", "your", "can", "said", "there")


@dataclass(frozen=True, slots=True)
class ServingRequest:
    """One request: its prompt as token ids or text, and the number of output tokens."""

    prompt: tuple[int, ...] | str
    output_len: int
    due: float | None = None  # seconds after the start, from a trace
    temperature: float | None = None  # None: the run's temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthDistribution:
    """A distribution of lengths."""

    middle: int
    ratio: float = 0.0  # uniform from (1 - ratio) to (1 + ratio) times the middle
    sigma: float = 0.0  # log-normal with the middle as its median, instead; 0: off

    def draw(self, rng: random.Random) -> int:
        if self.sigma:
            return max(1, round(self.middle * math.exp(rng.gauss(0.0, self.sigma))))
        low, high = round(self.middle * (1 - self.ratio)), round(self.middle * (1 + self.ratio))
        return max(1, rng.randint(low, high))


def random_requests(
    count: int, inputs: LengthDistribution, outputs: LengthDistribution, *, seed: int, prefix_len: int = 0, last_id: int = LAST_ID,
    text: bool = False,
) -> list[ServingRequest]:
    """Random prompts. `prefix_len` common tokens come before the tokens of each."""
    rng = random.Random(seed)
    prefix = _prompt(rng, prefix_len, last_id, text)
    requests = []
    for _ in range(count):
        own, output_len = _prompt(rng, inputs.draw(rng), last_id, text), outputs.draw(rng)
        requests.append(ServingRequest(_joined(prefix, own), output_len))
    return requests


def _prompt(rng: random.Random, length: int, last_id: int, text: bool) -> tuple[int, ...] | str:
    """Token ids, or the same number of words, nearly all of which are one token each."""
    return " ".join(rng.choices(_WORDS, k=length)) if text else _ids(rng, length, last_id)


def _ids(rng: random.Random, length: int, last_id: int) -> tuple[int, ...]:
    return tuple(rng.randint(min(FIRST_ID, last_id), last_id) for _ in range(length))


def _joined(prefix: tuple[int, ...] | str, own: tuple[int, ...] | str) -> tuple[int, ...] | str:
    if isinstance(prefix, str) or isinstance(own, str):
        return f"{prefix} {own}" if prefix else own
    return prefix + own


def nano_requests(count: int | None, seed: int) -> list[ServingRequest]:
    return [ServingRequest(r.prompt_token_ids, r.output_len, temperature=r.temperature) for r in nano(seed)[:count]]


# -- traces -----------------------------------------------------------------------------------------------------------


def trace_requests(path: str, count: int | None, *, seed: int, last_id: int = LAST_ID, text: bool = False) -> list[ServingRequest]:
    """Requests of a JSONL file: {"prompt": text or ids} or {"input_length": n, "hash_ids": [...]}, "output_length", "timestamp" in ms."""
    rng = random.Random(seed)
    requests = []
    for number, line in _lines(path):
        try:
            requests.append(_trace_request(line, rng, seed, last_id, text))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidInput(f"{path}, line {number}: {what}; a line is an object such as "
                               '{"timestamp": 1500, "input_length": 300, "output_length": 20}', "dataset_path") from None
        if len(requests) == count:
            break
    if not requests:
        raise InvalidInput(f"{path} contains no request", "dataset_path")
    first = min((request.due for request in requests if request.due is not None), default=0.0)
    shifted = (replace(request, due=None if request.due is None else request.due - first) for request in requests)
    return sorted(shifted, key=lambda request: request.due or 0.0)


def _lines(path: str) -> Iterator[tuple[int, Any]]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidInput(f"cannot read the trace {path}: {reason}", "dataset_path") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InvalidInput(f"{path}, line {number} is not JSON: {error}", "dataset_path") from None


def _trace_request(entry: Any, rng: random.Random, seed: int, last_id: int, text: bool) -> ServingRequest:
    if not isinstance(entry, dict):
        raise ValueError("the line is not an object")
    output_len = _count(entry, "output_length")
    timestamp = entry.get("timestamp")
    if timestamp is not None and not (isinstance(timestamp, (int, float)) and math.isfinite(timestamp)):
        raise ValueError(f"timestamp must be a number of milliseconds, got {timestamp!r}")
    prompt = entry.get("prompt")
    if prompt is None:
        prompt = _hashed_prompt(entry, _count(entry, "input_length"), rng, seed, last_id, text)
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    elif not (isinstance(prompt, str) and prompt):
        raise ValueError("prompt must be a text or a list of token ids")
    return ServingRequest(prompt, output_len, None if timestamp is None else timestamp / 1e3)


def _count(entry: dict[str, Any], name: str) -> int:
    value = entry[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return value


def _hashed_prompt(
    entry: dict[str, Any], length: int, rng: random.Random, seed: int, last_id: int, text: bool,
) -> tuple[int, ...] | str:
    """A prompt in which equal hash ids are equal blocks of tokens, so that the trace's shared prefixes are shared here too."""
    hash_ids = entry.get("hash_ids") or ()
    if text or not hash_ids:
        return _prompt(rng, length, last_id, text)
    tokens: list[int] = []
    for hash_id in hash_ids:
        tokens += _ids(random.Random(f"{seed} {hash_id}"), HASH_BLOCK, last_id)
    return (*tokens, *_ids(rng, max(0, length - len(tokens)), last_id))[:length]


# -- arrivals ---------------------------------------------------------------------------------------------------------


def arrivals(requests: Sequence[ServingRequest], rate: float, burstiness: float, seed: int) -> list[float]:
    """The seconds after the start at which each request is due. With an infinite rate: 0, or the trace's time."""
    if math.isinf(rate):
        return [request.due or 0.0 for request in requests]
    rng, now, due = random.Random(seed + 1), 0.0, []
    for _ in requests:
        due.append(now)
        now += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return due
