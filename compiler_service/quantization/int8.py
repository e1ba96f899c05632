"""`int8`: weights to their nearest of 255 levels, a scale per output channel; activations bf16."""

from compiler_service.quantization.scheme import EIGHT_BITS, QuantScheme

INT8 = QuantScheme(
    "int8",
    "bfloat16",
    linear_layout="int8_channel",
    embedding_layout="int8_channel",
    head_layout="int8_channel",
    runs_on=lambda arch: True,
    limits=EIGHT_BITS,
)
