"""The KV cache's memory: one pool of blocks for all KV groups, and a second pool in host memory for offloaded blocks.

    tensor j                     block 0     block 1      block 2      ...
    pages of the j-th layer   |  null     | group 0's  | group 1's  |
    of the group that owns    |  block    | layer j    | layer j    |
    the block

A draft model for speculative decoding has one more tensor per layer, whose pages may have another size, under the same block ids.

A block belongs to one group at a time. In tensor j it holds that group's j-th layer. So a model with alternating windows needs half
as many tensors as layers, and blocks go to the group that needs them. Only the group's `KVCacheSpec` knows what a page contains:
copies and moves here work on raw bytes.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import StepPlan
from minivllm.errors import ModelError
from minivllm.families import KVGroup, ModelSpec, kv_groups, num_kv_tensors
from minivllm.kernels import Ops
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.upload import upload
from minivllm.quantization.kv_cache import KVCacheSpec, KVFormat, unquantized

_CACHE_LINE = 64  # bytes
_BLOCKS_STAGED = 8  # blocks in the staging memory of a move


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a model's keys and values are cut into blocks. Raises `ModelError` if its layers cannot share blocks."""

    groups: tuple[KVGroup, ...]
    specs: tuple[KVCacheSpec, ...]  # one per group
    block_size: int  # tokens
    drafts: tuple[KVCacheSpec, ...] = ()  # one per layer of the draft

    def __post_init__(self) -> None:
        sizes = {spec.piece_bytes(self.block_size) for spec in self.specs}
        if len(sizes) > 1:
            raise ModelError(f"layers with KV pages of different sizes ({sorted(map(sum, sizes))} bytes) are not supported yet", "model")

    @classmethod
    def of(cls, spec: ModelSpec, block_size: int, dtype: torch.dtype, kv_format: KVFormat = unquantized,
           draft: ModelSpec | None = None) -> KVLayout:
        """The layout of a model whose activations have this dtype, and of its draft."""
        groups = kv_groups(spec)
        drafts = () if draft is None else tuple(
            kv_format(KVGroup(a.num_heads, a.num_kv_heads, a.head_dim, None, (i,)), dtype)
            for i, a in enumerate(layer.attention for layer in draft.layers))
        return cls(groups, tuple(kv_format(group, dtype) for group in groups), block_size, drafts)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each KV group."""
        return tuple(group.window for group in self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the cached keys and values."""
        return self.specs[0].dtype

    @property
    def page_bytes(self) -> tuple[tuple[int, ...], ...]:
        """Bytes of each piece of one page, by tensor."""
        shared = self.specs[0].piece_bytes(self.block_size)
        return (shared,) * num_kv_tensors(self.groups) + tuple(spec.piece_bytes(self.block_size) for spec in self.drafts)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all tensors."""
        return sum(map(sum, self.page_bytes))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return sum(self.specs[0].piece_bytes(1))

    def allocate(self, num_blocks: int, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
        """Zeroed pages of every tensor, by piece: [num_blocks, bytes of the piece] uint8 each."""
        return tuple(tuple(_zeros((num_blocks, size), device) for size in sizes) for sizes in self.page_bytes)

    def views(self, pages: Sequence[Sequence[Tensor]]) -> tuple[KVLayer, ...]:
        """Each layer's keys and values in the pages of `allocate`: one entry per layer of the model, then those of the draft."""
        of_layer = {layer: spec.view(pages[j], self.block_size)
                    for group, spec in zip(self.groups, self.specs, strict=True) for j, layer in enumerate(group.layers)}
        drafts = (spec.view(page, self.block_size) for spec, page in zip(self.drafts, pages[len(pages) - len(self.drafts) :], strict=True))
        return (*(of_layer[layer] for layer in sorted(of_layer)), *drafts)


