"""The variants and grids of what changes logits and what reports them. Pure data."""

from kernels.launch import Grid, power_of_two
from kernels.step_inputs.layout import HEADER_WORDS, MAX_BIASES, MAX_ENDS, SAMPLING_WORDS
from kernels.variant import KernelVariant, integer, pointer

# Programs of `adjust`: each has counts for the whole vocabulary.
MAX_ADJUSTING = 64
# Likeliest tokens that are reported at most, and a power of two that holds them.
MAX_TOP = 20
TOP_BLOCK = 32
REPORT_WORDS = 2 + 2 * MAX_TOP

_BLOCK = 1024
_CHUNK = 2048


def adjust_variant(vocab_size: int) -> KernelVariant:
    """Masks end tokens, adds biases, applies penalties."""
    return KernelVariant(
        op="logits",
        kernel="adjust",
        arguments=(
            pointer("logits", "fp32"),
            *(
                pointer(name, "i32")
                for name in ("counts", "message", "tokens", "sampling", "edits")
            ),
            integer("max_sequences"),
            integer("tokens_stride"),
        ),
        constants=(
            ("V", vocab_size),
            ("BLOCK", _BLOCK),
            ("MAX_ENDS", MAX_ENDS),
            ("MAX_BIASES", MAX_BIASES),
            ("HEADER_WORDS", HEADER_WORDS),
            ("SAMPLING_WORDS", SAMPLING_WORDS),
        ),
        num_warps=8,
    )


def report_variant(vocab_size: int) -> KernelVariant:
    """Log probabilities of the drawn tokens and of the likeliest ones."""
    chunks = num_chunks(vocab_size)
    dtypes = {"tops": "u64", **dict.fromkeys(("logits", "maxima", "sums", "highest"), "fp32")}
    names = (
        "logits", "maxima", "sums", "ranks", "tops", "counters", "highest", "tokens", "reports",
        "message", "sampling",
    )  # fmt: skip
    return KernelVariant(
        op="logits",
        kernel="report",
        arguments=(
            *(pointer(name, dtypes.get(name, "i32")) for name in names),
            integer("max_sequences"),
            integer("tokens_stride"),
        ),
        constants=(
            ("V", vocab_size),
            ("BLOCK", _CHUNK),
            ("NUM_CHUNKS", chunks),
            ("PARTS", power_of_two(chunks)),
            ("MAX_TOP", MAX_TOP),
            ("TOP_BLOCK", TOP_BLOCK),
            ("REPORT_WORDS", REPORT_WORDS),
            ("HEADER_WORDS", HEADER_WORDS),
            ("SAMPLING_WORDS", SAMPLING_WORDS),
        ),
        num_warps=8,
    )


def num_chunks(vocab_size: int) -> int:
    """Programs that share a row's report."""
    return -(-vocab_size // _CHUNK)


def adjust_grid(num_sequences: int) -> Grid:
    """Programs: some rows each."""
    return min(num_sequences, MAX_ADJUSTING), 1, 1


def report_grid(num_sequences: int, vocab_size: int) -> Grid:
    """Programs: rows, chunks of the vocabulary."""
    return num_sequences, num_chunks(vocab_size), 1


def variants(vocab_size: int) -> set[KernelVariant]:
    """Every variant of this folder."""
    return {adjust_variant(vocab_size), report_variant(vocab_size)}
