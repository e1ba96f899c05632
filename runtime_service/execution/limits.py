"""How many tokens, sequences and KV blocks fit: chosen from free memory, or as flags say."""

from dataclasses import dataclass

from kernels.kv_cache import kv_format
from kernels.regimes import BLOCK_TOKENS
from runtime_service.execution.options import RunnerOptions
from runtime_service.limits import RuntimeLimits
from shared.errors import InvalidField
from shared.ir import Graph

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LimitDefaults:
    """What a kind of device takes where no flag says otherwise.

    Args:
        block_tokens: tokens of a KV block.
        kv_share: of the free memory, for the KV cache.
        beside: what has its memory already when free memory is asked for.
        is_exact: more than the free memory cannot be had at all; where it is an estimate, a flag may ask for more.
    """

    max_sequences: int
    max_step_tokens: int
    block_tokens: int
    kv_share: float
    beside: str
    is_exact: bool


# The rest of the memory is for activations and for the machine.
CPU_DEFAULTS = LimitDefaults(64, 512, 32, 0.4, "the weights", is_exact=False)
# The rest is for captured graphs, tables of rows, and what libraries allocate.
GPU_DEFAULTS = LimitDefaults(512, 8192, BLOCK_TOKENS, 0.9, "weights and activations", is_exact=True)


def choose_limits(
    graph: Graph,
    free_bytes: int,
    options: RunnerOptions,
    defaults: LimitDefaults = CPU_DEFAULTS,
) -> RuntimeLimits:
    """The limits of an engine with `free_bytes` left beside what `defaults` name.

    Raises:
        InvalidField: options contradict each other, the model, or the memory.
    """
    _check(options, free_bytes, defaults)
    max_positions = _config(graph, "max_position_embeddings")
    if options.max_sequence_tokens is not None and options.max_sequence_tokens > max_positions:
        raise InvalidField(
            field="max_sequence_tokens",
            problem=f"{options.max_sequence_tokens} is more than the model's {max_positions}",
        )
    wanted_tokens = options.max_sequence_tokens or max_positions
    max_sequences = options.max_sequences or defaults.max_sequences
    block_tokens = options.block_tokens or defaults.block_tokens
    kept = kv_format(graph)
    block_bytes = kept.bytes_per_token(graph) * block_tokens
    blocks_of_one = -(-wanted_tokens // block_tokens)
    if options.kv_bytes is not None:
        num_blocks = options.kv_bytes // block_bytes
        reason = f"--kv-bytes says {options.kv_bytes:,}"
    else:
        num_blocks = min(
            int(free_bytes * defaults.kv_share) // block_bytes, blocks_of_one * max_sequences
        )
        reason = (
            f"{max_sequences} sequences of {wanted_tokens:,} tokens need no more"
            if num_blocks == blocks_of_one * max_sequences
            else f"{defaults.kv_share:.0%} of the {free_bytes / _GIB:.1f} GiB free beside {defaults.beside}"
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
        max_step_tokens=options.max_step_tokens or max(defaults.max_step_tokens, max_sequences),
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        kv_dtype=kept.dtype,
        kv_bytes=num_blocks * block_bytes,
        kv_reason=reason,
    )


def _check(options: RunnerOptions, free_bytes: int, defaults: LimitDefaults) -> None:
    if options.max_sequence_tokens == 1:
        problem = "1 leaves no room for a token behind a prompt; it is at least 2"
        raise InvalidField(field="max_sequence_tokens", problem=problem)
    if defaults.is_exact and options.kv_bytes is not None and options.kv_bytes > free_bytes:
        problem = f"{options.kv_bytes:,} bytes are more than the {free_bytes:,} free beside {defaults.beside}"
        raise InvalidField(field="kv_bytes", problem=problem)


def _config(graph: Graph, name: str) -> int:
    value = graph.config[name]
    assert isinstance(value, int), f"the graph's {name} is {value!r}"
    return value
