"""What the target generates, with its hidden states: the data that drafts are trained on.

A small batched loop over the engine's own decoder and kernels, without a scheduler: all sequences of a batch start together, and each
keeps its blocks to the end. So every hidden state that a draft is trained with is one that the engine computes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.models.decoder import Decoder

BLOCK = 16  # tokens of a KV block


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt and its answer: T tokens."""

    tokens: Tensor  # [T] int64 on the CPU, without the last token, which has no hidden state
    hidden: Tensor  # [T, hidden], before the final norm, in the model's dtype, on the CPU
    targets: Tensor  # [T] int64: the target's most probable next token at each position
    prompt_len: int


class _Cache:
    """Blocks for a batch of sequences: those of sequence b are consecutive."""

    def __init__(self, model: Decoder, num_seqs: int, capacity: int) -> None:
        """capacity: tokens of a sequence."""
        build = model.build
        self._per_seq = -(-capacity // BLOCK)
        self._device, self._num_groups = build.device, len(model.groups)
        self.layers = []
        for layer in model.spec.layers:
            a = layer.attention
            shape = (1 + num_seqs * self._per_seq, BLOCK, a.num_kv_heads, a.head_dim)
            self.layers.append(KVLayer(*(torch.zeros(shape, dtype=build.dtype, device=build.device) for _ in range(2))))

    def batch(self, seqs: Sequence[int], tokens: Tensor, starts: Sequence[int], lens: Sequence[int]) -> InputBatch:
        """The next `lens` tokens of some sequences, from `starts` on. tokens: [T] on the device."""
        ids, first, count = (np.array(x, np.int64) for x in (seqs, starts, lens))
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lens, strict=True)])
        base = np.repeat(1 + ids * self._per_seq, count)
        slots = self._put((base + positions // BLOCK) * BLOCK + positions % BLOCK)
        ends = first + count
        width = -(-int(ends.max()) // BLOCK)
        table = self._put((1 + ids[:, None] * self._per_seq + np.arange(width)).astype(np.int32))
        return InputBatch(
            tokens=tokens.to(torch.int32), positions=self._put(positions), seq_lens=self._put(ends.astype(np.int32)),
            query_start=self._put(np.concatenate([[0], count.cumsum()]).astype(np.int32)), slots=(slots,) * self._num_groups,
            block_tables=(table,) * self._num_groups, logit_rows=self._put(count.cumsum() - 1),
            num_decodes=len(ids) if max(lens) == 1 else 0, query_lens_host=tuple(lens), seq_lens_host=tuple(ends.tolist()))

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


@torch.inference_mode()
def generate(model: Decoder, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: Sequence[float], stop: Sequence[int],
             batch_size: int = 32, seed: int = 0, progress: Callable[[int], object] = lambda tokens: None) -> Iterator[Generation]:
    """Answer each prompt with at most `max_tokens` tokens. temperature: of each prompt. stop: the tokens that end an answer.

    progress: called with the number of tokens of each step.
    """
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        yield from _Batch(model, prompts[part], temperature[part], max_tokens, stop, seed + start).run(progress)


class _Batch:
    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], temperature: Sequence[float], max_tokens: int, stop: Sequence[int],
                 seed: int) -> None:
        self._model, self._stop, self._seed, self._max_tokens = model, set(stop), seed, max_tokens
        self._prompts = [list(prompt) for prompt in prompts]
        self._temperature = torch.tensor(temperature, dtype=torch.float32, device=model.build.device)
        self._cache = _Cache(model, len(prompts), max(map(len, self._prompts)) + max_tokens)
        self._tokens = [list(prompt) for prompt in prompts]
        self._hidden: list[list[Tensor]] = [[] for _ in prompts]
        self._targets: list[list[Tensor]] = [[] for _ in prompts]

    def run(self, progress: Callable[[int], object]) -> Iterator[Generation]:
        live = list(range(len(self._prompts)))
        flat = torch.tensor([t for prompt in self._prompts for t in prompt], device=self._model.build.device)
        sampled = self._step(live, flat, [0] * len(live), [len(prompt) for prompt in self._prompts])
        progress(len(flat))
        for _ in range(self._max_tokens - 1):
            for seq, token in zip(live, sampled.tolist(), strict=True):
                self._tokens[seq].append(token)
            kept = [i for i, seq in enumerate(live) if self._tokens[seq][-1] not in self._stop]
            sampled, live = sampled[kept], [live[i] for i in kept]
            if not live:
                break
            sampled = self._step(live, sampled, [len(self._tokens[seq]) - 1 for seq in live], [1] * len(live))
            progress(len(live))
        for tokens, hidden, targets, prompt in zip(self._tokens, self._hidden, self._targets, self._prompts, strict=True):
            states = torch.cat(hidden)
            yield Generation(torch.tensor(tokens[: len(states)]), states, torch.cat(targets), len(prompt))

    def _step(self, seqs: list[int], tokens: Tensor, starts: list[int], lens: list[int]) -> Tensor:
        """-> the sampled token of each sequence: [B]."""
        model, batch = self._model, self._cache.batch(seqs, tokens, starts, lens)
        hidden = model.forward(batch, self._cache.layers, BLOCK)
        last = hidden if max(lens) == 1 else hidden[batch.logit_rows]
        logits = model.logits(last, dtype=None)
        targets = logits.argmax(-1)
        keys = torch.tensor([[self._seed + seq, start] for seq, start in zip(seqs, starts, strict=True)], dtype=torch.int32,
                            device=logits.device)
        sampled = model.build.ops.sample(logits, self._temperature[seqs], keys)
        if max(lens) > 1:  # the prompt's own positions
            targets = torch.cat([model.logits(part, dtype=None).argmax(-1) for part in hidden.split(256)])
        for seq, some, best in zip(seqs, hidden.to("cpu").split(lens), targets.to("cpu").split(lens), strict=True):
            self._hidden[seq].append(some)
            self._targets[seq].append(best)
        return sampled
