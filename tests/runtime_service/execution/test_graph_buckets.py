"""Captured sizes waste little and reach as far as they are asked to."""

import itertools

import pytest

from runtime_service.execution.cuda_graphs import (
    decode_buckets,
    first_graphs,
    graphs_to_capture,
    launched_buckets,
    mixed_buckets,
)
from runtime_service.limits import RuntimeLimits


@pytest.mark.parametrize("most", [1, 7, 16, 17, 64, 100, 512])
def test_buckets_grow_up_to_the_most(most: int) -> None:
    for buckets in (decode_buckets(most), mixed_buckets(most)):
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == most


def test_less_than_a_tenth_of_a_step_is_padding() -> None:
    buckets = mixed_buckets(512)
    for smaller, bucket in itertools.pairwise(buckets):
        assert (bucket - (smaller + 1)) / bucket < 0.1
    assert len(decode_buckets(512)) + len(buckets) < 80


@pytest.mark.parametrize("most", [1, 8, 16, 17, 100, 512, 8192])
def test_launched_steps_have_few_sizes_that_are_at_most_half_as_large_again(most: int) -> None:
    buckets = launched_buckets(most)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == most
    assert len(buckets) <= 2 * most.bit_length()
    for smaller, bucket in itertools.pairwise(buckets):
        assert bucket <= 1.5 * smaller


def test_frequent_sizes_have_no_padding() -> None:
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512} <= set(decode_buckets(512))


def _limits(max_sequences: int, max_step_tokens: int) -> RuntimeLimits:
    return RuntimeLimits(4096, max_sequences, max_step_tokens, 16, 256, "bfloat16", 0, "")


@pytest.mark.parametrize(
    ("max_sequences", "max_step_tokens", "most_decoding"),
    [(512, 64, 512), (48, 8192, 512), (300, 300, 256), (1, 1, 512), (512, 8192, 512)],
)
def test_no_graph_is_larger_than_a_step_can_be(
    max_sequences: int, max_step_tokens: int, most_decoding: int
) -> None:
    """Its inputs and activations have places for `max_step_tokens` alone: padding beyond them overwrites others."""
    keys = graphs_to_capture(_limits(max_sequences, max_step_tokens), most_decoding)
    decode = [bucket for is_decode, bucket in keys if is_decode]
    mixed = [bucket for is_decode, bucket in keys if not is_decode]
    assert decode[0] == min(max_sequences, max_step_tokens, most_decoding, 512)
    assert mixed[0] == min(max_step_tokens, 512)
    assert decode == sorted(decode, reverse=True)
    assert mixed == sorted(mixed, reverse=True)


@pytest.mark.parametrize("max_sequences", [1, 48, 300, 512])
def test_every_decode_step_that_gets_a_graph_has_one_from_the_start(max_sequences: int) -> None:
    keys = graphs_to_capture(_limits(max_sequences, 8192), 512)
    first = first_graphs(keys)
    assert max(b for is_decode, b in first if is_decode) == max_sequences
    assert max(b for is_decode, b in first if not is_decode) == 512
    assert len(first) < 20
    assert first_graphs([]) == []
