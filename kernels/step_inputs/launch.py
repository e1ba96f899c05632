"""The kernels that take a step's message: their variants and grids. Pure data."""

from kernels.launch import Grid, Sizes
from kernels.step_inputs.layout import HEADER_WORDS, WRITE_FIELDS
from kernels.variant import KernelVariant, integer, pointer

_BLOCK = 256
_COPY_BLOCK = 1024
# Programs that share the tokens of a long prompt.
_MAX_PARTS = 8


def copy_words_variant() -> KernelVariant:
    """Copies words from place to place; either may be the host's pinned memory."""
    return KernelVariant(
        op="step_inputs",
        kernel="copy_words",
        arguments=(pointer("source", "i32"), pointer("destination", "i32"), integer("count")),
        constants=(("BLOCK", _COPY_BLOCK),),
    )


def copy_words_grid(count: int) -> Grid:
    """Programs: blocks of words."""
    return -(-count // _COPY_BLOCK), 1, 1


def write_tables_variant() -> KernelVariant:
    """Copies words of the message into the tables: one program a write."""
    return KernelVariant(
        op="step_inputs",
        kernel="write_tables",
        arguments=(pointer("message", "i32"), pointer("tables", "i32"), integer("writes_at")),
        constants=(("WRITE_FIELDS", WRITE_FIELDS), ("BLOCK", 1024)),
    )


def step_inputs_variant(block_tokens: int) -> KernelVariant:
    """Makes the packed inputs of a step from its entries and the tables."""
    pointers = (
        "message", "tokens", "blocks", "token_ids", "positions", "slots", "seq_lens",
        "query_start", "part_start", "logit_rows", "block_tables",
    )  # fmt: skip
    integers = ("max_sequences", "tokens_stride", "blocks_stride", "num_tokens", "num_sequences")
    return KernelVariant(
        op="step_inputs",
        kernel="step_inputs",
        arguments=(*(pointer(name, "i32") for name in pointers), *map(integer, integers)),
        constants=(
            ("HEADER_WORDS", HEADER_WORDS),
            ("BLOCK_TOKENS", block_tokens),
            ("BLOCK", _BLOCK),
        ),
    )


def step_inputs_grid(sizes: Sizes) -> Grid:
    """Programs: sequences and one for the padding, parts of their tokens."""
    return sizes.sequences + 1, max(1, min(_MAX_PARTS, sizes.tokens // (4 * _BLOCK))), 1


def variants(block_tokens: int) -> set[KernelVariant]:
    """Every variant that a step needs, whatever the model."""
    return {copy_words_variant(), write_tables_variant(), step_inputs_variant(block_tokens)}
