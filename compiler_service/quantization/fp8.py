"""`fp8`: weights in e4m3, a scale per output channel; activations in e4m3 too for many tokens, a
scale per token found as they come."""

from compiler_service.quantization.scheme import E4M3_INPUTS, QuantScheme

FP8 = QuantScheme(
    "fp8",
    "bfloat16",
    linear_layout="fp8_channel",
    embedding_layout="plain",
    head_layout="fp8_channel",
    runs_on=lambda arch: arch.has_fp8,
    limits=E4M3_INPUTS,
    nearest="w8a8-int8",
)
