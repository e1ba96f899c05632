"""The device-side sampler's variant and grid. Pure data."""

from kernels.variant import KernelVariant, integer, pointer
from shared.arch import Arch

BLOCK_V = 2048


def greedy_variant(vocab_size: int, block_tokens: int, arch: Arch) -> KernelVariant:
    """Greedy token, then the row's next position, length and slot."""
    names = (
        ("logits", "fp32"), ("best", "u64"), ("counters", "i32"), ("token_ids", "i32"),
        ("positions", "i32"), ("seq_lens", "i32"), ("slots", "i32"), ("block_tables", "i32"),
        ("history", "i32"),
    )  # fmt: skip
    return KernelVariant(
        op="sampling",
        kernel="greedy_advance",
        arguments=(
            *(pointer(name, dtype) for name, dtype in names),
            integer("table_stride"),
            integer("history_stride"),
        ),
        constants=(
            ("V", vocab_size),
            ("BLOCK_V", BLOCK_V),
            ("BLOCK_TOKENS", block_tokens),
            ("PDL", arch.has_pdl),
        ),
        num_warps=8,
        has_pdl=arch.has_pdl,
    )


def greedy_grid(num_sequences: int, vocab_size: int) -> tuple[int, int, int]:
    """Programs: rows, blocks of the vocabulary."""
    return num_sequences, -(-vocab_size // BLOCK_V), 1
