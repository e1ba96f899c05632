"""The sampler's kernels draw what the host's sampler draws; a step's inputs are what its entries say."""

import pytest

from tests.kernels import interpreted  # first: it sets Triton's switch
from tests.kernels.sampling_cases import check_draws, check_inputs, check_non_finite, check_ties


@pytest.mark.parametrize("vocab_size", [1, 300, 4100])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_draw_the_host_samplers_tokens(vocab_size: int, seed: int) -> None:
    check_draws(interpreted.run, "cpu", vocab_size, seed)


def test_ties_are_broken_and_kept_as_on_the_host() -> None:
    check_ties(interpreted.run, "cpu")


def test_non_finite_logits_are_told_and_keep_no_token() -> None:
    check_non_finite(interpreted.run, "cpu")


@pytest.mark.parametrize("parts", [1, 3])
def test_inputs_are_made_from_entries_and_tables(parts: int) -> None:
    check_inputs(interpreted.run, "cpu", parts)
