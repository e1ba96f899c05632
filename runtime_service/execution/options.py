"""What flags say of an engine's limits. Imports nothing: an engine process reads them before torch is there."""

from dataclasses import dataclass


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
