"""Sizes are chosen from memory and said why; flags override; contradictions are errors."""

from dataclasses import replace

import pytest

from kernels.step_inputs.layout import TableLayout
from runtime_service.execution.device_rows import DeviceRows
from runtime_service.execution.limits import GPU_DEFAULTS, choose_limits
from runtime_service.execution.options import RunnerOptions
from runtime_service.limits import RuntimeLimits
from shared.errors import InvalidField
from shared.ir import Graph

# 2 (k, v) * 2 layers * 64 values * 2 bytes: a token takes 512 bytes.
GRAPH = Graph({}, (), (), {}, {
    "dtype": "bfloat16", "num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
})  # fmt: skip
TOKEN_BYTES = 512
BLOCK_BYTES = 32 * TOKEN_BYTES


def choose(free_bytes: int, **options: int) -> object:
    return choose_limits(GRAPH, free_bytes, RunnerOptions(**options))


def test_cache_is_no_larger_than_all_rows_can_use() -> None:
    limits = choose_limits(GRAPH, 1 << 40, RunnerOptions(max_sequences=3))
    assert limits.num_blocks == 3 * 1024 // 32
    assert limits.kv_bytes == limits.num_blocks * BLOCK_BYTES
    assert limits.kv_reason == "3 sequences of 1,024 tokens need no more"


def test_cache_takes_a_share_of_what_is_free() -> None:
    limits = choose_limits(GRAPH, 100 * BLOCK_BYTES, RunnerOptions())
    assert limits.num_blocks == 40
    assert limits.max_sequence_tokens == 1024
    assert "40% of the" in limits.kv_reason


def test_codes_of_eight_bits_and_their_scales_take_little_more_than_half() -> None:
    """1 byte a value, and 4 for each of the two heads' keys and values in two layers: 288 bytes for 512."""
    graph = replace(GRAPH, config={**GRAPH.config, "kv_cache": "fp8"})
    limits = choose_limits(graph, 0, RunnerOptions(kv_bytes=32 * 288 * 40))
    assert (limits.num_blocks, limits.kv_dtype) == (40, "float8_e4m3fn")
    assert limits.kv_bytes == 32 * 288 * 40


def test_gpu_takes_more_of_everything_and_says_why() -> None:
    free = 1000 * BLOCK_BYTES
    limits = choose_limits(GRAPH, free, RunnerOptions(), GPU_DEFAULTS)
    assert (limits.max_sequences, limits.max_step_tokens, limits.block_tokens) == (512, 8192, 16)
    assert limits.num_blocks == 1800
    assert "90% of the" in limits.kv_reason
    assert limits.kv_reason.endswith("free beside weights and activations")


def test_sequences_shorten_where_memory_is_short() -> None:
    limits = choose_limits(GRAPH, 20 * BLOCK_BYTES, RunnerOptions())
    assert limits.max_sequence_tokens == 8 * 32
    assert limits.kv_reason.endswith("so sequences are limited to 256 tokens")


def test_flags_override() -> None:
    options = RunnerOptions(
        max_sequence_tokens=100, max_sequences=5, max_step_tokens=7, kv_bytes=10 * BLOCK_BYTES + 1
    )
    limits = choose_limits(GRAPH, 0, options)
    assert (limits.max_sequence_tokens, limits.max_sequences) == (100, 5)
    assert (limits.max_step_tokens, limits.num_blocks) == (7, 10)
    assert "--kv-bytes" in limits.kv_reason


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_sequence_tokens": 1025}, "max_sequence_tokens"),
        ({"max_sequence_tokens": 1000, "kv_bytes": 20 * BLOCK_BYTES}, "kv_bytes"),
        ({"kv_bytes": BLOCK_BYTES - 1}, "kv_bytes"),
        ({"max_sequence_tokens": 1000}, "max_sequence_tokens"),
        ({"max_sequence_tokens": 1}, "max_sequence_tokens"),
    ],
)
def test_contradiction_is_an_error_that_names_the_flag(options: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidField) as raised:
        choose(10 * BLOCK_BYTES, **options)
    assert raised.value.fields["field"] == field


