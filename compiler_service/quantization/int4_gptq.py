"""`int4-gptq`: columns are rounded one by one, and those not yet rounded make up for the error.

    H = X^T X + damping;   Hinv = upper Cholesky factor of H^-1
    for each column k, the most active first (act-order):
        q[k] = nearest level of w[k];  e = (w[k] - q[k]) / Hinv[k, k];  w[j] -= e Hinv[k, j], j > k

Grids belong to the groups of the stored order and are chosen before (static groups), so act-order
costs the runtime nothing: the layout, and so the speed, is that of `int4-rtn`. X is what the
quantized layers before give, so that later layers make up for earlier ones as well. Takes about 3 K^2
fp32 values of memory for a linear of K columns.

The last bits of a Cholesky factor depend on CPU and threads, and so may a weight: of equal keys the
first publish wins.
Legend: T tokens, K in, N out, G values per group, J = K / G.
Source: Frantar et al. 2022, "GPTQ", section 3.3, algorithm 1.
"""

from dataclasses import replace

import torch

from compiler_service.quantization.int4_rtn import INT4_RTN
from compiler_service.quantization.scheme import Pack
from kernels.linear.layouts import int4_grid, int4_levels, pack_int4_levels

_DAMPING = 0.01
_BLOCK_COLUMNS = 64


def prepare_pack(
    group_size: int, inputs_TK: torch.Tensor | None, importance_K: torch.Tensor | None
) -> Pack:
    """Packs rows for a linear that reads `inputs_TK`."""
    assert inputs_TK is not None, "GPTQ packs by the linear's inputs, and has none"
    active_K = inputs_TK.square().sum(0)
    # The most active first: they are rounded while there are most columns to make up for them.
    order_K = torch.argsort(active_K, descending=True, stable=True)
    factor_KK = _inverse_factor(inputs_TK[:, order_K], float(active_K.mean()))
    return lambda weight_NK: _pack(weight_NK, group_size, order_K, factor_KK, active_K)


def _inverse_factor(inputs_TK: torch.Tensor, mean: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; more is damped until there is one.

    Args:
        mean: of the Hessian's diagonal.
    """
    damping = _DAMPING * (mean or 1.0)
    while True:
        # Two matrices, used in turns: for wide layers they are most of a build's memory.
        hessian_KK = inputs_TK.T @ inputs_TK
        hessian_KK.diagonal().add_(damping)
        factor_KK: torch.Tensor
        factor_KK, is_not = torch.linalg.cholesky_ex(hessian_KK)
        if not is_not:
            torch.cholesky_inverse(factor_KK, out=hessian_KK)
            torch.linalg.cholesky_ex(hessian_KK, upper=True, out=(factor_KK, is_not))
            if not is_not:
                return factor_KK
        damping *= 10


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
    # Column-major, so that a column is one piece of memory.
    left_KN = weight_NK[:, order_K].T.contiguous()
    groups_K = order_K // group_size
    scale_KN, zero_KN = scale_NJ.T[groups_K], zero_NJ.T[groups_K]
    levels_KN = torch.empty_like(left_KN)
    for first in range(0, num_columns, _BLOCK_COLUMNS):
        block = slice(first, min(first + _BLOCK_COLUMNS, num_columns))
        errors = _round_block(
            left_KN[block], factor_KK[block, block], scale_KN[block], zero_KN[block],
            levels_KN[block],
        )  # fmt: skip
        left_KN[block.stop :] -= factor_KK[block, block.stop :].T @ errors
    levels_NK = torch.empty(num_rows, num_columns, dtype=torch.int8)
    levels_NK[:, order_K] = levels_KN.T.to(torch.int8)
    return pack_int4_levels(levels_NK, scale_NJ, zero_NJ)


def _round_block(
    left_BN: torch.Tensor,
    factor_BB: torch.Tensor,
    scale_BN: torch.Tensor,
    zero_BN: torch.Tensor,
    levels_BN: torch.Tensor,
) -> torch.Tensor:
    """Rounds a block's columns into `levels_BN`; their errors, for the columns after the block."""
    errors_BN = torch.empty_like(left_BN)
    for k in range(len(left_BN)):
        levels_BN[k] = int4_levels(left_BN[k], scale_BN[k], zero_BN[k])
        rounded_N = levels_BN[k] * scale_BN[k] + zero_BN[k]
        errors_BN[k] = (left_BN[k] - rounded_N) / factor_BB[k, k]
        left_BN[k + 1 :].addr_(factor_BB[k, k + 1 :], errors_BN[k], alpha=-1)
    return errors_BN


INT4_GPTQ = replace(INT4_RTN, name="int4-gptq", prepare_pack=prepare_pack, reads_inputs=True)
