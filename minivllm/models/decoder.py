"""The one decoder. All families share this code and differ only in their specifications (minivllm/families).

    tokens -> embedding -> x [ + attention(norm(x)) ] [ + mlp(norm(x)) ] ... -> (needed rows) -> norm -> logits
                           '------------- a layer ---------------------'

The batch and the KV cache are arguments of each call. The model itself never changes.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from minivllm.families import KVGroup, ModelSpec, MoESpec, RopeSpec, expert_specs, kv_groups, linear_specs
from minivllm.families.modules import NORMS
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.attention import Attention, LastTokens, StepContext
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.embedding import Embedding
from minivllm.layers.latent_attention import LatentAttention, attention_ops
from minivllm.layers.linear import Linear
from minivllm.layers.mlp import MLP
from minivllm.layers.moe import MoE
from minivllm.layers.norm import Norm, load_norm
from minivllm.layers.rope import RotaryEmbedding
from minivllm.models.streaming import DecoderLayer, StreamedLayer, WeightStream


class LanguageModel(Protocol):
    """What a worker runs: `Decoder`, or `TransformersModel`."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def build(self) -> BuildContext: ...
    @property
    def groups(self) -> tuple[KVGroup, ...]: ...
    def without_repetition(self) -> LanguageModel: ...
    def forward(self, batch: InputBatch, kv: Sequence[KVLayer], block_size: int) -> Tensor: ...
    def final_hidden(self, hidden: Tensor) -> Tensor: ...
    def settle(self) -> None: ...
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor: ...


class PreNormLayer:
    """x + attention(norm(x)), then the same with the MLP. Attention and MLP each apply their norms of inputs and of outputs."""

    __slots__ = ("attention", "index", "mlp")

    def __init__(self, index: int, attention: Attention | LatentAttention, mlp: MLP | MoE) -> None:
        self.index, self.attention, self.mlp = index, attention, mlp

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        """x: [T, hidden] -> the same shape; x may be overwritten. With `last`, only the rows of its tokens: [B, hidden]."""
        return self.mlp(self.attention(x, step, kv, last), (step if last is None else last.step).lora)


class PostNormLayer:
    """norm(x + attention(x)), then the same with the MLP: OPT-350m's order."""

    __slots__ = ("attention", "attn_norm", "index", "mlp", "mlp_norm")

    def __init__(self, index: int, attention: Attention | LatentAttention, mlp: MLP | MoE, attn_norm: Norm, mlp_norm: Norm) -> None:
        self.index, self.attention, self.mlp, self.attn_norm, self.mlp_norm = index, attention, mlp, attn_norm, mlp_norm

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        x = self.attn_norm(self.attention(x, step, kv, last))
        return self.mlp_norm(self.mlp(x, (step if last is None else last.step).lora))


class ParallelLayer:
    """x + attention(norm(x)) + mlp(norm(x)), with one norm or two (GPT-J; GPT-NeoX, Black et al. 2022)."""

    __slots__ = ("attention", "attn_norm", "index", "mlp", "mlp_norm")

    def __init__(self, index: int, attention: Attention, mlp: MLP, attn_norm: Norm, mlp_norm: Norm | None) -> None:
        """mlp_norm: None if it is attn_norm."""
        self.index, self.attention, self.mlp, self.attn_norm, self.mlp_norm = index, attention, mlp, attn_norm, mlp_norm

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        normed = self.attn_norm(x)
        inner, lora = normed if self.mlp_norm is None else self.mlp_norm(x), step.lora
        if last is not None:
            inner, lora = inner.index_select(0, last.rows), last.step.lora
        inner = self.mlp.up(inner, lora=lora)  # before attention, which overwrites x
        return self.mlp.down(inner, residual=self.attention(x, step, kv, last, normed), lora=lora)