def test_more_than_a_gpu_has_free_is_refused_before_it_is_asked_for() -> None:
    free = 100 * BLOCK_BYTES
    limits = choose_limits(GRAPH, free, RunnerOptions(kv_bytes=free), GPU_DEFAULTS)
    assert limits.kv_bytes == free
    with pytest.raises(InvalidField, match=r"1,638,401 bytes are more than the 1,638,400 free"):
        choose_limits(GRAPH, free, RunnerOptions(kv_bytes=free + 1), GPU_DEFAULTS)


@pytest.mark.parametrize("position_bytes", [0, 64, 512, 4096])
@pytest.mark.parametrize("num_free_blocks", [20, 66, 1000, 100_000])
def test_tables_of_long_sequences_have_room_beside_the_cache(
    position_bytes: int, num_free_blocks: int
) -> None:
    """They are allocated after it: what a small cache leaves free may be less than they take."""
    free = num_free_blocks * BLOCK_BYTES
    limits = choose_limits(GRAPH, free, RunnerOptions(), GPU_DEFAULTS, position_bytes)
    taken = limits.kv_bytes + limits.max_sequence_tokens * position_bytes
    assert taken <= 0.95 * free
    alone = choose_limits(GRAPH, free, RunnerOptions(), GPU_DEFAULTS)
    if limits.num_blocks < alone.num_blocks:
        assert "the tables of 512 sequences leave no more of the" in limits.kv_reason
        block = 16 * (TOKEN_BYTES + position_bytes)
        assert taken + block > 0.95 * free, "a block more had fitted"
    if position_bytes * 1024 < 0.05 * free:
        assert limits == alone


_LONG = replace(GRAPH, config={**GRAPH.config, "max_position_embeddings": 10 << 20})


def choose_with_tables(free_bytes: int, options: RunnerOptions, block_tokens: int) -> RuntimeLimits:
    """As the GPU path chooses."""
    sequences = options.max_sequences or GPU_DEFAULTS.max_sequences
    return choose_limits(
        _LONG, free_bytes, replace(options, block_tokens=block_tokens), GPU_DEFAULTS,
        DeviceRows.position_bytes(sequences, block_tokens),
        DeviceRows.most_positions(sequences, block_tokens),
    )  # fmt: skip


@pytest.mark.parametrize("block_tokens", [8, 16, 32])
@pytest.mark.parametrize("max_sequences", [1, 7, 200, 512, 4096, 65_536])
@pytest.mark.parametrize("gigabytes", [8, 80, 141, 180, 4096])
def test_every_place_in_the_tables_has_a_name_of_31_bits(
    gigabytes: int, max_sequences: int, block_tokens: int
) -> None:
    """Whatever the card holds; and a sequence that is longer by some blocks had places without one."""
    options = RunnerOptions(max_sequences=max_sequences)
    limits = choose_with_tables(gigabytes << 30, options, block_tokens)
    assert _table_words(limits, 0) < 1 << 31
    if "tables of" in limits.kv_reason and "have places for" in limits.kv_reason:
        assert _table_words(limits, 3 * block_tokens) >= 1 << 31


def _table_words(limits: RuntimeLimits, more_tokens: int) -> int:
    tokens = limits.max_sequence_tokens + more_tokens
    blocks = -(-tokens // limits.block_tokens)
    return TableLayout(limits.max_sequences, tokens + 1, blocks).num_words


def test_tables_that_shorten_sequences_are_named() -> None:
    """512 sequences of ten million tokens: 5.4 billion places, on a card that has the memory."""
    limits = choose_with_tables(180 << 30, RunnerOptions(), 16)
    assert limits.max_sequence_tokens == 3_945_393
    assert limits.kv_reason.endswith(
        "; tables of 512 sequences have places for 3,945,393 tokens each"
    )


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (RunnerOptions(max_sequences=4096, max_sequence_tokens=1 << 20), "491,261"),
        (RunnerOptions(max_sequences=1 << 20), "0"),
    ],
)
def test_more_than_tables_have_places_for_is_refused(options: RunnerOptions, places: str) -> None:
    with pytest.raises(InvalidField, match=f"have places for {places} tokens each") as raised:
        choose_with_tables(180 << 30, options, 16)
    assert raised.value.fields["field"] == "max_sequences"
