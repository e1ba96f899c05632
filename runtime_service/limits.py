"""The sizes that a runtime chooses when it loads an engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RuntimeLimits:
    """Limits of one loaded engine.

    Args:
        max_sequence_tokens: prompt and generated tokens of one sequence.
        max_sequences: rows; sequences in one step.
        max_step_tokens: tokens in one step, over all sequences.
        block_tokens: tokens in one KV block.
        num_blocks: KV blocks.
        kv_dtype: torch's name without the prefix.
        kv_bytes: bytes of the KV cache.
        kv_reason: why it has this size, one sentence for people.
    """

    max_sequence_tokens: int
    max_sequences: int
    max_step_tokens: int
    block_tokens: int
    num_blocks: int
    kv_dtype: str
    kv_bytes: int
    kv_reason: str
