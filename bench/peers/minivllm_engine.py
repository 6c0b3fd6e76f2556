"""minivllm in this process, with its defaults."""
from __future__ import annotations

from typing import Any

from minivllm import LLM, SamplingParams
from minivllm.benchmarks.workloads import Request


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self.llm = LLM(model=job["model"], dtype=job["dtype"], device=job["device"], skip_tokenizer_init=job["model"] is not None,
                       **job["options"])
        self.dtype = str(self.llm.llm_engine.info().dtype)

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """-> the output tokens of each request."""
        prompts = [{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests]
        params = [SamplingParams(temperature=r.temperature, max_tokens=r.output_len, ignore_eos=True, detokenize=False) for r in requests]
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(prompts, params, use_tqdm=False)]

    def generate_with_gaps(self, requests: list[Request]) -> tuple[list[list[int]], None]:
        """Tokens, and no opinion on how close the second best came: that is the oracle's part."""
        return self.generate(requests), None
