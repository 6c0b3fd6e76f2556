"""Token ids -> the first hidden states."""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.families import LinearSpec, ModelSpec, embedding_spec
from minivllm.kernels.layout import InputBatch
from minivllm.layers.build import BuildContext, Take, stored_tensors
from minivllm.layers.linear import Linear
from minivllm.layers.norm import load_norm
from minivllm.quantization.base import Matmul
from minivllm.quantization.dense import DENSE


class Embedding:
    """A table lookup, perhaps with a factor or a norm. OPT adds a projection to the hidden size and a learned vector per position.

    A tensor-parallel rank has the rows of some tokens. It looks these up, has zeros for all others, and the ranks' vectors are summed.
    """

    __slots__ = ("_dtype", "_group", "_num_rows", "_scale", "norm", "positions", "project", "table")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, linears: Mapping[str, LinearSpec]) -> None:
        self._dtype, self._group, self._num_rows = build.dtype, build.group, spec.vocab_rows
        method, tensors = stored_tensors(embedding_spec(spec), build, take)
        # A plain table stays [vocab, embed_size]. The output head may need the same weight in another layout.
        self.table: Tensor | Matmul = tensors["weight"] if method is DENSE else method.build(tensors, (spec.vocab_rows,), build.ops)
        self.project = Linear.load(build, take, linears["project_in"]) if spec.embed_size != spec.hidden_size else None
        self.positions = take("positions.weight")[spec.position_offset :] if spec.learned_positions else None
        self.norm = load_norm(build, take, spec, "embed_norm") if spec.embed_norm else None
        self._scale = torch.tensor(spec.embed_scale, dtype=build.dtype).item()

    def __call__(self, batch: InputBatch) -> Tensor:
        """-> [T, hidden], freshly allocated."""
        x = self.rows(batch.tokens)
        if self._scale != 1.0:
            x.mul_(self._scale)
        if self.norm is not None:
            x = self.norm(x)
        if self.project is not None:
            x = self.project(x)
        return x if self.positions is None else x + F.embedding(batch.positions, self.positions)

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows of the table: tokens [T] -> [T, embed_size], freshly allocated."""
        if self._group.size == 1:
            return self._lookup(tokens)
        tokens = tokens - self._group.rank * self._num_rows
        elsewhere = (tokens < 0) | (tokens >= self._num_rows)
        return self._group.all_reduce(self._lookup(tokens.masked_fill(elsewhere, 0)).masked_fill_(elsewhere[:, None], 0))

    def _lookup(self, tokens: Tensor) -> Tensor:
        table = self.table
        return F.embedding(tokens, table) if isinstance(table, Tensor) else table.rows(tokens, self._dtype)
