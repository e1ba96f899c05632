"""Writes GGUF files out of tiny Hugging Face checkpoints, as llama.cpp's converter does."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.sources import open_checkpoint

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    folder: Path,
    kind: str | Callable[[str], str] = "F32",
    rope_factors: Sequence[float] = (),
    **replaced: Any,
) -> Path:
    """`path`, now a GGUF file of the checkpoint in `folder`.

    Args:
        kind: type of matrices, or of each by its Hugging Face name; vectors stay fp32. K-quants,
            which the library cannot make, get random blocks.
        rope_factors: one divisor per rotary frequency, as Llama 3's scaling is stored.
        replaced: metadata that replaces the right one, dots spelled `__`; None leaves it out.
    """
    checkpoint = open_checkpoint(str(folder))
    family = checkpoint.config["model_type"]
    writer = gguf.GGUFWriter(path, family)
    metadata = {key.replace("__", "."): value for key, value in replaced.items()}
    for key, value in {**_metadata(checkpoint), **metadata}.items():
        _add(writer, key, value)
    for name, info in checkpoint.tensors.items():
        values = _permuted(checkpoint, name).float().numpy()
        wanted = kind if isinstance(kind, str) else kind(name)
        kind_id = gguf.GGMLQuantizationType[wanted if len(info.shape) > 1 else "F32"]
        if kind_id is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), values)
        elif kind_id.name.endswith("_K"):
            blocks = random_blocks(kind_id, values.shape, seed=len(name))
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind_id)
        else:
            writer.add_tensor(gguf_name(name), quantize(values, kind_id), raw_dtype=kind_id)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where a block's fp16 scales lie.
_SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}


def random_blocks(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], seed: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Blocks [N, bytes] of any bits, but for scales, which are as small as a model's."""
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (shape[0], shape[1] // values, num_bytes), dtype=np.uint8)
    for at in _SCALES[kind.name]:
        scales = random.normal(0, 0.0005, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, role = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[role]}.{kind}"


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    family = config["model_type"]
    tokenizer = json.loads(checkpoint.files["tokenizer.json"])
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    tokens += [f"<unused{i}>" for i in range(config["vocab_size"] - len(tokens))]
    return {
        f"{family}.block_count": config["num_hidden_layers"],
        f"{family}.context_length": config["max_position_embeddings"],
        f"{family}.embedding_length": config["hidden_size"],
        f"{family}.feed_forward_length": config["intermediate_size"],
        f"{family}.attention.head_count": config["num_attention_heads"],
        f"{family}.attention.head_count_kv": config["num_key_value_heads"],
        f"{family}.attention.key_length": config["head_dim"],
        f"{family}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{family}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def _permuted(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Llama's q and k rows interleaved for adjacent-pair RoPE, as GGUF has them."""
    tensor = checkpoint.read(name)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    role = name.split(".")[-2]
    if checkpoint.config["model_type"] != "llama" or role not in heads:
        return tensor
    values = tensor.numpy()
    halves = values.reshape(checkpoint.config[heads[role]], 2, -1, *values.shape[1:])
    return torch.from_numpy(np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape))
