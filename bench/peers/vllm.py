"""vLLM's `LLM`, with its defaults, except max_model_len: 16384, or the model's for rows with long prompts.

It pins its own torch, so it needs another environment."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minivllm.benchmarks.workloads import WorkloadRequest

MAX_MODEL_LEN = 16384


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise SystemExit(f"vLLM cannot be imported by this Python ({error}): run bench.run with one that has it, "
                             "or leave vllm out of --engines") from error
        most = json.loads((Path(job["model"]) / "config.json").read_text())["max_position_embeddings"]
        some_long = any(row.startswith("long") for row in job["rows"])
        options = {"max_model_len": most if some_long else min(MAX_MODEL_LEN, most), **job["options"]}
        self._params = SamplingParams
        self.llm = LLM(model=job["model"], dtype=job["dtype"], skip_tokenizer_init=True, load_format=job["load_format"], **options)
        self.dtype = job["dtype"]

    def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
        """-> the output tokens of each request."""
        prompts = [{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests]
        params = [self._params(temperature=r.temperature, max_tokens=r.output_len, ignore_eos=True, detokenize=False) for r in requests]
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(prompts, params, use_tqdm=False)]

    def generate_with_gaps(self, requests: list[WorkloadRequest]) -> tuple[list[list[int]], None]:
        """Tokens without gaps. Only the oracle reports gaps."""
        return self.generate(requests), None
