"""`bf16` and `fp32`: weights as the checkpoint has them, in one of the formats that engines run."""

from compiler_service.quantization.scheme import QuantScheme

BF16 = QuantScheme("bf16", "bfloat16", "plain", "plain", "plain", lambda arch: True)
FP32 = QuantScheme(
    "fp32", "float32", "plain", "plain", "plain", lambda arch: not arch.is_gpu, nearest="bf16"
)
