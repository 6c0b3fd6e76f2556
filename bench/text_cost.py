"""What text costs: detokenization per token, the search for stop strings per character, and bad words per step.

    python -m bench.text_cost [--model FOLDER] [--file TEXT]

First table: this project's streams beside `DecodeStream` of the `tokenizers` package, over the tokens of a text. Second table: the
automaton of `engine/stop_strings.py` beside one alternation of Python's `re` over a window, for 1, 16 and 1,024 stop strings of 16
characters that never match. The text arrives in pieces of 4 characters, as from tokens. Third table: bad words of 3 tokens in a step of
256 sequences with 4,096 vocabulary entries, all with the same words or each with different ones. Times are processor time, the best of
several rounds. The last line is JSON.
"""
from __future__ import annotations

import argparse
import json
import random
import re
import string
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers.decoders import DecodeStream

from bench.machine import describe, one_line
from minivllm.config import EngineConfig
from minivllm.core.plan import RowAdmission
from minivllm.engine.stop_strings import START, StopStrings
from minivllm.engine.tokenizer import Tokenizer
from minivllm.models.hub import find_model
from minivllm.sampling.logits_processors import apply_constraints
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams

ROUNDS = 7
BATCH, VOCAB = 256, 4096
LENGTH, PIECE = 16, 4  # characters of a stop string, and of the text of one token


def microseconds(work: Callable[[], object], count: int) -> float:
    """Per item, the best of several rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times) / count * 1e6


def detokenization(tokenizer: Tokenizer, text: str) -> dict[str, float]:
    ids = tokenizer.encode(text, add_special_tokens=False)

    def own() -> None:
        stream = tokenizer.stream(ids[:4])
        for token in ids:
            stream.push(token)
        stream.finish()

    def library() -> None:
        stream = DecodeStream(ids=ids[:4], skip_special_tokens=True)
        for token in ids:
            stream.step(tokenizer._backend, token)

    return {"own": microseconds(own, len(ids)), "DecodeStream": microseconds(library, len(ids))}


def stop_search(text: str, num_stops: int) -> dict[str, float]:
    rng = random.Random(0)
    stops = ["".join(rng.choices(string.ascii_lowercase + " ", k=LENGTH - 1)) + "\0" for _ in range(num_stops)]
    pieces = [text[i:i + PIECE] for i in range(0, len(text), PIECE)]
    automaton = StopStrings(stops)
    pattern = re.compile("|".join(map(re.escape, stops)))

    def own() -> None:
        state = START
        for piece in pieces:
            state, _, _ = automaton.search(state, piece)

    def alternation() -> None:
        window = ""
        for piece in pieces:
            window = window[-(LENGTH - 1):] + piece
            pattern.search(window)

    return {"automaton": microseconds(own, len(text)), "re": microseconds(alternation, len(text)),
            "compile_ms": microseconds(lambda: StopStrings(stops), 1000)}


def bad_words_step(num_words: int, distinct: bool) -> float:
    """Microseconds for the bad words of one step."""
    rng = np.random.default_rng(0)
    rows, positions, sampler = np.arange(BATCH), np.full(BATCH, 100), Sampler(BATCH, VOCAB, torch.device("cpu"))
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (BATCH, 128), np.int32))
    for row in range(BATCH):
        words = tuple(map(tuple, np.random.default_rng(row if distinct else 0).integers(0, VOCAB, (num_words, 3)).tolist()))
        params = SamplingParams(temperature=0, bad_words_token_ids=words)
        sampler.admit(RowAdmission(row, str(row), (1,), 1, ((),), params, 0, 0))
    logits = torch.zeros(BATCH, VOCAB)
    return microseconds(lambda: apply_constraints(logits, sampler._constraints, rows, positions, tokens, sampler._bad_words), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model folder; default: the default model")
    parser.add_argument("--file", type=Path, default=Path(__file__).parents[1] / "docs" / "architecture.md")
    args = parser.parse_args()
    folder = find_model(EngineConfig(model=args.model)).tokenizer_folder
    if folder is None:
        parser.error("this model has no tokenizer: choose another with --model")
    text = args.file.read_text(encoding="utf-8")
    streams = detokenization(Tokenizer(folder), text)
    print("detokenization, microseconds a token: " + ", ".join(f"{name} {us:.2f}" for name, us in streams.items()))
    print(f"\nstop strings, microseconds a character\n{'stops':>6} {'automaton':>10} {'re':>8} {'compile ms':>11}")
    searches = {num_stops: stop_search(text, num_stops) for num_stops in (1, 16, 1024)}
    for num_stops, row in searches.items():
        print(f"{num_stops:6d} {row['automaton']:10.3f} {row['re']:8.3f} {row['compile_ms']:11.2f}")
    print(f"\nbad words, microseconds a step of {BATCH} sequences\n{'words':>6} {'the same':>10} {'different':>10}")
    steps = {count: {"same": bad_words_step(count, False), "different": bad_words_step(count, True)} for count in (1, 16, 1024)}
    for count, row in steps.items():
        print(f"{count:6d} {row['same']:10.0f} {row['different']:10.0f}")
    machine = describe("cpu", 1)
    print("\n" + one_line(machine))
    print(json.dumps({"bench": "text_cost", "machine": machine, "detokenization_us": streams, "stop_search_us": searches,
                      "bad_words_us": steps}))


if __name__ == "__main__":
    main()
