"""The device-side sampler's variants and grids. Pure data."""

from kernels.launch import Grid
from kernels.step_inputs.layout import GREEDY, HEADER_WORDS, RANDOM, SAMPLING_WORDS, TRUNCATED
from kernels.variant import Constant, KernelVariant, integer, pointer
from shared.arch import Arch

BLOCK_V = 2048
# Of a row that one program searches: as wide as fits into registers, so that many loads are in flight.
_SEARCH_BLOCK = 8192


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
    return _variant("draw_best", ("best", "counters"), {"V": vocab_size, "BLOCK_V": BLOCK_V})


def draw_random_variant(vocab_size: int) -> KernelVariant:
    """Draws from all tokens, after `draw_best`."""
    return _variant("draw_random", ("best", "counters"), {"V": vocab_size, "BLOCK_V": BLOCK_V})


def draw_truncated_variant(vocab_size: int) -> KernelVariant:
    """Draws from the tokens that top-k, top-p and min-p leave, after `draw_best`; one program a row."""
    constants: dict[str, Constant] = {
        "V": vocab_size, "BLOCK_V": BLOCK_V, "SEARCH_BLOCK": _SEARCH_BLOCK,
    }  # fmt: skip
    return _variant("draw_truncated", (), constants, num_warps=32)


def variants(vocab_size: int) -> set[KernelVariant]:
    """Every variant that a step's draws need."""
    return {
        draw_best_variant(vocab_size),
        draw_random_variant(vocab_size),
        draw_truncated_variant(vocab_size),
    }


def _variant(
    kernel: str,
    scratch: tuple[str, ...],
    constants: dict[str, Constant],
    num_warps: int = 8,
) -> KernelVariant:
    modes = {"draw_best": GREEDY, "draw_random": RANDOM, "draw_truncated": TRUNCATED}
    constants |= {
        "MODE": modes[kernel], "HEADER_WORDS": HEADER_WORDS, "SAMPLING_WORDS": SAMPLING_WORDS,
    }  # fmt: skip
    dtypes = {"best": "u64", "counters": "i32"}
    return KernelVariant(
        op="sampling",
        kernel=kernel,
        arguments=(
            pointer("logits", "fp32"),
            *(pointer(name, dtypes[name]) for name in scratch),
            pointer("highest", "fp32"),
            pointer("drawn", "i32"),
            pointer("message", "i32"),
            pointer("tokens", "i32"),
            pointer("sampling", "i32"),
            integer("max_sequences"),
            integer("tokens_stride"),
        ),
        constants=tuple(constants.items()),
        num_warps=num_warps,
    )
