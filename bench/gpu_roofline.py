"""What a step must move and compute, against what the device has been measured to do: the roofline of a run.

A step's least time is the larger of its bytes (weights once, keys and values of every context) at the measured read
speed and its operations at the measured speed of a large matrix product. Source: Williams et al. 2009 (Roofline).
"""

from dataclasses import dataclass, field

import torch

from bench.gpu_models import QUANTS, LlamaSizes
from bench.gpu_timing import median_ms, read_limit_tb_s
from runtime_service.scheduling.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """The device's own speeds, measured: memory reads, and a large product of what the linears multiply."""

    read_tb_s: float
    product_tflop_s: float


def measured_limits(quant: str) -> Limits:
    """Takes about a second; needs 12 GB free.

    Products of 8 bits are e4m3's, int8's too: tensor cores multiply both at one speed.
    """
    size = 8192
    x, w = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    layout, rounding = QUANTS[quant]
    if (
        layout != "fp8_channel" and "activations" not in rounding
    ):  # widened to bf16, and multiplied so
        ms = median_ms(lambda: torch.mm(x, w), 9)
    else:
        one = torch.ones(size, 1, device="cuda")
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        ms = median_ms(
            lambda: torch._scaled_mm(
                x8, w8.t(), scale_a=one, scale_b=one.view(1, -1), out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ), 9,
        )  # fmt: skip
    return Limits(read_limit_tb_s(), 2 * size**3 / ms / 1e9)


@dataclass(slots=True)
class Roofline:
    """Adds up a run's steps.

    Args:
        weight_bytes: read by every step.
        kv_bytes: of one token in all layers.
    """

    sizes: LlamaSizes
    limits: Limits
    weight_bytes: int
    kv_bytes: int
    bytes_moved: float = field(default=0.0, init=False)
    operations: float = field(default=0.0, init=False)
    least_s: float = field(default=0.0, init=False)

    def add(self, step: SchedulerOutput) -> None:
        """One launched step."""
        s = self.sizes
        after_attention = s.hidden * (s.heads * s.head_dim + 3 * s.ffn)
        in_layer = after_attention + s.hidden * (s.heads + 2 * s.kv_heads) * s.head_dim
        moved, operations = float(self.weight_bytes), 0.0
        for part in step.scheduled:
            n = part.num_tokens
            pairs = n * part.start + n * (n + 1) // 2  # of a query and a key that it sees
            attention = 4 * s.heads * s.head_dim * pairs
            operations += s.layers * (2 * n * in_layer + attention)
            # Behind the last attention only rows that are drawn from are needed.
            operations -= 2 * after_attention * (n - part.is_sampled)
            operations += 2 * s.vocab * s.hidden if part.is_sampled else 0
            moved += (part.start + 2 * n) * self.kv_bytes
        self.bytes_moved += moved
        self.operations += operations
        self.least_s += max(
            moved / self.limits.read_tb_s / 1e12, operations / self.limits.product_tflop_s / 1e12
        )

    def line(self, wall_s: float) -> dict[str, float]:
        """What was reached, and the share of the least time in the time that it took."""
        return {
            "tb_s": round(self.bytes_moved / wall_s / 1e12, 3),
            "tflop_s": round(self.operations / wall_s / 1e12, 1),
            "limit_tb_s": round(self.limits.read_tb_s, 3),
            "limit_tflop_s": round(self.limits.product_tflop_s, 1),
            "of_limit": round(self.least_s / wall_s, 3),
        }
