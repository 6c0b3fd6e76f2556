"""GPTQ: round a weight column by column, and let the columns that are left compensate for each error.

The error of a layer's outputs is |X W^T - X Q^T|^2 = sum over rows of (w - q) H (w - q)^T with H = X^T X. If column j is rounded, the best
change of the columns after it is

    w[j + 1 ..]  -=  (w[j] - q[j]) / U[j, j]  *  U[j, j + 1 ..]          U: upper Cholesky factor of H^-1

so all rows are rounded together, one column at a time, with one factorization. Columns are processed in blocks: inside a block each
column updates the rest of the block, and after the block one product updates everything to its right.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minivllm.errors import InvalidInput
from minivllm.quantization.quantize.groups import Grid, RoundedWeight

BLOCK = 128  # columns; only speed depends on it


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, desc_act: bool = False, damping: float = 0.01) -> RoundedWeight:
    """Columns with the largest inputs are rounded first, because errors made late are compensated by fewer columns.

    weight: float32 [N, K]. hessian: float32 [K, K], X^T X times any factor.
    desc_act: groups consist of columns that are consecutive in the order of rounding, so a kernel has to look up each column's group.
    False: groups are consecutive columns, and their scales are those of the unchanged weight.
    damping: added to the diagonal, as a fraction of its mean.
    """
    n, k = weight.shape
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    place = torch.arange(k, device=weight.device)
    groups = torch.empty_like(place) if desc_act else place // grid.group_size  # of the columns, in the weight's order
    if desc_act:
        groups[order] = place // grid.group_size
    factor = _inverse_factor(hessian[order][:, order], damping)
    work = weight[:, order].clone()
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    if desc_act:
        scales = torch.empty(n, k // grid.group_size, device=weight.device)
        zeros = torch.empty_like(scales)
    else:
        split = grid.split(weight)
        scales, zeros = grid.fit(*split.aminmax(dim=-1))
    columns_in_order, groups_in_order = order.tolist(), groups[order].tolist()  # on the host: a GPU would wait for each of them
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        errors = torch.empty(n, end - begin, device=weight.device)
        for j in range(begin, end):
            group = groups_in_order[j]
            if desc_act and j % grid.group_size == 0:
                columns = _current(work, errors, factor, begin, j, j + grid.group_size)
                scales[:, group], zeros[:, group] = grid.fit(*columns.aminmax(dim=-1))
            column, scale, zero = work[:, j], scales[:, group], zeros[:, group]
            code = grid.round(column, scale, zero)
            codes[:, columns_in_order[j]] = code.to(torch.uint8)
            errors[:, j - begin] = (column - (code - zero) * scale) / factor[j, j]
            work[:, j + 1:end] -= errors[:, j - begin, None] * factor[j, j + 1:end]
        work[:, end:] -= errors @ factor[begin:end, end:]
    return RoundedWeight(codes, scales, zeros, groups.int())


def _current(work: Tensor, errors: Tensor, factor: Tensor, begin: int, first: int, end: int) -> Tensor:
    """Columns first .. end as they are after all errors so far. Those right of the block lack the errors of this block."""
    columns = work[:, first:end].clone()
    block = begin + errors.shape[1]
    if end > block:
        columns[:, block - first:] -= errors[:, :first - begin] @ factor[begin:first, block:end]
    return columns


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped matrix. [K, K]

    Inputs that are always 0 get a diagonal of 1, so their columns are rounded to nearest and affect no others.
    """
    hessian, k = hessian.clone(), len(hessian)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for attempt in range(4):
        diagonal += damping * 10**attempt * mean
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed:
            return factor
    raise InvalidInput(f"a matrix of {k} inputs cannot be factorized with damping {damping}: raise damping, num_samples or seq_len",
                       "damping")
