"""`int4-rtn`: weights to their nearest of 16 levels, a scale and a zero per group; no calibration.

What the `int4` schemes share is here: layouts, group sizes, arches. Embedding and head are int8:
they are read by every token, and hurt most.
"""

from compiler_service.quantization.scheme import FOUR_BITS, QuantScheme
from kernels.linear.layouts import DEFAULT_INT4_GROUP, INT4_GROUPS

INT4_RTN = QuantScheme(
    "int4-rtn",
    "bfloat16",
    linear_layout="int4_group",
    embedding_layout="int8_channel",
    head_layout="int8_channel",
    runs_on=lambda arch: True,
    limits=FOUR_BITS,
    group_sizes=tuple(sorted(INT4_GROUPS, key=lambda size: size != DEFAULT_INT4_GROUP)),
)
