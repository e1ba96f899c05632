"""The sampler's kernels draw what the host's sampler draws; a step's inputs are what its entries say."""

import pytest

from tests.runtime_service.execution import interpreted_device  # first: it sets Triton's switch

# isort: split
from tests.kernels import interpreted
from tests.kernels.sampling_cases import (
    Device,
    check_draws,
    check_equal_scores,
    check_inputs,
    check_neighbours,
    check_non_finite,
    check_ties,
)


@pytest.fixture
def device() -> Device:
    return Device(interpreted_device.InterpretedLibrary(), interpreted_device.CpuStream())


@pytest.mark.parametrize("vocab_size", [1, 300, 4100])
@pytest.mark.parametrize("seed", range(2))
def test_kernels_draw_the_host_samplers_tokens(device: Device, vocab_size: int, seed: int) -> None:
    check_draws(device, vocab_size, seed)


def test_kernels_draw_the_host_samplers_tokens_from_flat_rows(device: Device) -> None:
    check_draws(device, 4100, 7, flatness=3.0)


def test_ties_are_broken_and_kept_as_on_the_host(device: Device) -> None:
    check_ties(device)


def test_rows_whose_undecided_tokens_fit_into_no_list_are_drawn(device: Device) -> None:
    check_equal_scores(device, 5000)


def test_a_draw_does_not_depend_on_its_batch(device: Device) -> None:
    check_neighbours(device, 4100)


def test_non_finite_logits_are_told_and_keep_no_token(device: Device) -> None:
    check_non_finite(device)


@pytest.mark.parametrize("parts", [1, 3])
def test_inputs_are_made_from_entries_and_tables(parts: int) -> None:
    check_inputs(interpreted.run, "cpu", parts)
