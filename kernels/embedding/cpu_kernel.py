"""Rows of a table on a CPU, widened where they are stored in 8 bits.

Legend: R rows, M their size.
"""

from numba import prange

from kernels.cpu_jit import kernel, load, store, typed


@kernel
def take_rows(table_at, scale_at, rows_at, out_at, R, M, table_tag, scale_tag, index_tag, tag):
    """out[r] = table[rows[r]] * scale[rows[r]]; `scale_at` is 0 where rows have no scale."""
    for r in prange(R):
        row = typed(rows_at, index_tag)[r]
        factor = load(typed(scale_at, scale_tag), row) if scale_at else scale_tag
        for m in range(M):
            value = load(typed(table_at, table_tag), row * M + m)
            store(typed(out_at, tag), r * M + m, value * factor if scale_at else value)
