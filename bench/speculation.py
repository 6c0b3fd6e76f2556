"""What speculative decoding gains: tokens per second with and without drafts, one stream or several.

    python -m bench.speculation ngram [--device cuda] [--streams 1,8] [--tokens 200] [--drafts 8]
    python -m bench.speculation draft [--draft DIR --method eagle] [--prompts 24] [--device cuda]
    python -m bench.speculation scripted --shape mistral-7b --device cuda [--drafts 4] [--acceptance 0,0.5,0.8,1] [--adaptive]
    python -m bench.speculation breakeven [--device cuda] [--drafts 8] [--acceptance 0.3,0.5,0.9] [--streams 1,8,64]

    ngram      the default model on prompts whose answers repeat parts of them, and on one (story) whose answer does not
    draft      the default model and a trained draft, on chat prompts about topics that the head of the package was not trained on
    scripted   random weights of a shape, and a proposer that is right with a fixed probability. "arithmetic" is the expected number of
               tokens per step times the measured time of a plain step over that of a step with drafts that are all wrong; "ratio" is the
               measured gain over it. All drafts are verified, or with --adaptive as many as the engine's rule says
    breakeven  computes, and measures nothing: the gain that the rule's cost model (`kernels/tuning.py`) expects, with the best number of
               drafts, by acceptance and number of streams

    gain       tokens/s with drafts over tokens/s without, each the best of --repeats runs
    equal      answers that are the same with and without drafts
    copied     share of the answer's tokens that lie in 4 tokens which the prompt has in the same order
    accepted   share of the steps with drafts in which the first, second, ... draft was accepted
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from minivllm.speculative.adaptive import Acceptance, cost_of, expected_gain
from minivllm.speculative.base import DraftTokens, ProposalInput
from minivllm.speculative.training.prompts import held_out_prompts
from minivllm.worker.worker import DEFAULT_COMPONENTS, Components

TEXT = (
    "The museum opened in 1923 with a small collection of maps. Over the years it bought {0}, letters and photographs from families in the "
    "region. A fire {1} the east wing in 1957, but most of the collection was saved by the staff. The new building was designed by a local "
    "architect and has three floors. The first floor shows the history of the town. The second floor shows the history of the {2} and its "
    "ships. The third floor has a library that is open to students. Last year more than forty thousand people visited the museum.")
CODE = """def parse_orders(lines):
    orders = []
    for line in lines:
        line = line.strip()
        if not line:
            continue
        parts = line.split(",")
        if len(parts) != 4:
            raise ValueError("expected four fields: " + line)
        name = parts[0].strip()
        quantity = int(parts[1])
        price = float(parts[2])
        paid = parts[3].strip() == "yes"
        if quantity < 1:
            raise ValueError("quantity must be positive: " + line)
        if price < 0:
            raise ValueError("price must not be negative: " + line)
        total = quantity * price
        orders.append({"name": name, "quantity": quantity, "price": price, "paid": paid, "total": total})
    return orders
