"""Law 2 on the CPU: the linear kernels equal their formula, through Triton's interpreter."""

import pytest

from tests.kernels.interpreted import INTERPRETER, run
from tests.kernels.linear_cases import (
    CANDIDATE_SHAPES,
    DENSE_SHAPES,
    LINEAR_SHAPES,
    ONE_TOKEN_SHAPES,
    check_candidates,
    check_dense,
    check_linear,
    check_quantized_rows,
)


@pytest.mark.parametrize("name", ONE_TOKEN_SHAPES)
def test_one_token_kernel_equals_formula(name: str) -> None:
    check_linear(run, INTERPRETER, LINEAR_SHAPES[name], "one", 1, seed=3)


@pytest.mark.parametrize(("tokens", "split_k"), [(1, 1), (5, 2), (19, 1), (19, 2)])
@pytest.mark.parametrize("name", LINEAR_SHAPES)
def test_few_tokens_kernel_equals_formula(name: str, tokens: int, split_k: int) -> None:
    check_linear(run, INTERPRETER, LINEAR_SHAPES[name], "few", tokens, seed=tokens, split_k=split_k)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", CANDIDATE_SHAPES)
def test_candidates_equal_formula(name: str, tokens: int) -> None:
    """Among them the shipped table's."""
    assert check_candidates(run, INTERPRETER, CANDIDATE_SHAPES[name], tokens) > 1


@pytest.mark.parametrize("name", DENSE_SHAPES)
def test_int4_weight_is_widened_to_its_values(name: str) -> None:
    check_dense(run, INTERPRETER, DENSE_SHAPES[name])


@pytest.mark.parametrize("static_scale", [None, 0.015])
@pytest.mark.parametrize("columns", [96, 257])
def test_rows_are_quantized_as_the_formula_says(columns: int, static_scale: float | None) -> None:
    check_quantized_rows(run, INTERPRETER, columns, static_scale)
