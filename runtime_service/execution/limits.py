"""How many tokens, sequences and KV blocks fit: chosen from free memory, or as flags say."""

from dataclasses import dataclass

from runtime_service.limits import RuntimeLimits
from shared.errors import InvalidField
from shared.ir import Graph

_MAX_SEQUENCES = 64
_MAX_STEP_TOKENS = 512
_BLOCK_TOKENS = 32
# Of what is free once the weights are loaded; the rest is for activations and the machine.
_KV_SHARE = 0.4
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What flags say; None lets the runtime choose.

    Args:
        num_threads: of one op on the CPU.
        block_tokens: tokens of a KV block.
    """

    max_sequence_tokens: int | None = None
    max_sequences: int | None = None
    max_step_tokens: int | None = None
    kv_bytes: int | None = None
    num_threads: int | None = None
    block_tokens: int | None = None


def choose_limits(
    graph: Graph, kv_dtype: str, item_bytes: int, free_bytes: int, options: RunnerOptions
) -> RuntimeLimits:
    """The limits of an engine with `free_bytes` left beside its weights.

    Args:
        kv_dtype: torch's name; `item_bytes` is its size.
    Raises:
        InvalidField: options contradict each other, the model, or the memory.
    """
    max_positions = _config(graph, "max_position_embeddings")
    if options.max_sequence_tokens is not None and options.max_sequence_tokens > max_positions:
        raise InvalidField(
            field="max_sequence_tokens",
            problem=f"{options.max_sequence_tokens} is more than the model's {max_positions}",
        )
    wanted_tokens = options.max_sequence_tokens or max_positions
    max_sequences = options.max_sequences or _MAX_SEQUENCES
    block_tokens = options.block_tokens or _BLOCK_TOKENS
    heads = _config(graph, "num_kv_heads") * _config(graph, "head_dim")
    block_bytes = 2 * _config(graph, "num_layers") * heads * item_bytes * block_tokens
    blocks_of_one = -(-wanted_tokens // block_tokens)
    if options.kv_bytes is not None:
        num_blocks = options.kv_bytes // block_bytes
        reason = f"--kv-bytes says {options.kv_bytes:,}"
    else:
        num_blocks = min(int(free_bytes * _KV_SHARE) // block_bytes, blocks_of_one * max_sequences)
        reason = (
            f"{max_sequences} sequences of {wanted_tokens:,} tokens need no more"
            if num_blocks == blocks_of_one * max_sequences
            else f"{_KV_SHARE:.0%} of the {free_bytes / _GIB:.1f} GiB free beside the weights"
        )
    if num_blocks < blocks_of_one:
        if options.max_sequence_tokens is not None or num_blocks == 0:
            raise InvalidField(
                field="kv_bytes" if options.kv_bytes is not None else "max_sequence_tokens",
                problem=(
                    f"one sequence of {wanted_tokens:,} tokens needs "
                    f"{blocks_of_one * block_bytes:,} bytes of KV cache and there are "
                    f"{num_blocks * block_bytes:,}"
                ),
            )
        reason += f", so sequences are limited to {num_blocks * block_tokens:,} tokens"
    return RuntimeLimits(
        max_sequence_tokens=min(wanted_tokens, num_blocks * block_tokens),
        max_sequences=max_sequences,
        max_step_tokens=options.max_step_tokens or max(_MAX_STEP_TOKENS, max_sequences),
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        kv_dtype=kv_dtype,
        kv_bytes=num_blocks * block_bytes,
        kv_reason=reason,
    )


def _config(graph: Graph, name: str) -> int:
    value = graph.config[name]
    assert isinstance(value, int), f"the graph's {name} is {value!r}"
    return value
