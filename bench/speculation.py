"""What speculative decoding gains: tokens per second with and without drafts, one stream or several.

    python -m bench.speculation ngram [--device cuda] [--streams 1,8] [--tokens 200] [--drafts 5]
    python -m bench.speculation draft --draft DIR [--method eagle] [--device cuda]
    python -m bench.speculation scripted --shape mistral-7b --device cuda [--drafts 4] [--acceptance 0,0.5,0.8,1]

    ngram      the default model on prompts whose answers repeat parts of them (copy, edit, code), and on one where drafts cannot help
    draft      the default model and a trained draft, on ordinary chat prompts
    scripted   random weights of a shape, and a proposer that is right with a fixed probability. "arithmetic" is the expected number of
               tokens per step times the measured time of a plain step over that of a step with drafts that are all wrong
    gain       tokens/s with drafts over tokens/s without, each the best of --repeats runs
    accepted   share of the steps with drafts in which the first, second, ... draft was accepted
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import machine, models
from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.models.decoder import Decoder
from minivllm.outputs import DraftCounts
from minivllm.sampling_params import SamplingParams
from minivllm.speculative.adaptive import Acceptance
from minivllm.speculative.base import DraftTokens, ProposalInput
from minivllm.worker.worker import DEFAULT_COMPONENTS, Components

STORY = ("The lighthouse keeper climbed the narrow stairs every evening and lit the lamp before the first ships came in. On the table lay "
         "a list of names, with the hour of each arrival and the weight of the cargo in tons. ")
CODE = ("def total_price(items, tax_rate):\n    total = 0.0\n    for item in items:\n        if item.quantity > 0:\n            "
        "total += item.price * item.quantity\n    return total * (1.0 + tax_rate)\n")
COPYING = {
    "copy": f"Repeat this text word for word, three times:\n\n{STORY * 2}",
    "edit": f"Rewrite this text and change nothing but the word 'evening', which becomes 'night':\n\n{STORY * 2}",
    "code": f"Repeat this function exactly, then repeat it with the name total_cost:\n\n```python\n{CODE}```",
}
CHAT = {
    "question": "Why is the sky blue? Explain it to a child.", "advice": "Give me three tips for learning a language.",
    "story": "Tell me a short story about a robot who learns to paint.", "plan": "Plan a day in Paris for a family with two children.",
}
UNRELATED = {"random": "Write a list of forty different English words that have nothing to do with each other."}


def main() -> None:
    args = parse()
    where = machine.describe(args.device, args.threads)
    print(machine.one_line(where), flush=True)
    torch.set_num_threads(args.threads)
    rows = scripted(args) if args.part == "scripted" else trained(args)
    print(json.dumps({"command": "python -m bench.speculation " + " ".join(sys.argv[1:]), "machine": where, "rows": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ngram", "draft", "scripted"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200, help="output tokens of each stream")
    parser.add_argument("--drafts", type=int, default=0, help="num_speculative_tokens (default: 4 for scripted, else 5)")
    parser.add_argument("--streams", default="1", help="numbers of concurrent requests, such as 1,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="mistral-7b", choices=sorted(models.SHAPES))
    parser.add_argument("--acceptance", default="0,0.5,0.8,1")
    parser.add_argument("--dtype", default="auto", help="of the scripted shape")
    parser.add_argument("--draft", metavar="DIR", help="folder of a trained draft")
    parser.add_argument("--method", default="eagle", choices=("eagle", "draft_model"))
    return parser.parse_args()


# --- the default model -----------------------------------------------------------------------------------------------------------


def trained(args: argparse.Namespace) -> list[dict[str, Any]]:
    k = args.drafts or 5
    if args.part == "ngram":
        settings: dict[str, Any] = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
        prompts = COPYING | UNRELATED
    else:
        settings, prompts = {"method": args.method, "model": args.draft}, CHAT
    rows: list[dict[str, Any]] = []
    for streams in map(int, args.streams.split(",")):
        speeds: list[dict[str, tuple[float, DraftCounts]]] = []
        for speculative in (None, {**settings, "num_speculative_tokens": k}):
            engine = build_engine(EngineConfig(device=args.device, max_model_len=2048, speculative_config=speculative))
            assert engine.tokenizer is not None
            found = {}
            for name, prompt in prompts.items():
                text = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
                tokens = text if isinstance(text, list) else engine.tokenizer.encode(text)
                found[name] = measure(engine, [list(tokens)] * streams, args)
            speeds.append(found)
            engine.close()
        for name in prompts:
            rows.append(report(name, streams, speeds[0][name][0], *speeds[1][name]))
    return rows


# --- a shape with random weights -------------------------------------------------------------------------------------------------


class Scripted:
    """Proposes the token that the target will sample with a fixed probability, else another one.

    The target's next token is `next` of the newest one: the embedding of token t is the output head's row of `next[t]`, so large that the
    layers change nothing. That logit is then far above all others (with H inputs, about sqrt(H) against 4), whatever rounding does.
    """

    needs_hidden = False

    def __init__(self, model: Decoder, num_drafts: int, acceptance: float) -> None:
        self.num_drafts, self.acceptance, size, device = num_drafts, acceptance, model.spec.vocab_size, model.build.device
        table = model.embedding.table
        assert isinstance(table, Tensor)
        with torch.inference_mode():
            rows = model.head.dense_weight(model.spec.hidden_size, device, model.build.dtype)
            order = torch.arange(size) if model.spec.tied else torch.randperm(size, generator=torch.Generator().manual_seed(1))
            self.next = order.to(device)
            table.copy_(rows.index_select(0, self.next)).mul_(1e4)
        self.chance = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)).to(device)

    def propose(self, x: ProposalInput) -> DraftTokens:
        token, tokens = x.newest, []
        for i in range(self.num_drafts):
            token = self.next[token]
            right = self.chance[(x.lengths * self.num_drafts + i + 7919 * x.streams.remainder(997)) % len(self.chance)] < self.acceptance
            tokens.append(torch.where(right, token, (token + 1) % len(self.next)))
        return DraftTokens(torch.stack(tokens, 1))


def scripted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The proposer costs almost nothing, so this measures verification alone."""
    k, rows = args.drafts or 4, []
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Acceptance, "length", lambda self, num_seqs, most, cost: most):
        models.write_config(args.shape, Path(folder))
        for streams in map(int, args.streams.split(",")):
            prompts = [[5 + i, 6, 7, 8] for i in range(streams)]
            plain = step_time = 0.0
            for rate in (None, *map(float, args.acceptance.split(","))):
                engine = engine_of(folder, args, k, rate)
                speed, counts = measure(engine, prompts, args)
                engine.close()
                if rate is None:
                    plain = speed
                    continue
                tokens = sum(rate**i for i in range(k + 1))
                per_step = 1 + counts.num_accepted / max(counts.num_steps, 1)
                step_time = step_time or per_step / speed  # of the first rate, 0
                rows.append(report(f"{args.shape} a={rate:g}", streams, plain, speed, counts, tokens / step_time / plain))
    return rows


