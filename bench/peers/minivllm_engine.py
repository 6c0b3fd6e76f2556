"""minivllm in this process, with its defaults."""
from __future__ import annotations

import logging
from typing import Any

from minivllm import LLM, SamplingParams
from minivllm.benchmarks.workloads import WorkloadRequest


class _Heard(logging.Handler):
    """Keeps what the engine logs while it starts."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        heard, logger = _Heard(logging.INFO), logging.getLogger("minivllm.engine.executor")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(heard)
        try:
            self.llm = LLM(model=job["model"], dtype=job["dtype"], device=job["device"], skip_tokenizer_init=job["model"] is not None,
                           load_format=job["load_format"], **job["options"])
        finally:
            logger.removeHandler(heard)
            logger.setLevel(level)
        self.start_parts = next((line.removeprefix("started: ") for line in heard.lines if line.startswith("started: ")), None)
        self.dtype = str(self.llm.llm_engine.info().dtype)

    def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
        """-> the output tokens of each request."""
        prompts = [{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests]
        params = [SamplingParams(temperature=r.temperature, max_tokens=r.output_len, ignore_eos=True, detokenize=False) for r in requests]
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(prompts, params, use_tqdm=False)]

    def generate_with_gaps(self, requests: list[WorkloadRequest]) -> tuple[list[list[int]], None]:
        """Tokens, and no opinion on how close the second best came: that is the oracle's part."""
        return self.generate(requests), None

    def check_kernels(self) -> dict[str, Any]:
        """The chosen kernels beside the reference kernels, at full size: see bench/kernel_check.py."""
        from bench.kernel_check import check
        from minivllm.engine.executor import LocalExecutor

        executor = self.llm.llm_engine.executor
        assert isinstance(executor, LocalExecutor) and executor._runner is not None
        runner = executor._runner
        return check(runner.model, runner.kv.shape, self.generate)
