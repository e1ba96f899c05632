"""The device-side sampler's variants and grids. Pure data."""

from kernels.launch import Grid
from kernels.logits import launch as logits
from kernels.step_inputs.layout import GREEDY, HEADER_WORDS, RANDOM, SAMPLING_WORDS
from kernels.truncation import launch as truncation
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


def greedy_grid(num_sequences: int, vocab_size: int) -> Grid:
    """Programs: rows, blocks of the vocabulary."""
    return num_sequences, -(-vocab_size // BLOCK_V), 1


def draw_best_variant(vocab_size: int) -> KernelVariant:
    """The best logit of each row; draws the greedy rows' tokens."""
    return _variant("draw_best", vocab_size, GREEDY)


def draw_random_variant(vocab_size: int) -> KernelVariant:
    """Draws from all tokens, after `draw_best`."""
    return _variant("draw_random", vocab_size, RANDOM)


def variants(vocab_size: int) -> set[KernelVariant]:
    """Every variant that a step's draws need, truncated ones and log probabilities included."""
    return {
        draw_best_variant(vocab_size),
        draw_random_variant(vocab_size),
        *logits.variants(vocab_size),
        *truncation.variants(vocab_size),
    }


def _variant(kernel: str, vocab_size: int, mode: int) -> KernelVariant:
    return KernelVariant(
        op="sampling",
        kernel=kernel,
        arguments=(
            pointer("logits", "fp32"),
            pointer("best", "u64"),
            pointer("counters", "i32"),
            pointer("highest", "fp32"),
            *(pointer(name, "i32") for name in ("drawn", "message", "tokens", "sampling")),
            integer("max_sequences"),
            integer("tokens_stride"),
        ),
        constants=(
            ("V", vocab_size),
            ("BLOCK_V", BLOCK_V),
            ("MODE", mode),
            ("HEADER_WORDS", HEADER_WORDS),
            ("SAMPLING_WORDS", SAMPLING_WORDS),
        ),
        num_warps=8,
    )
