"""Every op of the graph, a row each."""

from kernels.add.op import ADD
from kernels.attention.op import ATTENTION
from kernels.embedding.op import EMBEDDING
from kernels.kv_write.op import KV_WRITE
from kernels.linear.op import LINEAR
from kernels.mul.op import MUL
from kernels.op import Op
from kernels.qkv_rope_write.op import QKV_ROPE_WRITE
from kernels.rms_norm.op import RMS_NORM
from kernels.rope.op import ROPE
from kernels.select_rows.op import SELECT_ROWS
from kernels.silu.op import SILU
from kernels.silu_mul.op import SILU_MUL
from kernels.split.op import SPLIT

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        EMBEDDING, RMS_NORM, LINEAR, SPLIT, ROPE, KV_WRITE, ATTENTION, QKV_ROPE_WRITE,
        SILU, MUL, ADD, SILU_MUL, SELECT_ROWS,
    )
}  # fmt: skip