class KVCache:
    """Device and host memory, and the copies between their blocks that plans request.

    In host memory all pieces of a block lie side by side, [num_host_blocks, bytes of a block], so that a block crosses in one
    transfer.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, num_host_blocks: int, device: torch.device, ops: Ops) -> None:
        self.layout, self.num_blocks, self.num_host_blocks = layout, num_blocks, num_host_blocks
        self._device, self._ops = device, ops
        pages = layout.allocate(num_blocks, device)
        self.layers = layout.views(pages)
        self._pieces = [_widest(piece) for pieces in pages for piece in pieces]
        cuda = device.type == "cuda"
        self._host = _zeros((num_host_blocks, layout.block_bytes), torch.device("cpu"), pinned=cuda)
        self._stream = torch.cuda.Stream(device) if cuda and num_host_blocks else None
        self._moving: list[tuple[torch.cuda.Event, tuple[int, ...]]] = []  # moves under way on the side stream, oldest first

    def apply(self, plan: StepPlan) -> tuple[int, ...]:
        """Start a plan's moves and make its copies. Returns the ids of moves that are finished already.

        Moves out overlap with the computation: their blocks may be reused only once they are reported finished. This step may
        read blocks that are moved in, so the computing stream waits for them (the host does not). Earlier steps may still use
        any of these blocks, so the side stream waits for the computing one.
        """
        finished: tuple[int, ...] = ()
        if plan.moves_out or plan.moves_in:
            ids = tuple(m.move_id for m in (*plan.moves_out, *plan.moves_in))
            if self._stream is None:
                self._move(plan)
                finished = ids
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._stream):
                    self._move(plan)
                    done = torch.cuda.Event()
                    done.record(self._stream)
                self._moving.append((done, ids))
                if plan.moves_in:
                    torch.cuda.current_stream(self._device).wait_event(done)
        if plan.copies:
            src, dst = np.array([c.src for c in plan.copies], np.int64), np.array([c.dst for c in plan.copies], np.int64)
            self._ops.copy_blocks(self._pieces, *upload([src, dst], self._device))
        return finished

    def _move(self, plan: StepPlan) -> None:
        for moves, outward in ((plan.moves_out, True), (plan.moves_in, False)):
            for start in range(0, len(moves), _BLOCKS_STAGED):
                some = moves[start : start + _BLOCKS_STAGED]
                (blocks,) = upload([np.array([m.device_block for m in some], np.int64)], self._device)
                if outward:
                    staged = torch.cat([piece.index_select(0, blocks).view(torch.uint8) for piece in self._pieces], dim=1)
                    for row, m in zip(staged, some, strict=True):
                        self._host[m.host_block].copy_(row, non_blocking=True)
                else:
                    staged = torch.empty((len(some), self.layout.block_bytes), dtype=torch.uint8, device=self._device)
                    for row, m in zip(staged, some, strict=True):
                        row.copy_(self._host[m.host_block], non_blocking=True)
                    sizes = [piece.shape[1] * piece.itemsize for piece in self._pieces]
                    for piece, part in zip(self._pieces, staged.split(sizes, dim=1), strict=True):
                        piece.index_copy_(0, blocks, part.contiguous().view(piece.dtype))

    def wait_on_device(self, move_ids: Collection[int]) -> None:
        """These moves ended on rank 0, so plans may reuse their blocks: what is launched from now on runs after them here too."""
        for event, moved in self._moving:
            if not set(moved).isdisjoint(move_ids):
                torch.cuda.current_stream(self._device).wait_event(event)
        self._moving = [(event, moved) for event, moved in self._moving if set(moved).isdisjoint(move_ids)]

    def finished_moves(self, wait: bool) -> tuple[int, ...]:
        """Ids of moves that ended since the last call, in order; with `wait`, of all that were started."""
        ids: list[int] = []
        while self._moving:
            event, moved = self._moving[0]
            if wait:
                event.synchronize()
            elif not event.query():
                break
            ids += moved
            del self._moving[0]
        return tuple(ids)


def _widest(piece: Tensor) -> Tensor:
    """The same bytes in elements of 8 bytes where they divide: [num_blocks, n]."""
    return piece.view(torch.int64) if piece.shape[1] % 8 == 0 else piece


def _zeros(size: tuple[int, int], device: torch.device, pinned: bool = False) -> Tensor:
    """Zero bytes. On a CPU they come from the operating system, so blocks never written are not resident memory."""
    if device.type != "cpu" or pinned:
        return torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
    num_bytes = size[0] * size[1]
    raw = np.zeros(num_bytes + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return torch.from_numpy(raw[start : start + num_bytes]).view(size)
