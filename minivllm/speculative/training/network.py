"""The trainable head, in plain PyTorch: EAGLE's architecture (Li et al. 2024) with the tensor names of its published checkpoints.

    position p:   embedding of token p + 1 ─┐
                  hidden state of p ────────┴▶ fc ─▶ x ─▶ x + attention(x) ─▶ x + mlp(norm(x)) ─▶ feature ─▶ logits of token p + 2

The feature stands for the hidden state of position p + 1, so the same network continues with token p + 2, and so on. Hidden states are
those of the target after its final norm. The embedding table and the output head are the target's own, and stay as they are.

Training unrolls `steps` of this for every position p at once, with the target's tokens, as drafting will (EAGLE-3's training-time test,
Li et al. 2025). In step j a query sees the keys of the first step up to p, which are made from true hidden states, and those that its own
draft has made since.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSize:
    """Sizes of the head's decoder layer: those of the target's layers."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    eps: float  # of the norm


class HeadNetwork(nn.Module):
    """The parameters of a head, by EAGLE's names."""

    def __init__(self, size: HeadSize, inv_freq: Tensor) -> None:
        """inv_freq: of the rotary embedding, [head_dim / 2]."""
        super().__init__()
        self.size = size
        hidden, q, kv = size.hidden, size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
        shapes = {"self_attn": {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)},
                  "mlp": {"gate_proj": (hidden, size.intermediate), "up_proj": (hidden, size.intermediate),
                          "down_proj": (size.intermediate, hidden)}}
        layer = nn.ModuleDict({part: nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in linears.items()})
                               for part, linears in shapes.items()})
        layer["post_attention_layernorm"] = nn.RMSNorm(hidden, eps=size.eps)
        self.fc, self.layers = nn.Linear(2 * hidden, hidden, bias=False), nn.ModuleList([layer])
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)

    def unroll(self, hidden: Tensor, embedded: Tensor, steps: int) -> list[Tensor]:
        """hidden, embedded: [B, T, hidden] of positions p and tokens p + 1 -> the feature of each step: [B, T - j, hidden].

        Step j at position p has read tokens up to p + 1 + j, so its feature predicts token p + 2 + j.
        """
        length, features, x = hidden.shape[1], [], hidden
        own: list[tuple[Tensor, Tensor]] = []  # keys and values of each step
        for j in range(steps):
            used = length - j
            x = self.fc(torch.cat((embedded[:, j:], x[:, :used]), dim=-1))
            q, k, v = self._heads(x, first=j)
            own.append((k, v))
            x = x + self.part("self_attn")["o_proj"](self._attend(q, own, used))
            x = x + self.part("mlp")["down_proj"](self.gated(x))
            features.append(x)
        return features

    def attend(self, x: Tensor) -> Tensor:
        """The outputs of all heads in the first step: x [B, T, hidden] after fc -> [B, T, heads * head_dim]."""
        q, k, v = self._heads(x, first=0)
        return self._attend(q, [(k, v)], x.shape[1])

    def gated(self, x: Tensor) -> Tensor:
        """The inner activations of the MLP: [..., intermediate]."""
        mlp, x = self.part("mlp"), self.part("post_attention_layernorm")(x)
        return F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x)

    def _heads(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of positions from `first` on: [B, heads, T, D] each, keys repeated for their queries."""
        size, attention = self.size, self.part("self_attn")
        cos, sin = self._rotation(first, x.shape[1])
        q, k, v = (attention[f"{name}_proj"](x).unflatten(-1, (-1, size.head_dim)).transpose(1, 2) for name in "qkv")
        groups = size.num_heads // size.num_kv_heads
        k, v = (t.repeat_interleave(groups, dim=1) for t in (_rotate(k, cos, sin), v))
        return _rotate(q, cos, sin), k, v

    def _attend(self, q: Tensor, own: list[tuple[Tensor, Tensor]], used: int) -> Tensor:
        """Causal attention to the keys of the first step, and to the one key that each later step made for the same draft."""
        scale = self.size.head_dim**-0.5
        k, v = (t[:, :, :used] for t in own[0])
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(
            torch.ones(used, used, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        later = [((q * k[:, :, :used]).sum(-1, keepdim=True) * scale) for k, _ in own[1:]]
        weights = torch.cat([scores, *later], dim=-1).softmax(-1)
        out = weights[..., :used] @ v
        for i, (_, v) in enumerate(own[1:]):
            out = out + weights[..., used + i : used + i + 1] * v[:, :, :used]
        return out.transpose(1, 2).flatten(2)

    def part(self, name: str) -> Any:
        """A part of the decoder layer."""
        return self.layers[0][name]  # type: ignore[index]

    def _rotation(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + count, device=self.inv_freq.device)
        angles = torch.outer(positions.float(), self.inv_freq).repeat(1, 2)
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., T, D]; the rotation pairs dimension d with d + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