def engine_of(folder: str, args: argparse.Namespace, k: int, rate: float | None) -> EngineCore:
    settings: dict[str, Any] = {"method": "draft_model", "model": "scripted", "num_speculative_tokens": k}
    config = EngineConfig(model=folder, skip_tokenizer_init=True, load_format="dummy", device=args.device, dtype=args.dtype,
                          max_model_len=1024, max_num_seqs=32, speculative_config=None if rate is None else settings)
    return build_engine(config, DEFAULT_COMPONENTS if rate is None else Components(proposer=lambda model: Scripted(model, k, rate)))


# --- both ------------------------------------------------------------------------------------------------------------------------


def measure(engine: EngineCore, prompts: Sequence[list[int]], args: argparse.Namespace) -> tuple[float, DraftCounts]:
    """(tokens/s of the whole engine from the first token on, what became of the drafts) of the best of several runs."""
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    best, counts = 0.0, DraftCounts()
    for run in range(args.repeats):
        for i, prompt in enumerate(prompts):
            engine.add_request(f"{run}-{i}", {"prompt_token_ids": prompt}, params)
        produced, begin, drafts = 0, 0.0, DraftCounts()
        while engine.has_unfinished_requests():
            for delta in engine.step():
                produced += len(delta.token_ids)
                if delta.metrics is not None and delta.metrics.drafts is not None:
                    drafts = drafts + delta.metrics.drafts
            if produced and not begin:
                begin, produced = time.perf_counter(), 0
        speed = produced / (time.perf_counter() - begin)
        if speed > best:
            best, counts = speed, drafts
    return best, counts


def report(name: str, streams: int, plain: float, speed: float, counts: DraftCounts, arithmetic: float | None = None) -> dict[str, Any]:
    accepted = [round(n / max(counts.num_steps, 1), 3) for n in counts.accepted_per_position]
    line = (f"{name:20} streams {streams:3}  plain {plain:9.1f} tokens/s  with drafts {speed:9.1f}  gain {speed / plain:5.2f}"
            + ("" if arithmetic is None else f"  arithmetic {arithmetic:5.2f}")
            + f"  steps with drafts {counts.num_steps}, accepted {accepted}")
    print(line, flush=True)
    return {"name": name, "streams": streams, "plain": plain, "speed": speed, "gain": speed / plain, "arithmetic": arithmetic,
            "steps": counts.num_steps, "accepted": accepted}


if __name__ == "__main__":
    main()
