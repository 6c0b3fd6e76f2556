"""minivllm in this process, with its defaults."""
from __future__ import annotations

import logging
from typing import Any

from minivllm import LLM, SamplingParams
from minivllm.benchmarks.workloads import WorkloadRequest


class _LogCollector(logging.Handler):
    """Keeps the engine's log messages while it starts."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        collector, logger = _LogCollector(logging.INFO), logging.getLogger("minivllm.engine.compose")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(collector)
        try:
            self.llm = LLM(model=job["model"], dtype=job["dtype"], device=job["device"], skip_tokenizer_init=job["model"] is not None,
                           load_format=job["load_format"], **job["options"])
        finally:
            logger.removeHandler(collector)
            logger.setLevel(level)
        self.start_parts = next((line.removeprefix("started: ") for line in collector.lines if line.startswith("started: ")), None)
        self.dtype = str(self.llm.llm_engine.info().dtype)

    def finish_start(self) -> None:
        """Capture the CUDA graphs that the start has left for later, so that no row waits for one."""
        while self.llm.llm_engine.core.prepare_ahead():
            pass

    def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
        """-> the output tokens of each request."""
        prompts = [{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests]
        params = [SamplingParams(temperature=r.temperature, max_tokens=r.output_len, ignore_eos=True, detokenize=False) for r in requests]
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(prompts, params, use_tqdm=False)]

    def generate_with_gaps(self, requests: list[WorkloadRequest]) -> tuple[list[list[int]], None]:
        """Tokens without gaps. Only the oracle reports gaps."""
        return self.generate(requests), None

    def check_kernels(self) -> dict[str, Any]:
        """Compare the engine's kernels with the reference kernels, at full size: see bench/kernel_check.py."""
        from bench.kernel_check import check
        from minivllm.worker.ranks import LeadingWorker
        from minivllm.worker.worker import Worker

        executor = self.llm.llm_engine.core.executor
        if isinstance(executor, LeadingWorker):  # a step outside of plans would wait for the other ranks
            return {"not_compared": "tensor-parallel ranks; tests/parallel/test_gpu.py compares their tokens with those of one"}
        assert isinstance(executor, Worker)
        return check(executor.runner.model, executor.runner.kv.layout, self.generate)
