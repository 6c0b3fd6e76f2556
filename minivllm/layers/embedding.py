"""Token ids -> the first hidden states."""
from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from minivllm.families import LinearSpec, ModelSpec
from minivllm.kernels.layout import InputBatch
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.linear import Linear


class Embedding:
    """A table lookup. OPT adds a projection to the hidden size and a learned vector per position."""

    __slots__ = ("positions", "project", "table")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, linears: Mapping[str, LinearSpec]) -> None:
        self.table = take("embed.weight")  # [vocab, embed_size]
        self.project = Linear.load(build, take, linears["project_in"]) if spec.embed_size != spec.hidden_size else None
        self.positions = take("positions.weight")[spec.position_offset :] if spec.learned_positions else None

    def __call__(self, batch: InputBatch) -> Tensor:
        """-> [T, hidden], freshly allocated."""
        x = F.embedding(batch.tokens, self.table)
        if self.project is not None:
            x = self.project(x)
        return x if self.positions is None else x + F.embedding(batch.positions, self.positions)
