"""Captured sizes waste little and reach as far as they are asked to."""

import itertools

import pytest

from runtime_service.execution.cuda_graphs import decode_buckets, mixed_buckets


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


def test_frequent_sizes_have_no_padding() -> None:
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512} <= set(decode_buckets(512))