"""
COPYING = {  # answers of the default model that are mostly copies, in float32 and in bfloat16
    "summarize": "Extract the most important sentences of this text:\n\n" + TEXT.format("paintings", "destroyed", "harbor"),
    "edit": ("Correct the spelling mistakes in this text and keep everything else as it is:\n\n"
             + TEXT.format("paintngs", "destroied", "harbour")),
    "copy": "Repeat this text word for word:\n\n" + TEXT.format("paintings", "destroyed", "harbor"),
    "code": f"Rename the variable quantity to count in this function:\n\n```python\n{CODE}```",
}
UNRELATED = {"story": "Write a short story about a cat who travels to the moon, in one paragraph."}
MAX_SEQS = 64  # of the scripted shape


def main() -> None:
    args = parse()
    if args.part == "breakeven":
        breakeven(args)
        return
    where = machine.describe(args.device, args.threads)
    print(machine.one_line(where), flush=True)
    torch.set_num_threads(args.threads)
    rows = scripted(args) if args.part == "scripted" else trained(args)
    print(json.dumps({"command": "python -m bench.speculation " + " ".join(sys.argv[1:]), "machine": where, "rows": rows}))


DRAFTS = {"ngram": 8, "draft": 3, "scripted": 4, "breakeven": 8}
STREAMS = {"breakeven": "1,2,4,8,16,32,64"}
ACCEPTANCE = {"scripted": "0,0.5,0.8,1", "breakeven": "0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(DRAFTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200, help="output tokens of each stream, at most")
    parser.add_argument("--drafts", type=int, help=f"num_speculative_tokens (default: {DRAFTS})")
    parser.add_argument("--streams", help="numbers of concurrent requests, such as 1,8 (default: 1)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time of this process, on a machine with other programs")
    parser.add_argument("--shape", default="mistral-7b", choices=sorted(models.SHAPES))
    parser.add_argument("--acceptance", help=f"probabilities that a draft is right (default: {ACCEPTANCE})")
    parser.add_argument("--adaptive", action="store_true", help="scripted: verify as many drafts as the engine's rule says, not all")
    parser.add_argument("--dtype", default="auto", help="of the scripted shape")
    parser.add_argument("--draft", metavar="DIR", help="folder of a trained draft (default: the head of the package)")
    parser.add_argument("--method", default="eagle", choices=("eagle", "draft_model"))
    parser.add_argument("--prompts", type=int, default=24, help="number of chat prompts")
    args = parser.parse_args()
    args.drafts = args.drafts or DRAFTS[args.part]
    args.streams = [int(n) for n in (args.streams or STREAMS.get(args.part, "1")).split(",")]
    args.acceptance = [float(a) for a in (args.acceptance or ACCEPTANCE.get(args.part, "0")).split(",")]
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        parser.error("--cpu-time needs --device cpu --threads 1: it counts neither a GPU nor the time that threads save")
    if args.adaptive and args.part != "scripted":
        parser.error("--adaptive is for the part scripted: the others always follow the engine's rule")
    return args


# --- the default model -----------------------------------------------------------------------------------------------------------


def trained(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.part == "ngram":
        settings: dict[str, Any] = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
        texts = {name: [prompt] for name, prompt in (COPYING | UNRELATED).items()}
    else:
        settings = {"method": args.method} | ({"model": args.draft} if args.draft else {})
        texts = {"chat": held_out_prompts(args.prompts)}
    rows: list[dict[str, Any]] = []
    for streams in args.streams:
        found: list[dict[str, Measured]] = []
        for speculative in (None, {**settings, "num_speculative_tokens": args.drafts}):
            engine = build_engine(EngineConfig(device=args.device, max_model_len=2048, speculative_config=speculative))
            prompts = {name: [chat_tokens(engine, text) for text in some] for name, some in texts.items()}
            found.append({name: measure(engine, some * (streams if len(some) == 1 else 1), args, streams, ends=True)
                          for name, some in prompts.items()})
            engine.close()
        for name in texts:
            plain, drafted = found[0][name], found[1][name]
            more: dict[str, Any] = {"tokens": sum(map(len, drafted.answers)),
                                    "equal": sum(a == b for a, b in zip(plain.answers, drafted.answers, strict=True)) / len(plain.answers)}
            if args.part == "ngram":
                more["copied"] = share_copied(prompts[name][0], drafted.answers[0])
            rows.append(report(name, streams, plain.speed, drafted, **more))
    return rows


def chat_tokens(engine: EngineCore, prompt: str) -> list[int]:
    assert engine.tokenizer is not None
    text = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return list(text if isinstance(text, list) else engine.tokenizer.encode(text))


def share_copied(prompt: Sequence[int], answer: Sequence[int], size: int = 4) -> float:
    """Share of the answer's tokens that lie in `size` successive tokens which the prompt has too."""
    known = {tuple(prompt[i : i + size]) for i in range(len(prompt) - size + 1)}
    copied = {at for i in range(len(answer) - size + 1) if tuple(answer[i : i + size]) in known for at in range(i, i + size)}
    return len(copied) / max(len(answer), 1)


