"""How many tokens, sequences and KV blocks fit: chosen from free memory, or as flags say."""

from dataclasses import dataclass

from kernels.kv_cache import kv_format
from kernels.regimes import BLOCK_TOKENS
from runtime_service.execution.options import RunnerOptions
from runtime_service.limits import RuntimeLimits
from shared.errors import InvalidField
from shared.ir import Graph

_GIB = 1 << 30
# Of the free memory, for the KV cache and the tables beside it; the rest is for what is known by running alone:
# captured graphs, and what libraries allocate.
_ALLOCATED_SHARE = 0.95


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
    position_bytes: int = 0,
    most_positions: int | None = None,
) -> RuntimeLimits:
    """The limits of an engine with `free_bytes` left beside what `defaults` name.

    Args:
        position_bytes: what tables that are still to be allocated take for each token of the longest sequence.
        most_positions: of a sequence, for which these tables have places; None = any number.
    Raises:
        InvalidField: options contradict each other, the model, the memory, or the tables.
    """
    max_positions = _config(graph, "max_position_embeddings")
    _check(options, free_bytes, defaults, max_positions)
    num_sequences = options.max_sequences or defaults.max_sequences
    in_tables = max_positions if most_positions is None else min(max_positions, most_positions)
    _check_tables(options, num_sequences, in_tables)
    kept = kv_format(graph)
    block_tokens = options.block_tokens or defaults.block_tokens
    want = _Wanted(
        options.max_sequence_tokens or in_tables,
        num_sequences,
        block_tokens,
        kept.bytes_per_token(graph) * block_tokens,
        position_bytes,
    )
    if options.kv_bytes is not None:
        num_blocks = options.kv_bytes // want.block_bytes
        reason = f"--kv-bytes says {options.kv_bytes:,}"
    else:
        num_blocks, reason = _fitting_blocks(want, free_bytes, defaults)
    if num_blocks < want.blocks_of_one:
        if options.max_sequence_tokens is not None or num_blocks == 0:
            raise InvalidField(
                field="kv_bytes" if options.kv_bytes is not None else "max_sequence_tokens",
                problem=(
                    f"one sequence of {want.sequence_tokens:,} tokens needs "
                    f"{want.blocks_of_one * want.block_bytes:,} bytes of KV cache and there are "
                    f"{num_blocks * want.block_bytes:,}"
                ),
            )
        reason += f", so sequences are limited to {num_blocks * block_tokens:,} tokens"
    elif in_tables < max_positions and want.sequence_tokens == in_tables:
        reason += f"; tables of {num_sequences} sequences have places for {in_tables:,} tokens each"
    return RuntimeLimits(
        max_sequence_tokens=min(want.sequence_tokens, num_blocks * block_tokens),
        max_sequences=want.sequences,
        max_step_tokens=step_tokens(options, defaults),
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        kv_dtype=kept.dtype,
        kv_bytes=num_blocks * want.block_bytes,
        kv_reason=reason,
    )


def step_tokens(options: RunnerOptions, defaults: LimitDefaults) -> int:
    """The most tokens of a step; unless said otherwise, one for each sequence at least."""
    most = max(defaults.max_step_tokens, options.max_sequences or defaults.max_sequences)
    return options.max_step_tokens or most


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of a cache: the longest sequence, in tokens, how many at once, and the sizes of its parts."""

    sequence_tokens: int
    sequences: int
    block_tokens: int
    block_bytes: int
    position_bytes: int

    @property
    def blocks_of_one(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.sequence_tokens // self.block_tokens)


def _fitting_blocks(want: _Wanted, free_bytes: int, defaults: LimitDefaults) -> tuple[int, str]:
    """The blocks of a cache of the usual share, or of less where tables need the room; and why so many."""
    most = want.blocks_of_one * want.sequences
    room = int(free_bytes * _ALLOCATED_SHARE)
    fitting = (room - want.sequence_tokens * want.position_bytes) // want.block_bytes
    if fitting < want.blocks_of_one:  # sequences are as long as the cache, and tables as they are
        fitting = room // (want.block_bytes + want.block_tokens * want.position_bytes)
    share = int(free_bytes * defaults.kv_share) // want.block_bytes
    free = f"{free_bytes / _GIB:.1f} GiB free beside {defaults.beside}"
    if most <= min(share, fitting):
        tokens = f"{want.sequences} sequences of {want.sequence_tokens:,} tokens"
        return most, f"{tokens} need no more"
    if fitting < share:
        return fitting, f"the tables of {want.sequences} sequences leave no more of the {free}"
    return share, f"{defaults.kv_share:.0%} of the {free}"


def _check(
    options: RunnerOptions, free_bytes: int, defaults: LimitDefaults, max_positions: int
) -> None:
    if options.max_sequence_tokens is not None and options.max_sequence_tokens > max_positions:
        problem = f"{options.max_sequence_tokens} is more than the model's {max_positions}"
        raise InvalidField(field="max_sequence_tokens", problem=problem)
    if options.max_sequence_tokens == 1:
        problem = "1 leaves no room for a token behind a prompt; it is at least 2"
        raise InvalidField(field="max_sequence_tokens", problem=problem)
    if defaults.is_exact and options.kv_bytes is not None and options.kv_bytes > free_bytes:
        problem = f"{options.kv_bytes:,} bytes are more than the {free_bytes:,} free beside {defaults.beside}"
        raise InvalidField(field="kv_bytes", problem=problem)


def _check_tables(options: RunnerOptions, num_sequences: int, in_tables: int) -> None:
    asked = options.max_sequence_tokens
    if in_tables < 2 or (asked is not None and asked > in_tables):
        problem = (
            f"tables of {num_sequences} sequences have places for {in_tables:,} tokens each; "
            "fewer sequences or shorter ones fit"
        )
        raise InvalidField(field="max_sequences", problem=problem)


def _config(graph: Graph, name: str) -> int:
    value = graph.config[name]
    assert isinstance(value, int), f"the graph's {name} is {value!r}"
    return value
