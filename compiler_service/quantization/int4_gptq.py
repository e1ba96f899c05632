"""`int4-gptq`: columns are rounded one by one, and those not yet rounded make up for the error.

    H = X^T X + damping = U^T U, U upper triangular;   d = w - q, so that the output's error is |U d|^2
    for each column k, the last first:
        q[k] = nearest level of w[k] + sum over j > k of U[k, j] d[j] / U[k, k]

Row k of U d has columns from k on alone: what is added to w[k] is what would make that row zero.
Columns are sorted so that the most active are the last and rounded first (act-order), while there are
most columns to make up for them. It gives what GPTQ's inverse of H gives, without the inverse: a linear
of K columns takes K^2 fp32 values, factored in place, beside its inputs and some rows.

Grids belong to the groups of the stored order and are chosen before (static groups), so act-order
costs the runtime nothing: the layout, and so the speed, is that of `int4-rtn`. X is what the
quantized layers before give, so that later layers make up for earlier ones as well.

The last bits of a Cholesky factor depend on CPU and threads, and so may a weight: of equal keys the
first publish wins.
Legend: T tokens, K in, N out, B columns of a block, G values per group, J = K / G.
Source: Frantar et al. 2022, "GPTQ", section 3.3. Chen et al. 2025, "The Geometry of LLM Quantization:
GPTQ as Babai's Nearest Plane Algorithm": the form without an inverse.
"""

from dataclasses import replace
from functools import partial

import torch

from compiler_service.quantization.int4_rtn import INT4_RTN
from compiler_service.quantization.scheme import Pack
from kernels.linear.layouts import int4_grid, int4_levels, pack_int4_levels

_DAMPING = 0.01
_BLOCK_COLUMNS = 64
# Rows are rounded in pieces of about this many values, so that scratch is small beside the Hessian.
_CHUNK_VALUES = 1 << 23
# The Hessian is summed up in pieces of so many tokens and columns.
_CHUNK_TOKENS, _CHUNK_COLUMNS = 512, 2048


def prepare_pack(
    group_size: int,
    inputs_TK: torch.Tensor | None,
    importance_K: torch.Tensor | None,
    act_order: bool = True,
) -> Pack:
    """Packs rows for a linear that reads `inputs_TK`.

    Args:
        act_order: the most active columns are rounded first; else the first.
    """
    assert inputs_TK is not None, "GPTQ packs by the linear's inputs, and has none"
    active_K = torch.linalg.vector_norm(inputs_TK, dim=0).square_()
    order_K = torch.arange(len(active_K))
    if act_order:
        order_K = torch.argsort(active_K, descending=True, stable=True)
    order_K = order_K.flip(0)
    factor_KK = _factor(inputs_TK, order_K, float(active_K.mean()))

    def pack(weight_NK: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = [
            _pack(rows_NK, group_size, order_K, factor_KK, active_K)
            for rows_NK in torch.split(weight_NK, max(_CHUNK_VALUES // len(order_K), 1))
        ]
        return {role: torch.cat([piece[role] for piece in pieces]) for role in pieces[0]}

    return pack


def _factor(inputs_TK: torch.Tensor, order_K: torch.Tensor, mean: float) -> torch.Tensor:
    """U[k, j] / U[k, k] of the sorted columns, j >= k; more is damped until there is a U.

    Args:
        mean: of the Hessian's diagonal.
    """
    damping = _DAMPING * (mean or 1.0)
    while True:
        hessian_KK = _hessian(inputs_TK, order_K)
        hessian_KK.diagonal().add_(damping)
        # The lower factor of a column-major view is the upper one of the rows as they lie. It takes the
        # matrix's own place: a second one would be most of a build's memory.
        view_KK, is_not = hessian_KK.mT, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(view_KK, out=(view_KK, is_not))
        if not is_not:
            return hessian_KK.div_(hessian_KK.diagonal().clone()[:, None])
        damping *= 10
        del hessian_KK, view_KK


def _hessian(inputs_TK: torch.Tensor, order_K: torch.Tensor) -> torch.Tensor:
    """X^T X of the sorted columns; above the diagonal alone, which is all that is read."""
    num_columns = len(order_K)
    hessian_KK = torch.zeros(num_columns, num_columns)
    for chunk_TK in torch.split(inputs_TK, _CHUNK_TOKENS):
        sorted_TK = chunk_TK[:, order_K]
        for first in range(0, num_columns, _CHUNK_COLUMNS):
            columns = slice(first, min(first + _CHUNK_COLUMNS, num_columns))
            above_KC = hessian_KK[: columns.stop, columns]
            above_KC.addmm_(sorted_TK[:, : columns.stop].T, sorted_TK[:, columns])
    return hessian_KK


def _pack(
    weight_NK: torch.Tensor,
    group_size: int,
    order_K: torch.Tensor,
    factor_KK: torch.Tensor,
    importance_K: torch.Tensor,
) -> dict[str, torch.Tensor]:
    num_rows, num_columns = weight_NK.shape
    groups_NJG = weight_NK.reshape(num_rows, -1, group_size)
    scale_NJ, zero_NJ = int4_grid(groups_NJG, importance_K)
    groups_K = order_K // group_size
    # Column-major, so that a column is one piece of memory. Columns are weights until they are
    # rounded, and from then on what rounding took from them.
    left_KN = weight_NK[:, order_K].T.contiguous()
    levels_KN = torch.empty(num_columns, num_rows, dtype=torch.int8)
    for stop in range(num_columns, 0, -_BLOCK_COLUMNS):
        block = slice(max(stop - _BLOCK_COLUMNS, 0), stop)
        levels_KN[block] = _round_block(
            left_KN[block],
            factor_KK[block, stop:] @ left_KN[stop:],
            factor_KK[block, block],
            scale_NJ.T[groups_K[block]],
            zero_NJ.T[groups_K[block]],
        )
    levels_NK = torch.empty(num_rows, num_columns, dtype=torch.int8)
    levels_NK[:, order_K] = levels_KN.T
    return pack_int4_levels(levels_NK, scale_NJ, zero_NJ)


def _round_block(
    left_BN: torch.Tensor,
    added_BN: torch.Tensor,
    factor_BB: torch.Tensor,
    scale_BN: torch.Tensor,
    zero_BN: torch.Tensor,
) -> torch.Tensor:
    """The levels of a block's columns; `left_BN` then holds what rounding took from them.

    Args:
        added_BN: what makes up for the columns after the block; changed.
    """
    levels_BN = torch.empty_like(left_BN)
    for k in reversed(range(len(left_BN))):
        levels_BN[k] = int4_levels(left_BN[k] + added_BN[k], scale_BN[k], zero_BN[k])
        left_BN[k] -= levels_BN[k] * scale_BN[k] + zero_BN[k]
        added_BN[:k].addr_(factor_BB[:k, k], left_BN[k])
    return levels_BN


INT4_GPTQ = replace(
    INT4_RTN,
    name="int4-gptq",
    prepare_pack=prepare_pack,
    prepare_in_order=partial(prepare_pack, act_order=False),
    reads_inputs=True,
)
