"""The life of a request, printed: two requests on the default model, from the messages to the last block that is freed.

    python -m bench.life            # all parts
    python -m bench.life --write    # puts them into docs/life_of_a_request.md, each below its mark: <!-- life: NAME -->

Settings are small, so that a short prompt shows everything: blocks of 16 tokens, and a token budget of 32 per step. The second request
arrives while the first one runs, and begins with the same tokens. Greedy tokens are printed, and no times: each token leads
by more than 1 in log-probability, so the output is the same on every machine.
"""
from __future__ import annotations

import argparse
import json
import re
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult
from minivllm.core.trace import Arrival, Planned, Updated, read
from minivllm.engine.assemble import OutputBuilder
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.engine.prompts import prepare_request
from minivllm.engine.tokenizer import Tokenizer
from minivllm.kernels.layout import InputBatch
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.worker.model_runner import EagerStep, LaunchedStep
from minivllm.worker.worker import Worker

PAGE = Path(__file__).resolve().parents[1] / "docs" / "life_of_a_request.md"
MARK = re.compile(r"(<!-- life: (\w+) -->\n\n```text\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
QUESTION = "Answer in one short sentence. What is the capital of {}?"
QUESTIONS = {"a": QUESTION.format("France"), "b": QUESTION.format("England")}
ARRIVALS = {0: "a", 3: "b"}  # before which step each request is added
CONFIG = EngineConfig(
    device="cpu", dtype="float32", block_size=16, max_num_batched_tokens=32, num_gpu_blocks_override=16, max_model_len=160)
PARAMS = SamplingParams(temperature=0.0, max_tokens=10)


class Life:
    """One run of the two requests, and everything about it that is printed."""

    def __init__(self, trace: Path) -> None:
        self._core = build_engine(EngineConfig(**{**CONFIG.__dict__, "trace": str(trace)}))
        assert isinstance(self._core.executor, Worker) and self._core.tokenizer is not None
        self.tokenizer: Tokenizer = self._core.tokenizer
        self.batches: dict[int, InputBatch] = {}  # by step
        self.texts: dict[str, str] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.deltas: dict[tuple[int, str], str] = {}  # (step, request) -> new text
        self._watch_batches(self._core.executor)
        self._run()
        self.free = self._core.scheduler.stats()
        self._core.close()
        self.events = read(trace).events
        self.lines = trace.read_text(encoding="utf-8").splitlines()

    def _watch_batches(self, worker: Worker) -> None:
        launch = worker.launch

        def watched(plan: StepPlan) -> LaunchedStep:
            launched = launch(plan)
            if isinstance(launched.work, EagerStep):
                self.batches[plan.step_id] = launched.work.packed.batch
            return launched

        worker.launch = watched  # type: ignore[method-assign]

    def _run(self) -> None:
        builders = dict[str, OutputBuilder]()
        step = 0
        while step == 0 or self._core.has_unfinished_requests():
            if step in ARRIVALS:
                builders[ARRIVALS[step]] = self._add(self._core, ARRIVALS[step])
            for delta in self._core.step():
                self.deltas[step, delta.request_id] = delta.text
                if builders[delta.request_id].add(delta):
                    self.outputs[delta.request_id] = builders[delta.request_id].output
            step += 1

    def _add(self, core: EngineCore, name: str) -> OutputBuilder:
        self.texts[name] = str(self.tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[name]}], tokenize=False))
        text, request = prepare_request(name, self.texts[name], PARAMS, self.tokenizer, core.max_model_len)
        core.add(request)
        return OutputBuilder(name, text, request, self.tokenizer)

    # -- what is printed ----------------------------------------------------------------------------------------------

    def prompt(self) -> Iterator[str]:
        """The chat template's text, and its token ids: one line per KV block."""
        yield from self.texts["a"].splitlines()
        ids = self.outputs["a"].prompt_token_ids
        yield f"\n{len(ids)} tokens:"
        for i in range(0, len(ids), CONFIG.block_size):
            yield " ".join(map(str, ids[i:i + CONFIG.block_size]))

    def request(self) -> Iterator[str]:
        """The request that goes to the scheduler, without the fields that have their defaults."""
        new = next(event.new for event in self.events if isinstance(event, Arrival))
        yield f"request_id        {new.request_id!r}"
        yield f"prompt_token_ids  {len(new.prompt_token_ids)} tokens"
        params = ", ".join(f"{name}={getattr(new.params, name)!r}" for name in ("temperature", "max_tokens", "n", "stop"))
        yield f"params            {params}"
        yield f"priority          {new.priority}"
        yield f"cache_salt        {new.cache_salt!r}"

    def steps(self) -> Iterator[str]:
        """Every plan, one line per scheduled sequence, with what came of it."""
        yield "step  sequence  row  start  tokens  new blocks    sampled             text"
        results = {event.plan.step_id: event.result for event in self.events if isinstance(event, Updated)}
        for event in self.events:
            if isinstance(event, Planned) and event.plan is not None:
                yield from self._plan(event.plan, results[event.plan.step_id])

    def _plan(self, plan: StepPlan, result: StepResult) -> Iterator[str]:
        sampled = dict(zip(plan.sample_from, result.token_ids, strict=True))
        admitted = {admission.request_id: admission.block_ids[0] for admission in plan.admitted}
        for i, name in enumerate(plan.request_ids):
            blocks = " ".join(map(str, admitted.get(name) or plan.new_blocks[i][0])) + ("  (row)" if name in admitted else "")
            token = sampled.get(i, (None,))[0]
            piece = "" if token is None else f"{token:5} {self.tokenizer.decode([token])!r}"
            text = self.deltas.get((plan.step_id, name), "")
            yield (f"{plan.step_id:4}  {name:8}  {plan.rows[i]:3}  {plan.starts[i]:5}  {plan.num_tokens[i]:6}  {blocks:12}  {piece:18}  "
                   f"{repr(text) if token is not None else ''}").rstrip()

    def batch(self) -> Iterator[str]:
        """The tensors of the first step with both requests: a decode and a prompt chunk."""
        step, batch = next((step, batch) for step, batch in self.batches.items() if len(batch.query_lens_host) == 2)
        yield f"step {step}: {batch.num_tokens} tokens of {len(batch.query_lens_host)} sequences, of which {batch.num_decodes} is a decode"
        for name in ("tokens", "positions", "query_start", "seq_lens", "logit_rows"):
            yield f"{name:12} {_shown(getattr(batch, name).tolist())}"
        yield f"{'slots':12} {_shown(batch.slots[0].tolist())}"
        yield f"{'block table':12} " + f"\n{'':13}".join(_shown(row) for row in batch.block_tables[0].tolist())

    def plan_line(self) -> Iterator[str]:
        """The line of the trace with the plan of the first decode, without its time, and broken into shorter lines."""
        line = next(line for line in self.lines if '"event":"plan"' in line and json.loads(line)["plan"]["num_tokens"] == [1])
        pieces = re.sub(r'"now":[^,]*,', "", line).split(',"')
        yield from textwrap.wrap(', "'.join(pieces), 120)

    def output(self) -> Iterator[str]:
        for name, output in self.outputs.items():
            answer = output.outputs[0]
            yield (f"{name}: {answer.text!r}, finish_reason {answer.finish_reason!r}, {len(output.prompt_token_ids)} prompt tokens, "
                   f"{output.num_cached_tokens} of them cached, {len(answer.token_ids)} output tokens")
        stats = self.free
        yield f"blocks: {stats.num_blocks}, used: {stats.num_used_blocks}, free with cached content: {stats.num_cached_blocks}"

    def parts(self) -> dict[str, str]:
        return {part.__name__: "\n".join(part()) + "\n" for part in (
            self.prompt, self.request, self.steps, self.plan_line, self.batch, self.output)}


def _shown(values: list[int]) -> str:
    """A row of numbers, shortened in its middle."""
    words = list(map(str, values))
    return " ".join(words if len(words) <= 22 else [*words[:14], "...", *words[-4:]])


def record() -> dict[str, str]:
    """Run both requests. Returns the parts of the page by name."""
    with tempfile.TemporaryDirectory() as folder:
        return Life(Path(folder) / "trace.jsonl").parts()


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with these parts below their marks."""
    return MARK.sub(lambda mark: mark[1] + parts[mark[2]] + mark[4], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the parts into docs/life_of_a_request.md")
    args = parser.parse_args()
    parts = record()
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")
    else:
        print("\n".join(f"== {name}\n\n{text}" for name, text in parts.items()))


if __name__ == "__main__":
    main()
