"""Act-order: groups of inputs that are not neighbors, as GPTQ's `desc_act` makes them.

The inputs were quantized in descending order of their activations, and neighbors in that order share a group. `g_idx` names the group
of each input. Here the columns of the weight are sorted by group, and each product reorders its inputs (`GroupedMatmul`).
"""
from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from minivllm.errors import ModelError
from minivllm.quantization.base import Matmul, StoredTensor
from minivllm.quantization.grouped import GroupedMatmul
from minivllm.quantization.parts import PartsMatmul

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.grouped import GroupedWeight

UNORDERED = -1  # every entry of a g_idx that a checkpoint lacks: groups are runs of neighboring inputs


def ordered_matmul(weight: GroupedWeight, g_idx: Tensor, group: int, rows: tuple[int, ...], ops: Ops) -> Matmul:
    """The product of a weight whose columns are in the order of the inputs.

    g_idx: [parts * K], one for each part of a fused layer; rows: outputs of each part. Parts with different orders are separate products.
    """
    orders = [_order(part, group) for part in g_idx.view(-1, weight.shape[1])]
    if all(_equal(order, orders[0]) for order in orders):
        return _product(weight, orders[0], ops)
    starts = itertools.accumulate(rows, initial=0)
    return PartsMatmul([(_product(_some_rows(weight, start, n), order, ops), n)
                        for start, n, order in zip(starts, rows, orders, strict=False)])


def order_bytes(ordered: bool, group: int, cols: int) -> int:
    """Bytes of the order. Parts of a fused layer share one, as they do in checkpoints of all known tools."""
    return 4 * cols if ordered and 0 < group < cols else 0


def unordered(like: StoredTensor, cols: int) -> StoredTensor:
    """The g_idx of a layer that has none. like: another tensor of the layer."""
    def read() -> Tensor:
        import torch

        return torch.full((cols,), UNORDERED, dtype=torch.int32)
    return StoredTensor(like.file, like.name, (cols,), "int32", read)


def _order(g_idx: Tensor, group: int) -> Tensor | None:
    """g_idx: [K] -> the inputs sorted by group, int32 [K]; None: they are sorted already."""
    import torch

    group = len(g_idx) if group == -1 else group
    g_idx = g_idx if bool((g_idx < 0).any()) else g_idx - g_idx.min()  # a tensor-parallel rank's inputs begin with another group
    sorted_groups = torch.arange(len(g_idx), device=g_idx.device) // group
    if bool((g_idx == UNORDERED).all()) or torch.equal(g_idx.long(), sorted_groups):
        return None
    groups, order = torch.sort(g_idx.long(), stable=True)
    if not torch.equal(groups, sorted_groups):
        raise ModelError(f"a g_idx of the weights does not divide its {len(g_idx)} inputs into groups of {group} (group_size in "
                         "quantization_config): correct group_size, or download the checkpoint again", "model")
    return order.int()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.equal(b))


def _some_rows(weight: GroupedWeight, start: int, n: int) -> GroupedWeight:
    zeros = weight.zeros if isinstance(weight.zeros, int) else weight.zeros[start : start + n].contiguous()
    return dataclasses.replace(weight, codes=weight.codes[start : start + n], zeros=zeros,
                               scales=weight.scales[start : start + n].contiguous())


def _product(weight: GroupedWeight, order: Tensor | None, ops: Ops) -> GroupedMatmul:
    if order is None:
        return GroupedMatmul(weight, ops)
    return GroupedMatmul(dataclasses.replace(weight, codes=weight.codes.index_select(1, order)), ops, order)
