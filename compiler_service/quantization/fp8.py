"""`fp8`: weights in e4m3, a scale per output channel; activations in e4m3 too for many tokens, a
scale per token found as they come."""

from compiler_service.quantization.scheme import EIGHT_BITS, QuantScheme

FP8 = QuantScheme(
    "fp8",
    "bfloat16",
    linear_layout="fp8_channel",
    embedding_layout="plain",
    head_layout="fp8_channel",
    runs_on=lambda arch: arch.has_fp8,
    limits=EIGHT_BITS,
    nearest="w8a8-int8",
)
