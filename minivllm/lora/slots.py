"""Adapters in memory: some in slots on the device, all others in host memory.

    host memory   sql | rhymes | pirate | json | ...       packed as a slot is; pinned, if the device is a GPU
                     \\________________/
    slots            | rhymes | sql |                       max_loras of them. The scheduler chooses which adapter is in which slot

A slot is one range of memory (`AdapterLayout`), so bringing an adapter in is one copy, ordered with the steps on the same stream.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minivllm.families import row_order
from minivllm.kernels.layout import AdapterWeights
from minivllm.lora.adapter import Adapter, ModuleDelta
from minivllm.lora.layout import AdaptedLinear, AdapterLayout
from minivllm.parallel.group import SINGLE, ParallelGroup
from minivllm.parallel.shard import span


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in host memory, ready to be copied into a slot."""

    weights: Tensor  # [size of a slot], in the model's dtype
    rank: int


class AdapterStore:
    """The slots of one device, and the adapters behind them."""

    def __init__(self, layout: AdapterLayout, max_loras: int, dtype: torch.dtype, device: torch.device,
                 group: ParallelGroup = SINGLE) -> None:
        self.layout, self.group = layout, group
        self._slots = torch.zeros((max_loras, layout.size), dtype=dtype, device=device)
        self.ranks = torch.zeros(max_loras + 1, dtype=torch.int32, device=device)  # of the adapter in each slot; the last: no adapter
        self._host: dict[int, PackedAdapter] = {}

    @property
    def adapter_ids(self) -> tuple[int, ...]:
        """Ids of all adapters in host memory."""
        return tuple(self._host)

    def layer(self, name: str) -> AdapterWeights | None:
        """The slots' weights for one linear layer; None: it is not adapted."""
        adapted = self.layout.layers.get(name)
        return None if adapted is None else _weights(self._slots, adapted, self.layout.rank)

    def pack(self, adapter: Adapter, rank: int | None = None) -> PackedAdapter:
        """An adapter in the layout of a slot, for this tensor-parallel rank or another one. It may be called on any thread."""
        rank, size = self.group.rank if rank is None else rank, self.group.size
        slots = self._slots
        flat = torch.zeros(self.layout.size, dtype=slots.dtype, pin_memory=slots.device.type == "cuda")
        for adapted in self.layout.layers.values():
            weights, linear, whole = _weights(flat[None], adapted, self.layout.rank), adapted.linear, adapted.whole
            first, last = span(whole.cols, linear.cols, rank, size)
            start = 0
            for part, (rows, delta) in enumerate(zip(linear.rows, _deltas(adapter, adapted), strict=True)):
                if delta is not None:
                    r, (begin, end) = len(delta.a), span(whole.rows[part], rows, rank, size)
                    weights.a[0, part * self.layout.rank :][:r] = delta.a[:, first:last]
                    weights.b[0, start : start + rows, :r] = delta.b[begin:end].float() * delta.scaling
                start += rows
        return PackedAdapter(flat, adapter.rank)

    def add(self, adapter_id: int, packed: PackedAdapter) -> None:
        """Keep an adapter, so that plans may bring it into a slot."""
        self._host[adapter_id] = packed

    def remove(self, adapter_id: int) -> None:
        """Free an adapter's host memory. No later plan may name it."""
        del self._host[adapter_id]

    def load(self, slot: int, adapter_id: int) -> None:
        """Copy an adapter into a slot, after all kernels that were launched before, and before those launched later."""
        packed = self._host[adapter_id]
        self._slots[slot].copy_(packed.weights, non_blocking=True)
        self.ranks[slot].fill_(packed.rank)


def _weights(slots: Tensor, adapted: AdaptedLinear, rank: int) -> AdapterWeights:
    """One layer's part of all slots: [S, size] -> A [S, parts * rank, cols] and B [S, rows, rank], as views."""
    linear = adapted.linear
    a_rows, b_rows = len(linear.rows) * rank, sum(linear.rows)
    return AdapterWeights(
        slots[:, adapted.a : adapted.a + a_rows * linear.cols].unflatten(1, (a_rows, linear.cols)),
        slots[:, adapted.b : adapted.b + b_rows * rank].unflatten(1, (b_rows, rank)), linear.rows)


def _deltas(adapter: Adapter, adapted: AdaptedLinear) -> Iterator[ModuleDelta | None]:
    """One entry per part of a linear layer of all ranks, its rows of B in our order. A checkpoint module for all parts is split; its parts
    share A."""
    linear = adapted.whole
    order = torch.arange(sum(linear.rows)) if linear.heads is None else torch.tensor(row_order(linear.heads))
    separate, start = linear.stored_rows == linear.rows, 0
    for part, rows in enumerate(linear.rows):
        delta = adapter.modules.get(linear.checkpoint_names[part if separate else 0])
        mine = order[start : start + rows] - (start if separate else 0)
        yield None if delta is None else ModuleDelta(delta.a, delta.b[mine], delta.scaling)
        start += rows
