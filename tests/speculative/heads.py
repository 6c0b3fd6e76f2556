"""Tiny heads in EAGLE's published layout, and EAGLE's forward pass written down in plain PyTorch, as its oracle."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from minivllm.models.decoder import Decoder
from minivllm.speculative.base import ProposalInput
from minivllm.worker.kv_cache import KVLayout
from tests.models.paged import Paged

SIZES = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64,
         "rms_norm_eps": 1e-5, "torch_dtype": "float32"}


def write_head(folder: Path, vocabulary: list[int] | None = None, **config: Any) -> dict[str, Tensor]:
    """A random head. vocabulary: the tokens that it can propose."""
    sizes = {**SIZES, **config}
    hidden, kv = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {"fc.weight": (hidden, 2 * hidden), "layers.0.post_attention_layernorm.weight": (hidden,)}
    shapes |= {f"layers.0.self_attn.{n}_proj.weight": (kv if n in "kv" else hidden, hidden) for n in "qkvo"}
    shapes |= {f"layers.0.mlp.{n}_proj.weight": (sizes["intermediate_size"], hidden) for n in ("gate", "up")}
    shapes["layers.0.mlp.down_proj.weight"] = (hidden, sizes["intermediate_size"])
    generator = torch.Generator().manual_seed(1)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) + (len(shape) == 1) for name, shape in shapes.items()}
    stored = dict(tensors)
    if vocabulary is not None:
        stored["d2t"] = torch.tensor(vocabulary) - torch.arange(len(vocabulary))
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return tensors


def eagle_drafts(weights: dict[str, Tensor], table: Tensor, head: Tensor, hidden: Tensor, tokens: list[int], count: int,
                 vocabulary: list[int] | None = None, heads: int = 4, eps: float = 1e-5) -> list[int]:
    """Greedy drafts after `tokens` [T + 1], without any cache. hidden: [T, hidden] after the final norm, of all tokens but the newest."""
    tokens, drafts = list(tokens), []
    for _ in range(count):
        features = eagle_features(weights, table, hidden, tokens[1:], heads, eps)
        logits = features[-1] @ head.T
        best = int(logits.argmax() if vocabulary is None else torch.tensor(vocabulary)[logits[vocabulary].argmax()])
        drafts.append(best)
        tokens.append(best)
        hidden = torch.cat((hidden, features[-1:]))
    return drafts


def eagle_features(weights: dict[str, Tensor], table: Tensor, hidden: Tensor, next_tokens: list[int], heads: int, eps: float) -> Tensor:
    w = {name.removeprefix("layers.0."): t for name, t in weights.items()}
    x = F.linear(torch.cat((table[next_tokens], hidden), 1), w["fc.weight"])
    dim = x.shape[1] // heads
    q, k, v = (F.linear(x, w[f"self_attn.{n}_proj.weight"]).unflatten(1, (-1, dim)).transpose(0, 1) for n in "qkv")
    angles = torch.outer(torch.arange(len(x)).float(), 10000.0 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)

    def rotate(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * angles.cos() + torch.cat((-b, a), -1) * angles.sin()

    k, v = (t.repeat_interleave(heads // len(k), 0) for t in (rotate(k), v))
    out = F.scaled_dot_product_attention(rotate(q)[None], k[None], v[None], is_causal=True)[0]
    x = x + F.linear(out.transpose(0, 1).flatten(1), w["self_attn.o_proj.weight"])
    y = F.rms_norm(x, (len(x[0]),), w["post_attention_layernorm.weight"], eps)
    return x + F.linear(F.silu(F.linear(y, w["mlp.gate_proj.weight"])) * F.linear(y, w["mlp.up_proj.weight"]), w["mlp.down_proj.weight"])


class PagedDraft(Paged):
    """A target and the draft's layers in the same blocks. `propose` is what a runner does after a step."""

    def __init__(self, model: Decoder, draft_layers: Any, **options: Any) -> None:
        """draft_layers: the `ModelSpec` of the draft."""
        super().__init__(model, **options)
        layout = KVLayout.of(model.spec, self.block_size, model.build.dtype, draft=draft_layers)
        num_blocks = self.kv[0].k.shape[0]
        self.kv = layout.views(layout.allocate(num_blocks, model.build.device))
        for layer in self.kv:
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)

    def propose(self, proposer: Any, *work: tuple[int, list[int]], newest: list[int], kept: list[int] | None = None,
                next_of: dict[int, list[int]] | None = None, stores: bool = False) -> list[list[int]]:
        """One step over `work`, then drafts. newest: the token after each sequence's last kept one. kept: how many of its tokens are kept.

        next_of: a prompt's further tokens, for chunks. stores: no drafts, keys and values only."""
        before = [len(self.tokens[s]) for s, _ in work]
        batch = self.batch(work)
        hidden = self.model.forward(batch, self.kv, self.block_size)
        kept = kept or [len(tokens) for _, tokens in work]
        next_tokens, last = [], []
        for (_, tokens), count, token in zip(work, kept, newest, strict=True):
            last.append(len(next_tokens) + count - 1)
            next_tokens += [*tokens[1:count], token, *([0] * (len(tokens) - count))]
        for (s, tokens), count, start in zip(work, kept, before, strict=True):
            self.tokens[s] = self.tokens[s][: start + count]
            assert len(tokens) >= count
        width = -(-(max(batch.seq_lens_host) + proposer.num_drafts + 1) // self.block_size)
        tables = tuple(torch.tensor([table[s][:width] for s, _ in work], dtype=torch.int32) for table in self.tables)
        lengths = torch.tensor([start + count + 1 for start, count in zip(before, kept, strict=True)])
        x = ProposalInput(replace(batch, block_tables=tables), torch.tensor(next_tokens), torch.tensor(last), torch.tensor(newest), lengths,
                          hidden, self.kv, self.block_size, torch.zeros(len(work)), torch.zeros(len(work), dtype=torch.int64),
                          torch.zeros((1, 2), dtype=torch.int32), torch.zeros(len(work), dtype=torch.int64))
        if stores:
            proposer.store(x)
            return []
        return list(proposer.propose(x).tokens.tolist())
