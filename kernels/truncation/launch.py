"""The variants and grids of truncated draws. Pure data."""

from kernels.launch import Grid, power_of_two
from kernels.step_inputs.layout import HEADER_WORDS, SAMPLING_WORDS, TRUNCATED
from kernels.variant import Argument, Constant, KernelVariant, integer, pointer

# Digits of a code are searched from its top bit on, a launch a digit; what they leave is listed.
CODE_BITS = 26
DIGIT_BITS = 4
NUM_DIGITS = 3
# Open tokens of a row that fit into its list. After three digits they are fewer than a hundredth of a flat row.
CAPACITY = 4096

_CHUNK = 2048
# A token a thread: then digits and weights need no exchange between threads.
_BLOCK = 256
_FINISH_BLOCK = 2048

_DTYPES = {
    "logits": "fp32", "partials": "fp32", "weights": "fp32", "highest": "fp32",
    "listed_scores": "fp32", "best": "u64",
}  # fmt: skip


def num_chunks(vocab_size: int) -> int:
    """Programs that share a row while it is narrowed."""
    return -(-vocab_size // _CHUNK)


def row_grid(num_sequences: int, vocab_size: int) -> Grid:
    """Programs of `narrow` and `gather`: rows, chunks."""
    return num_sequences, num_chunks(vocab_size), 1


def narrow_variants(vocab_size: int) -> tuple[KernelVariant, ...]:
    """One a digit, in order."""
    chunks = num_chunks(vocab_size)
    pointers = (
        "logits",
        "partials",
        "counters",
        "found",
        "weights",
        "highest",
        "message",
        "sampling",
    )
    return tuple(
        _variant(
            "narrow", pointers, ("max_sequences",),
            {
                "V": vocab_size, "CHUNK": _CHUNK, "NUM_CHUNKS": chunks,
                "PARTS": power_of_two(chunks), "BLOCK": _BLOCK,
                "DIGIT_BITS": DIGIT_BITS, "SHIFT": CODE_BITS - (number + 1) * DIGIT_BITS,
            },
        )
        for number in range(NUM_DIGITS)
    )  # fmt: skip


def gather_variant(vocab_size: int) -> KernelVariant:
    """Lists what is undecided, draws among what is kept."""
    pointers = (
        "logits", "best", "lengths", "listed_tokens", "listed_scores", "found", "highest",
        "message", "sampling",
    )  # fmt: skip
    return _variant("gather", pointers, ("max_sequences",), _of_list(vocab_size, _CHUNK))


def finish_variant(vocab_size: int) -> KernelVariant:
    """Decides what was listed and draws; one program a row."""
    pointers = (
        "logits", "best", "lengths", "listed_tokens", "listed_scores", "found", "weights",
        "highest", "drawn", "message", "tokens", "sampling",
    )  # fmt: skip
    integers = "max_sequences", "tokens_stride"
    return _variant("finish", pointers, integers, _of_list(vocab_size, _FINISH_BLOCK))


def variants(vocab_size: int) -> set[KernelVariant]:
    """Every variant that truncated draws need."""
    return {*narrow_variants(vocab_size), gather_variant(vocab_size), finish_variant(vocab_size)}


def _of_list(vocab_size: int, block: int) -> dict[str, Constant]:
    shift = CODE_BITS - NUM_DIGITS * DIGIT_BITS
    return {"V": vocab_size, "BLOCK": block, "SHIFT": shift, "CAPACITY": CAPACITY}


def _variant(
    kernel: str,
    pointers: tuple[str, ...],
    integers: tuple[str, ...],
    constants: dict[str, Constant],
) -> KernelVariant:
    arguments: list[Argument] = [pointer(name, _DTYPES.get(name, "i32")) for name in pointers]
    constants |= {
        "MODE": TRUNCATED, "HEADER_WORDS": HEADER_WORDS, "SAMPLING_WORDS": SAMPLING_WORDS,
    }  # fmt: skip
    return KernelVariant(
        op="truncation",
        kernel=kernel,
        arguments=(*arguments, *map(integer, integers)),
        constants=tuple(constants.items()),
        num_warps=8,
    )