class Decoder:
    """A decoder-only transformer over a paged KV cache."""

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, stream: WeightStream | None = None) -> None:
        """stream: of the layers whose weights stay in host memory."""
        self.spec, self.build, self._stream = spec, build, stream
        self.groups = kv_groups(spec)
        group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        linears, experts = linear_specs(spec), expert_specs(spec)
        ropes: dict[tuple[RopeSpec | None, int], int] = {}  # each different rotary embedding -> its index
        self.embedding = Embedding(spec, build, take, linears)
        self.layers: list[DecoderLayer] = []
        for i, layer in enumerate(spec.layers):
            a = layer.attention
            rope = ropes.setdefault((a.rope, a.head_dim if a.latent is None else a.latent.rope_dim), len(ropes))
            norms = {name: load_norm(build, take, spec, f"layers.{i}.{name}") for name in NORMS[layer.block]}
            before = {} if layer.block in ("post", "parallel", "parallel_one_norm") else norms
            attention = (Attention if a.latent is None else LatentAttention)(
                spec, build, take, linears, i, group_of[i], rope, before.get("attn_norm"), before.get("attn_out_norm"))
            half = (build, take, linears, i, before.get("mlp_norm"), before.get("mlp_out_norm"))
            mlp = MoE(layer.mlp, *half, experts) if isinstance(layer.mlp, MoESpec) else MLP(layer.mlp, *half)
            built: DecoderLayer = PreNormLayer(i, attention, mlp)
            if layer.block == "post":
                built = PostNormLayer(i, attention, mlp, norms["attn_norm"], norms["mlp_norm"])
            elif not before:
                assert isinstance(mlp, MLP) and isinstance(attention, Attention)
                built = ParallelLayer(i, attention, mlp, norms["attn_norm"], norms.get("mlp_norm"))
            self.layers.append(built if stream is None else stream.add(built))
        self.ropes = [None if rope is None else RotaryEmbedding(build, rope, head_dim, spec.max_model_len) for rope, head_dim in ropes]
        # A power of two changes no digit of the final norm's weights, so it costs nothing there.
        fold = spec.logit_scale if spec.final_norm and spec.norm_affine and math.frexp(spec.logit_scale)[0] == 0.5 else 1.0
        self._fold, self._logit_scale, self._softcap = fold, spec.logit_scale / fold, spec.logit_softcap
        norm = load_norm(build, take, spec, "norm", fold) if spec.final_norm else None
        self.project_out: Linear | None = None
        if spec.embed_size != spec.hidden_size:
            self.project_out, norm = Linear.load(build, take, linears["project_out"], norm=norm), None
        if spec.tied:
            self.head = Linear.of_table(build, self.embedding.table, spec.vocab_size, norm=norm)
        else:
            self.head = Linear.load(build, take, linears["head"], norm=norm, gathered=spec.vocab_size)
        if stream is not None:
            stream.start((self.embedding, self.project_out, self.head, *(x for x in self.layers if not isinstance(x, StreamedLayer))))

    def without_repetition(self) -> Decoder:
        """A model with few layers that runs every kernel that the whole model runs.

        It has one layer of each kind that comes before other layers, and the last one: only that one may compute a part of the tokens.
        """
        few, linears = copy(self), linear_specs(self.spec)
        chosen: dict[object, DecoderLayer] = {}
        for layer in self.layers[:-1]:
            methods = tuple(self.build.method(linear) for name, linear in linears.items() if name.startswith(f"layers.{layer.index}."))
            chosen.setdefault((self.spec.layers[layer.index], layer.attention.group, methods), layer)
        few.layers = [*chosen.values(), self.layers[-1]]
        return few

    @torch.inference_mode()
    def forward(self, batch: InputBatch, kv: Sequence[KVLayer], block_size: int) -> Tensor:
        """-> hidden states before the final norm: [T, hidden], or [B, hidden] if `batch.last_only`.

        kv[i]: the cache of layer i. With `last_only` the last layer stores the keys and values of all tokens, but computes queries,
        attention and MLP only for each sequence's last token: no later layer needs its other outputs.
        """
        step, last = self._prepare(batch, kv, block_size), None
        if batch.last_only:
            rows, tail = batch.last_tokens()
            last = LastTokens(rows, self._prepare(tail, kv, block_size, only=self.layers[-1].attention.group))
        x = self.embedding(batch)
        for layer in self.layers[:-1]:
            x = layer(x, step, kv[layer.index])
        return self.layers[-1](x, step, kv[self.layers[-1].index], last)

    def settle(self) -> None:
        """Call this at the end of a step that is captured, and before its replay. See `models/streaming.py`."""
        if self._stream is not None:
            self._stream.settle()

    @torch.inference_mode()
    def final_hidden(self, hidden: Tensor) -> Tensor:
        """hidden: [L, hidden] of `forward` -> [L, embed_size] after the final norm and the output projection: Transformers' last states."""
        if self.project_out is not None:
            return self.project_out(hidden)
        norm = self.head.norm
        normed = hidden if norm is None else norm(hidden)
        return normed if self._fold == 1.0 else normed / self._fold

    @torch.inference_mode()
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """hidden: [L, hidden] of `forward`, only the needed rows -> [L, vocab] in `dtype`; None: in the dtype of the output head."""
        logits = self.head(hidden if self.project_out is None else self.project_out(hidden))
        if dtype is not None:
            logits = logits.to(dtype)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _prepare(self, batch: InputBatch, kv: Sequence[KVLayer], block_size: int, only: int | None = None) -> StepContext:
        """only: prepare attention for this KV group alone."""
        metas = tuple(
            None if only not in (None, g) else attention_ops(self.build, group.latent).prepare_attention(
                batch, g, block_size=block_size, num_heads=group.num_heads, num_kv_heads=group.kv_heads, head_dim=group.head_dim,
                window=group.window, dtype=self.build.dtype, cache_dtype=kv[group.layers[0]].k.dtype,
            )
            for g, group in enumerate(self.groups)
        )
        adapters, lora = self.build.adapters, None
        if adapters is not None and batch.adapter_slots is not None:
            lora = self.build.ops.prepare_lora(batch.adapter_slots, adapters.ranks)
        return StepContext(tuple(None if rope is None else rope(batch.positions) for rope in self.ropes), batch.slots, metas, lora)
