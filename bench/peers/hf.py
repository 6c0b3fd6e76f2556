"""Hugging Face Transformers' `generate`: a static batch, padded on the left. It runs until its longest output is complete."""
from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from minivllm.benchmarks.workloads import WorkloadRequest


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        dtype = getattr(torch, job["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa").to(job["device"]).eval()
        self.model.generation_config.eos_token_id = None  # lengths are exact
        self.device, self.dtype = job["device"], job["dtype"]

    def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
        """-> the output tokens of each request. A static batch computes more tokens for the shorter ones; these are cut off."""
        return self._run(requests, scores=False)[0]

    def generate_with_gaps(self, requests: list[WorkloadRequest]) -> tuple[list[list[int]], list[list[float]]]:
        """One request at a time, without padding. gaps: best minus second best logit at each token."""
        tokens, gaps = [], []
        for request in requests:
            t, g = self._run([request], scores=True)
            tokens += t
            gaps += g
        return tokens, gaps

    @torch.inference_mode()
    def _run(self, requests: list[WorkloadRequest], scores: bool) -> tuple[list[list[int]], list[list[float]]]:
        longest = max(len(r.prompt_token_ids) for r in requests)
        steps = max(r.output_len for r in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, request in enumerate(requests):
            ids[i, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[i, longest - len(request.prompt_token_ids) :] = 1
        temperature = requests[0].temperature
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {
            "do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        out = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0,
            return_dict_in_generate=True, output_logits=scores, **sampling,
        )
        tokens = [row[: r.output_len] for row, r in zip(out.sequences[:, longest:].tolist(), requests, strict=True)]
        gaps: list[list[float]] = []
        if scores:
            best = torch.stack(out.logits, 1).float().topk(2, -1).values  # [B, steps, 2]
            gaps = (best[..., 0] - best[..., 1]).tolist()
        return tokens, gaps
