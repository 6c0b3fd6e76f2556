"""The KV cache's tensors: one pool of blocks for all KV groups, and a second pool in host memory for blocks without room.

    tensor pair j                block 0     block 1      block 2      ...
    k, v of the j-th layer    |  null     | group 0's  | group 1's  |        a block belongs to one group at a time, and holds
    of whatever group owns    |  block    | layer j    | layer j    |        that group's j-th layer in pair j
    the block                 |           |            |            |

So a model with alternating windows needs half as many tensor pairs as layers, and blocks go to the group that needs them.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import StepPlan
from minivllm.families import KVSpec, num_kv_tensors
from minivllm.kernels import Ops
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.upload import upload

_CACHE_LINE = 64
_MOVE_AT_ONCE = 8  # blocks in the staging memory of a move


@dataclass(frozen=True, slots=True)
class BlockShape:
    """How a model's keys and values are cut into blocks."""

    groups: tuple[KVSpec, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Of one block in all its tensors."""
        group = self.groups[0]
        return 2 * num_kv_tensors(self.groups) * self.block_size * group.kv_heads * group.head_dim * self.dtype.itemsize

    def blocks_of(self, num_tokens: int, chunk: int) -> int:
        """Blocks that one sequence holds at most on its way to `num_tokens`, computed in steps of at most `chunk`."""
        total = 0
        for group in self.groups:
            blocks = -(-num_tokens // self.block_size)
            if group.window is not None:  # what the window reaches back, the chunk, and one for the edge
                blocks = min(blocks, -(-(group.window - 1 + min(chunk, num_tokens)) // self.block_size) + 1)
            total += blocks
        return total

    def longest(self, num_blocks: int, limit: int, chunk: int) -> int:
        """The longest sequence, at most `limit`, for which `num_blocks` blocks (the null block among them) suffice."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.blocks_of(middle, chunk) < num_blocks else (low, middle - 1)
        return low


class KVCache:
    """Device and host tensors, and the copies between their blocks that ride on plans.

    In host memory the pieces of one block lie side by side, [num_host_blocks, tensors, block_size, kv_heads, head_dim], so that
    a block crosses in one transfer.
    """

    def __init__(self, shape: BlockShape, num_blocks: int, num_host_blocks: int, device: torch.device, ops: Ops) -> None:
        self.shape, self.num_blocks, self.num_host_blocks = shape, num_blocks, num_host_blocks
        self._device, self._ops = device, ops
        pairs = num_kv_tensors(shape.groups)
        piece = (shape.block_size, shape.groups[0].kv_heads, shape.groups[0].head_dim)
        self.layers = tuple(KVLayer(_zeros((num_blocks, *piece), shape.dtype, device), _zeros((num_blocks, *piece), shape.dtype, device))
                            for _ in range(pairs))
        self._tensors = [t for layer in self.layers for t in (layer.k, layer.v)]
        cuda = device.type == "cuda"
        self._host = _zeros((num_host_blocks, 2 * pairs, *piece), shape.dtype, torch.device("cpu"), pinned=cuda)
        self._stream = torch.cuda.Stream(device) if cuda and num_host_blocks else None
        self._moving: list[tuple[torch.cuda.Event, tuple[int, ...]]] = []  # moves under way on the side stream, oldest first

    def apply(self, plan: StepPlan) -> tuple[int, ...]:
        """Start a plan's moves and make its copies; the ids of moves that are finished already.

        Moves out run beside the computation: their blocks are free for others only once they are reported finished. Blocks that
        are moved in may be read by this very step, so the computing stream waits for them (the host does not). What earlier
        steps still do with any of these blocks comes first, which is why the side stream waits for the computing one.
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
            self._ops.copy_blocks(self.layers, *upload([src, dst], self._device))
        return finished

    def _move(self, plan: StepPlan) -> None:
        for moves, outward in ((plan.moves_out, True), (plan.moves_in, False)):
            for start in range(0, len(moves), _MOVE_AT_ONCE):
                some = moves[start : start + _MOVE_AT_ONCE]
                (blocks,) = upload([np.array([m.device_block for m in some], np.int64)], self._device)
                if outward:
                    staged = torch.stack([t.index_select(0, blocks) for t in self._tensors], dim=1)  # [n, tensors, ...]
                    for i, m in enumerate(some):
                        self._host[m.host_block].copy_(staged[i], non_blocking=True)
                else:
                    staged = torch.empty((len(some), *self._host.shape[1:]), dtype=self._host.dtype, device=self._device)
                    for i, m in enumerate(some):
                        staged[i].copy_(self._host[m.host_block], non_blocking=True)
                    for j, t in enumerate(self._tensors):
                        t.index_copy_(0, blocks, staged[:, j])

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


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
    """Zeros; on a CPU the system's own, so that blocks never written are not resident memory."""
    if device.type != "cpu" or pinned:
        return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)
    num_bytes = math.prod(size) * dtype.itemsize
    raw = np.zeros(num_bytes + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(size)