# --- a shape with random weights -------------------------------------------------------------------------------------------------


class Scripted:
    """Proposes the tokens that the target will sample, or wrong ones, so that i drafts or more are right in the share a^i of the steps.

    The target's next token is `next` of the newest one: the embedding of token t is the output head's row of `next[t]`, so large that the
    layers change nothing. That logit is then far above all others (with H inputs, about sqrt(H) against 4), whatever rounding does.
    Which step has how many right drafts is a sequence of low discrepancy (Weyl, 1916), not chance: few steps have the exact shares.
    """

    needs_hidden = stores = False

    def __init__(self, model: Decoder, num_drafts: int, acceptance: float) -> None:
        self.num_drafts, size, device = num_drafts, model.spec.vocab_size, model.build.device
        table = model.embedding.table
        assert isinstance(table, Tensor)
        with torch.inference_mode():
            rows = model.head.dense_weight(model.spec.hidden_size, device, model.build.dtype)
            order = torch.arange(size) if model.spec.tied else torch.randperm(size, generator=torch.Generator().manual_seed(1))
            self.next = order.to(device)
            table.copy_(rows.index_select(0, self.next)).mul_(1e4)
        self.shares = torch.tensor([acceptance ** (i + 1) for i in range(num_drafts)], device=device)
        self.steps = torch.zeros(MAX_SEQS + 1, dtype=torch.int64, device=device)  # of each row

    def propose(self, x: ProposalInput) -> DraftTokens:
        steps = self.steps.index_add_(0, x.rows, torch.ones_like(x.rows))[x.rows]
        right = ((steps * 40503 + x.rows * 7919) % 65536 / 65536)[:, None] < self.shares  # 40503 / 65536: about the golden ratio
        token, tokens = x.newest, []
        for i in range(self.num_drafts):
            token = self.next[token]
            tokens.append(torch.where(right[:, i], token, (token + 1) % len(self.next)))
        return DraftTokens(torch.stack(tokens, 1))

    def store(self, x: ProposalInput) -> None:
        """See `DeviceProposer`."""


