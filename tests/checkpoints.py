"""Tiny random checkpoints in Hugging Face form, real enough for transformers to load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compiler_service.checkpoints.byte_tokenizer import (
    END_OF_TEXT_ID,
    IM_END_ID,
    byte_tokenizer_files,
)

# A matrix that a checkpoint of any family has.
DOWN = "model.layers.1.mlp.down_proj.weight"

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
}


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    *,
    num_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Path:
    """`folder`, now holding a random checkpoint of `family` with a byte-level tokenizer.

    Args:
        family: a key of ARCHITECTURES.
        num_shards: safetensors files; more than 1 also writes the index.
        sizes: entries of config.json that replace the defaults, such as `hidden_size=96`,
            `tie_word_embeddings=True` or `rope_scaling=LLAMA3_ROPE`.
    """
    config = tiny_config(family, dtype=dtype, **sizes)
    tensors = _random_tensors(config, seed, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in byte_tokenizer_files().items():
        (folder / name).write_bytes(content)
    _save(folder, tensors, num_shards)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Does `edit` to the folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tiny_config(family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    """config.json of a tiny model of `family`; `sizes` replace the defaults."""
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": IM_END_ID,
        **_FAMILY_CONFIG[family],
        **sizes,
    }


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
            if config["model_type"] == "qwen3" and name != "v":
                shapes[f"{layer}self_attn.{name}_norm.weight"] = (dim,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, q_rows)
        shapes[f"{layer}mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        if config.get("attention_bias"):
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if config.get("mlp_bias"):
            for name, rows in (("gate", ffn), ("up", ffn), ("down", hidden)):
                shapes[f"{layer}mlp.{name}_proj.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _random_tensors(
    config: dict[str, Any], seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = 1 + 0.2 * noise
        elif name.endswith("bias"):
            noise = 0.2 * noise
        else:
            # Spreads the logits, so that greedy tokens are decided by more than rounding.
            noise = noise * (2.0 / shape[-1] ** 0.5)
        tensors[name] = noise.to(dtype)
    return tensors


def _save(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        mine = {n: tensors[n] for n in names[shard::num_shards]}
        save_file(mine, folder / file_name, metadata=metadata)
        weight_map.update(dict.fromkeys(mine, file_name))
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
