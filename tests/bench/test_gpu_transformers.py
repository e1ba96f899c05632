"""What the GPU benchmark makes of transformers' continuous batching: a real one takes most of a machine's memory."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from bench.gpu_transformers import continuous

_SETTINGS = GenerationConfig(max_new_tokens=2)  # type: ignore[no-untyped-call]


def _model(*outputs: SimpleNamespace) -> SimpleNamespace:
    """Answers each prompt with the output beside it."""

    def generate_batch(inputs: list[list[int]], **_: object) -> dict[str, SimpleNamespace]:
        return {f"req_{n}": out for n, (_, out) in enumerate(zip(inputs, outputs, strict=True))}

    return SimpleNamespace(generate_batch=generate_batch)


def _output(*token_ids: int, error: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(generated_tokens=list(token_ids), error=error)


def test_the_tokens_of_all_requests_are_counted() -> None:
    prompts = torch.zeros(2, 8, dtype=torch.long)
    assert continuous(_model(_output(5, 6), _output(7)), prompts, _SETTINGS) == 3


def test_a_failed_request_fails_the_case() -> None:
    prompts = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(RuntimeError, match="out of blocks"):
        continuous(_model(_output(5, 6), _output(error="out of blocks")), prompts, _SETTINGS)
