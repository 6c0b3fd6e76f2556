"""What structured output costs: its share of a decode step, and the masks alone for a large vocabulary.

    python -m bench.grammar_cost [--steps 40] [--rows 1 8 32] [--model FOLDER]

First table: the default model decodes with and without a JSON schema on every row. `masks` and `advance` are the host's work per step
(on a GPU the first runs while the device computes), `apply` puts the masks on the logits. Their share is of the step without a schema.

Second table: the masks of one step over a vocabulary of 151,936 entries, on the way through a JSON document, each row at its own
place. The vocabulary is the model's, filled up with pairs of its tokens. Times are medians over steps; the last line is JSON.
"""
from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.machine import describe, one_line
from minivllm import LLM, SamplingParams, StructuredOutputs
from minivllm.engine.engine import EngineCore
from minivllm.engine.grammar import fill_masks
from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.engine.tokenizer import Tokenizer
from minivllm.sampling.logits_processors import TokenMasks

VOCABULARY = 151_936
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["title", "year", "rating", "tags", "people"], "additionalProperties": False,
    "properties": {
        "title": {"type": "string"}, "year": {"type": "integer"}, "rating": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["drama", "comedy", "crime", "documentary"]}},
        "people": {"type": "array", "minItems": 8, "items": {
            "type": "object", "required": ["name", "role"], "additionalProperties": False, "properties": {
                "name": {"type": "string"}, "role": {"enum": ["actor", "director", "writer"]},
                "born": {"type": "string", "format": "date"}},
        }},
    },
}
DOCUMENT = json.dumps({
    "title": "The long way home", "year": 1987, "rating": 7.25, "tags": ["drama", "crime"],
    "people": [{"name": f"Person number {i}", "role": "actor", "born": f"19{60 + i}-03-1{i}"} for i in range(8)],
}, separators=(",", ":"))


class Clock:
    """Seconds spent in some functions, per step."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)

    def around(self, owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.now[name] += time.perf_counter() - start

        setattr(owner, method, timed)


def decode(engine: EngineCore, rows: int, wanted: StructuredOutputs | None, steps: int, clock: Clock) -> dict[str, float]:
    """Medians of a decode step, in milliseconds."""
    for i in range(rows):
        prompt = engine.tokenizer.encode(f"Film number {i}, described as JSON: ")  # type: ignore[union-attr]
        engine.add_request(f"r{i}", prompt, SamplingParams(
            temperature=1.0, seed=i, max_tokens=steps + 20, structured_outputs=wanted, ignore_eos=True, min_tokens=steps + 10))
    for _ in range(8):  # prompts, and what is computed once
        engine.step()
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        clock.now.clear()
        start = time.perf_counter()
        engine.step()
        seen["step"].append(time.perf_counter() - start)
        for name in ("masks", "advance", "apply"):
            seen[name].append(clock.now[name])
    assert engine.stats().num_running == rows, "an output was complete too early"
    for i in range(rows):
        engine.abort_request(f"r{i}")
    return {name: statistics.median(values) * 1e3 for name, values in seen.items()}


def share_of_a_step(llm: LLM, batches: list[int], steps: int) -> list[dict[str, float]]:
    clock, engine = Clock(), llm.llm_engine.core
    clock.around(engine._outputs, "masks", "masks")
    clock.around(engine._outputs, "advance_grammars", "advance")
    clock.around(TokenMasks, "apply", "apply")
    found = []
    print(f"\n{'rows':>5} {'step ms':>9} {'with schema':>12} {'masks':>7} {'advance':>8} {'apply':>7} {'share':>7}")
    for rows in batches:
        plain = decode(engine, rows, None, steps, clock)
        held = decode(engine, rows, StructuredOutputs(json=SCHEMA), steps, clock)
        share = (held["masks"] + held["advance"] + held["apply"]) / plain["step"]
        cells = "".join(f"{held[name]:{width}.3f}" for name, width in (("masks", 8), ("advance", 9), ("apply", 8)))
        print(f"{rows:5d} {plain['step']:9.2f} {held['step']:12.2f}{cells} {share:7.2%}")
        found.append({"rows": rows, "step_ms": plain["step"], "held_step_ms": held["step"],
                      **{name: held[name] for name in ("masks", "advance", "apply")}, "share": share})
    return found


class LargeVocabulary:
    """The model's tokens, and pairs of them up to the wanted number: what llguidance asks of a tokenizer that is no file."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        special = [i for i in range(len(tokens)) if tokenizer.is_special(i)]
        known, parts, rng = set(tokens), tokens[1000:20_000], random.Random(0)
        while len(tokens) < VOCABULARY:
            pair = rng.choice(parts) + rng.choice(parts)
            if pair not in known and len(pair) < 24:
                known.add(pair)
                tokens.append(pair)
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id = self.bos_token_id = eos

    def __call__(self, text: bytes | str) -> list[int]:
        return []


def masks_alone(tokenizer: Tokenizer, eos: int, steps: int) -> list[dict[str, float]]:
    from llguidance import LLExecutor, LLTokenizer, TokenizerWrapper

    compiler = GrammarCompiler(tokenizer, (eos,))
    wrapper = TokenizerWrapper(LargeVocabulary(tokenizer, eos))
    start = time.perf_counter()
    compiler._vocabulary._built = LLTokenizer(wrapper, eos_token=eos)
    print(f"\na vocabulary of {compiler.num_tokens} entries is indexed in {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    grammar = compiler.compile(StructuredOutputs(json=SCHEMA))
    print(f"the schema is compiled in {(time.perf_counter() - start) * 1e3:.1f} ms")
    ids, pool, found = tokenizer.encode(DOCUMENT, add_special_tokens=False), LLExecutor(), []
    print(f"{'rows':>5} {'masks ms':>9} {'slowest':>9} {'us a row':>9}")
    for rows in (1, 32, 256):
        matchers, at, times = [grammar.deep_copy() for _ in range(rows)], [i % len(ids) for i in range(rows)], []
        for matcher, place in zip(matchers, at, strict=True):
            matcher.consume_tokens(ids[:place])
        words = np.zeros((rows, -(-compiler.num_tokens // 32)), np.int32)
        for _ in range(steps):
            start = time.perf_counter()
            fill_masks(pool, [(matcher, ()) for matcher in matchers], words)
            times.append(time.perf_counter() - start)
            for i, matcher in enumerate(matchers):
                matcher.consume_token(ids[at[i]])
                at[i] += 1
                if at[i] == len(ids):
                    matcher.reset()
                    at[i] = 0
        middle = statistics.median(times)
        print(f"{rows:5d} {middle * 1e3:9.3f} {max(times) * 1e3:9.3f} {middle / rows * 1e6:9.1f}")
        found.append({"rows": rows, "masks_ms": middle * 1e3, "slowest_ms": max(times) * 1e3})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--model", default=None)
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, for a folder that has none")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with LLM(args.model, max_model_len=512, device=args.device, load_format=args.load_format, async_scheduling=False) as llm:
        shares = share_of_a_step(llm, args.rows, args.steps)
        device = llm.llm_engine.info().device.partition(":")[0]
        alone = masks_alone(llm.llm_engine.core.tokenizer, llm.llm_engine.core.eos_token_ids[0], args.steps)
    machine = describe(device, torch.get_num_threads())
    print("\n" + one_line(machine))
    print(json.dumps({"bench": "grammar_cost", "machine": machine, "share_of_a_step": shares, "masks_alone": alone}))


if __name__ == "__main__":
    main()
