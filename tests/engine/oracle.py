"""HF Transformers checks greedy outputs with one forward pass per output.

A greedy output is right if each of its tokens is the most probable one after the tokens before it. So the oracle computes the logits of
prompt and output once and checks every position, instead of generating. Where the two largest logits differ by less than 1e-4, either
token is accepted (a tie). Such ties are counted.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

TIE = 1e-4


class Oracle:
    """One model in fp32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._logits = lru_cache(maxsize=32)(self._forward)
        self.num_checked = 0
        self.num_ties = 0

    def _forward(self, tokens: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            return self._model(torch.tensor([tokens])).logits[0]  # [T, vocab]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[T, vocab]: row p predicts the token at position p + 1."""
        return self._logits(tuple(tokens))

    def check_greedy(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Assert that greedy decoding gives `output` after `prompt`."""
        logits = self.logits([*prompt, *output])[len(prompt) - 1: -1]
        best = logits.topk(2).values  # [len(output), 2]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        self.num_checked += len(output)
        for i, (first, mine) in enumerate(zip(best[:, 0].tolist(), chosen.tolist(), strict=True)):
            if mine != first:
                assert first - mine < TIE, f"token {i} of the output is {output[i]}, {first - mine:.2e} below the best"
                self.num_ties += 1

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens except the first."""
        table = self.logits(tokens).log_softmax(-1)
        return table[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist()  # type: ignore[no-any-return]