def scripted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The proposer costs almost nothing, so this measures verification alone."""
    rows: list[dict[str, Any]] = []
    all_drafts = mock.patch.object(Acceptance, "length", lambda self, num_seqs, most, cost: most)
    with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if args.adaptive else all_drafts:
        models.write_config(args.shape, Path(folder))
        for streams in args.streams:
            prompts = [[5 + i, 6, 7, 8] for i in range(streams)]
            plain = step_time = 0.0
            for rate in (None, *args.acceptance):
                engine = engine_of(folder, args, rate)
                found = measure(engine, prompts, args, streams)
                engine.close()
                if rate is None:
                    plain = found.speed
                    continue
                step_time = step_time or (1 + found.drafts.num_accepted / max(found.drafts.num_steps, 1)) / found.speed  # of the first rate
                arithmetic = sum(rate**i for i in range(args.drafts + 1)) / step_time / plain
                checked = {} if args.adaptive else {"arithmetic": arithmetic, "ratio": found.speed / plain / arithmetic}
                rows.append(report(f"{args.shape} a={rate:g}", streams, plain, found, acceptance=acceptance_of(found.drafts), **checked))
    return rows


def acceptance_of(counts: DraftCounts) -> float:
    """Share of the tested drafts that were right. A draft after a wrong one is not tested."""
    return counts.num_accepted / max(counts.num_steps + sum(counts.accepted_per_position[:-1]), 1)


def engine_of(folder: str, args: argparse.Namespace, rate: float | None) -> EngineCore:
    settings: dict[str, Any] = {"method": "draft_model", "model": "scripted", "num_speculative_tokens": args.drafts}
    config = EngineConfig(model=folder, skip_tokenizer_init=True, load_format="dummy", device=args.device, dtype=args.dtype,
                          max_model_len=1024, max_num_seqs=MAX_SEQS, speculative_config=None if rate is None else settings)
    proposer = None if rate is None else lambda model: Scripted(model, args.drafts, rate)
    return build_engine(config, DEFAULT_COMPONENTS if proposer is None else Components(proposer=proposer))


# --- the cost model --------------------------------------------------------------------------------------------------------------


def breakeven(args: argparse.Namespace) -> None:
    cost = cost_of(args.device)
    print(f"Computed, not measured: the gain that the cost model of {args.device} expects ({cost}),\n"
          f"with the number of drafts (at most {args.drafts}) that the engine's rule chooses. -: no drafts\n")
    print("acceptance  " + "".join(f"{f'{n} streams':>12}" for n in args.streams))
    for rate in args.acceptance:
        cells = []
        for n in args.streams:
            k = Acceptance(rate).length(n, args.drafts, cost) if n <= cost.most_seqs else 0
            cells.append(f"{expected_gain(rate, n, k, cost):.2f} (k={k})" if k else "-")
        print(f"{rate:10.2f}  " + "".join(f"{cell:>12}" for cell in cells))
    pays = [next((f"{a / 100:.2f}" for a in range(101) if n <= cost.most_seqs and Acceptance(a / 100).length(n, args.drafts, cost)), "-")
            for n in args.streams]
    print("pays from   " + "".join(f"{cell:>12}" for cell in pays))


# --- both measurements -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """The best of several runs."""

    speed: float  # tokens/s of the whole engine, from the first token on
    drafts: DraftCounts
    answers: list[list[int]]  # one for each prompt


def measure(engine: EngineCore, prompts: Sequence[list[int]], args: argparse.Namespace, streams: int, ends: bool = False) -> Measured:
    """Answer the prompts, `streams` at a time. ends: an answer ends where the model ends it, since what would follow is no answer."""
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=not ends, detokenize=False)
    best, clock = Measured(0.0, DraftCounts(), []), time.process_time if args.cpu_time else time.perf_counter
    for run in range(args.repeats):
        produced, seconds, drafts = 0, 0.0, DraftCounts()
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(prompts), streams):
            for i in range(start, min(start + streams, len(prompts))):
                engine.add_request(f"{run}-{i}", {"prompt_token_ids": prompts[i]}, params)
            begin, before = 0.0, 0
            while engine.has_unfinished_requests():
                for delta in engine.step():
                    answers[int(delta.request_id.partition("-")[2])].extend(delta.token_ids)
                    if delta.metrics is not None and delta.metrics.drafts is not None:
                        drafts = drafts + delta.metrics.drafts
                if not begin and any(answers[start : start + streams]):
                    begin, before = clock(), sum(map(len, answers))
            seconds += clock() - begin
            produced += sum(map(len, answers)) - before
        if produced / seconds > best.speed:
            best = Measured(produced / seconds, drafts, answers)
    return best


def report(name: str, streams: int, plain: float, found: Measured, **more: float) -> dict[str, Any]:
    counts = found.drafts
    accepted = [round(n / max(counts.num_steps, 1), 3) for n in counts.accepted_per_position]
    line = (f"{name:16} streams {streams:3}  plain {plain:9.1f} tokens/s  with drafts {found.speed:9.1f}  gain {found.speed / plain:5.2f}  "
            + "  ".join(f"{key} {value}" if isinstance(value, int) else f"{key} {value:.3f}" for key, value in more.items())
            + f"  steps with drafts {counts.num_steps}, accepted {accepted}")
    print(line, flush=True)
    return {"name": name, "streams": streams, "plain": plain, "speed": found.speed, "gain": found.speed / plain, **more,
            "steps": counts.num_steps, "accepted": accepted}


if __name__ == "__main__":
    main()
