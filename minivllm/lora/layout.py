"""Where the weights of one adapter are inside a slot: one range of numbers for all layers, so that a swap is one copy.

    slot   | layers.0.qkv: A | B | layers.0.o: A | B | ... | layers.27.down: A | B |

A of a fused layer has `rank` rows for each part (q, k, v), B has the rows of the layer. An adapter of a lower rank, or one that leaves
some layers alone, has zeros there.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from minivllm.families import LinearSpec, ModelSpec, linear_specs
from minivllm.parallel.shard import shard_spec

RANK_MULTIPLE = 16  # ranks are padded to it: the smallest inner dimension of a tensor core product
_ALIGN = 64  # numbers; kernels may rely on aligned rows


class AdaptedLinear(NamedTuple):
    """A linear layer, and where its A [parts * rank, cols] and B [rows, rank] begin in a slot."""

    linear: LinearSpec  # of one tensor-parallel rank
    a: int
    b: int
    whole: LinearSpec  # of all ranks


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The layout of a slot, for adapters of a model up to a rank."""

    rank: int  # max_lora_rank, padded
    layers: Mapping[str, AdaptedLinear]  # by our name of the layer
    size: int  # numbers of a slot

    @classmethod
    def of(cls, spec: ModelSpec, max_rank: int, size: int = 1) -> AdapterLayout:
        """Slots for every linear layer inside the decoder's layers. size: tensor-parallel ranks, which share each adapter as they share
        the layers: B of column-parallel layers by outputs, A of row-parallel layers by inputs."""
        rank = -(-max_rank // RANK_MULTIPLE) * RANK_MULTIPLE
        layers, at, wholes = {}, 0, linear_specs(spec)
        for name, linear in linear_specs(shard_spec(spec, size)).items():
            if name.startswith("layers.") and not linear.dense:
                b = _aligned(at + len(linear.rows) * rank * linear.cols)
                layers[name] = AdaptedLinear(linear, at, b, wholes[name])
                at = _aligned(b + sum(linear.rows) * rank)
        return cls(rank, MappingProxyType(layers), at)

    def num_bytes(self, max_loras: int, itemsize: int) -> int:
        """Device memory of all slots."""
        return max_loras * self.size * itemsize


def _aligned(at: int) -> int:
    return -(-at // _ALIGN) * _ALIGN
