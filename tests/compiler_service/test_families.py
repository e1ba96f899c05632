"""Law 6: families match transformers, logits and text; what no family does is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.models import FAMILIES, lower_model
from compiler_service.models.rope import ROPE_VARIANTS, rope_of
from compiler_service.passes import run_passes
from compiler_service.weight_table import require_tensors
from kernels.ops import OPS
from kernels.reference import prompt_batch, run
from shared.errors import InvalidModel, UnsupportedModel
from tests.checkpoints import ARCHITECTURES, LLAMA3_ROPE, tiny_config, write_checkpoint
from tests.compiler_service.dense_weights import dense_weights

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ARCHITECTURES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "dynamic-rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
    "yarn-rope": ("qwen2", {"rope_scaling": YARN}),
    "rope-parameters": ("llama", {"rope_parameters": {"rope_theta": 500.0, **LLAMA3_ROPE}}),
    "rope-scaling-beside-parameters": (
        "llama",
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": YARN},
    ),
    "yarn-original-beside-scaling": (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 128},
    ),
    "llama3-original-beside-scaling": (
        "llama",
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
    ),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-window-of-some-layers": (
        "mistral",
        {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama-swish": ("llama", {"hidden_act": "swish"}),
    # What other architectures read in their configs means nothing in this one.
    "llama-fields-of-others": (
        "llama",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 5.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.2,
            "no_rope_layers": [0, 1],
        },
    ),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-default-window": (
        "qwen2",
        {"use_sliding_window": True, "num_hidden_layers": 3, "max_position_embeddings": 128},
    ),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6}),
}
NUM_TOKENS = 75


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(3, 260, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed))


def _reference_logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    graph = run_passes(lower_model(checkpoint.config, "float32"), OPS)
    require_tensors(graph, checkpoint.tensors)
    weights = dense_weights(graph, checkpoint, torch.float32)
    batch = prompt_batch(graph, [len(tokens)])
    return run(graph, weights, tokens.int(), batch)["logits"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    family, sizes = VARIANTS[variant]
    folder = write_checkpoint(tmp_path, family, seed=1, **sizes)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = _tokens(seed=1)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    logits = _reference_logits(open_checkpoint(str(folder)), tokens)
    assert float((logits - expected).abs().max()) <= 1e-4
    assert float(expected.std()) > 0.5


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_greedy_text_equals_that_of_transformers(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, family, seed=2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = _tokens(seed=2)[:20]
    generated = model.generate(
        tokens[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0]
    checkpoint = open_checkpoint(str(folder))
    # One run over the whole text: every greedy token is the argmax after the tokens before it.
    logits = _reference_logits(checkpoint, generated[:-1])
    assert logits[len(tokens) - 1 :].argmax(-1).tolist() == generated[len(tokens) :].tolist()


LEFT_OUT = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4},
    "qwen2": {"num_attention_heads": 64, "num_key_value_heads": 32, "hidden_size": 128}
    | {"head_dim": 2},
    "qwen3": {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_heads_that_a_config_leaves_out_are_those_of_transformers(
    family: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, family, seed=3, **LEFT_OUT[family])
    config = json.loads((folder / "config.json").read_text())
    del config["num_key_value_heads"], config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = _tokens(seed=3)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    logits = _reference_logits(open_checkpoint(str(folder)), tokens)
    assert float((logits - expected).abs().max()) <= 1e-4


def test_random_model_has_the_heads_that_its_family_leaves_out(tmp_path: Path) -> None:
    config = tiny_config("qwen3", num_attention_heads=32, num_key_value_heads=32)
    del config["head_dim"], config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = open_checkpoint(f"random:{tmp_path}/config.json").tensors
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (32 * 128, 64)
    assert tensors["model.layers.0.self_attn.q_norm.weight"].shape == (128,)


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert set(ARCHITECTURES.values()) == set(FAMILIES)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "architecture": ({"architectures": ["MambaForCausalLM"]}, UnsupportedModel, "MambaForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, UnsupportedModel, "gelu"),
    "rope variant": ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModel, "longrope"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, UnsupportedModel, "0.5"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModel, "awq"),
    "rope parameter": ({"rope_scaling": {"rope_type": "linear"}}, InvalidModel, "factor"),
    "missing size": ({"hidden_size": None}, InvalidModel, "hidden_size is missing"),
    "negative size": ({"num_hidden_layers": -1}, InvalidModel, "num_hidden_layers is -1"),
    "text size": ({"vocab_size": "many"}, InvalidModel, "vocab_size is 'many'"),
    "heads that do not divide": (
        {"hidden_size": 66, "head_dim": None},
        InvalidModel,
        "66 values do not divide among 4 heads, and there is no head_dim",
    ),
    "too many layers": ({"num_hidden_layers": 10**30}, InvalidModel, "from 1 to 4096"),
    "text for eps": ({"rms_norm_eps": "small"}, InvalidModel, "rms_norm_eps is 'small'"),
    "theta": ({"rope_theta": -3}, InvalidModel, "rope_theta is -3"),
    "rope no object": ({"rope_scaling": "yarn"}, InvalidModel, "rope_scaling is 'yarn'"),
    "negative stretch": (
        {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        InvalidModel,
        "frequencies that are not positive",
    ),
    "architectures": ({"architectures": "Llama"}, InvalidModel, "'Llama', no list"),
    "kv heads": ({"num_key_value_heads": 3}, InvalidModel, "3 key-value heads"),
    "odd head": ({"head_dim": 15}, InvalidModel, "head_dim 15"),
    "window that is off and slides": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "layer_types": ["sliding_attention", "full_attention"],
        },
        InvalidModel,
        "layer_types has sliding_attention, and config.json turns sliding windows off",
    ),
    "window that is null and slides": (
        {
            "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        InvalidModel,
        "layer_types has sliding_attention, and config.json turns sliding windows off",
    ),
    "text for a flag": (
        {"tie_word_embeddings": "false"},
        InvalidModel,
        "tie_word_embeddings is 'false'; it must be true or false",
    ),
    "layer types": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention"],
        },
        InvalidModel,
        "1 layer_types for 2 layers",
    ),
    "layer type": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        UnsupportedModel,
        "layer type chunked_attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_is_refused_with_one_clear_line(case: str) -> None:
    fields, error, what = REFUSED[case]
    with pytest.raises(error) as refused:
        lower_model(tiny_config("llama", **fields), "bfloat16")
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rope_frequencies_are_fp32_numbers(variant: str) -> None:
    """So graph.json reads the same in every precision."""
    parameters = {**LLAMA3_ROPE, "rope_type": variant, "divisors": [1.0, 2.0, 3.0, 4.0]}
    rope = rope_of({"rope_parameters": parameters, "max_position_embeddings": 512}, head_dim=8)
    values = torch.tensor(rope.inv_freq, dtype=torch.float64)
    assert torch.equal(values, values.float().double())


def test_config_that_says_yarn_reaches_its_stretched_length() -> None:
    graph = lower_model(tiny_config("llama", rope_scaling={**YARN, "factor": 40.0}), "bfloat16")
    assert graph.config["max_position_embeddings"] == 1280


def _windows(config: dict[str, Any]) -> list[object]:
    graph = lower_model(config, "bfloat16")
    return [node.attrs["window"] for node in graph.nodes if node.op == "attention"]


def test_window_that_a_config_leaves_out_is_its_familys_default() -> None:
    """As transformers' config classes say; null is what turns a window off."""
    mistral = tiny_config("mistral")
    assert _windows({**mistral, "sliding_window": None}) == [0, 0]
    del mistral["sliding_window"]
    assert _windows(mistral) == [4096, 4096]
    qwen = tiny_config("qwen2", use_sliding_window=True, num_hidden_layers=30)
    assert _windows(qwen) == [0] * 28 + [4096] * 2
    assert _windows({**qwen, "use_sliding_window": False}) == [0] * 30
