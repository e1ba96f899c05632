"""A GGUF file as a checkpoint: config, tokenizer and tensors in Hugging Face's names and order.

Blocks are dequantized by the `gguf` library, a tensor at a time, or kept in a layout of ours that
holds the same values (gguf_blocks.py). Llama's q and k rows are stored
interleaved for another form of RoPE; they are put back into half-rotation order here.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from compiler_service.checkpoints.checkpoint import Quantized, TensorInfo, float_format_of
from compiler_service.checkpoints.gguf_blocks import BLOCK_FORMS
from compiler_service.checkpoints.gguf_header import GgufTensor, read_gguf_header
from compiler_service.checkpoints.gguf_tokenizer import gguf_tokenizer_files
from shared.errors import InvalidModel, UnsupportedModel

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_BLOCK_KINDS = {
    Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
}  # fmt: skip

_CHUNK_VALUES = 1 << 22

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """The checkpoint in a GGUF file, which stays mapped for the object's life."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        header = read_gguf_header(path)
        self.name = name or path.stem
        self.digest_inputs: Mapping[str, Path | bytes] = {"model.gguf": path}
        # Copy-on-write, because torch wants writable memory; nothing is ever written.
        self._data = np.memmap(path, dtype=np.uint8, mode="c")
        self._places = {
            _hugging_face_name(gguf_name): place
            for gguf_name, place in header.tensors.items()
            if gguf_name != _ROPE_FACTORS
        }
        self.tensors = {name: _info(name, place) for name, place in self._places.items()}
        rope_factors = header.tensors.get(_ROPE_FACTORS)
        self.config = _config(
            header.metadata,
            is_tied="lm_head.weight" not in self.tensors,
            rope_factors=None if rope_factors is None else self._values(rope_factors).tolist(),
        )
        self._permuted_heads = _permuted_heads(self.config)
        self.files = gguf_tokenizer_files(header.metadata)
        embedding = self._places.get("model.embed_tokens.weight")
        is_fp32 = embedding is not None and embedding.kind == Kind.F32
        self.float_format = float_format_of(torch.float32 if is_fp32 else torch.bfloat16)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`: floats as the file holds them, blocks as fp32."""
        return self._in_order(name, self._values(self._places[name]))

    def read_packed(self, name: str) -> dict[str, torch.Tensor]:
        """The tensor called `name` by the roles of its own layout."""
        place = self._places[name]
        block_bytes = GGML_QUANT_SIZES[place.kind][1]
        blocks = torch.from_numpy(self._raw(place)).view(place.shape[0], -1, block_bytes)
        # A few rows at a time: what packing needs beside its result stays small.
        some_rows = max(_CHUNK_VALUES // place.shape[1], 1)
        packed = [BLOCK_FORMS[place.kind].pack(rows) for rows in torch.split(blocks, some_rows)]
        joined = packed[0] if len(packed) == 1 else {
            role: torch.cat([piece[role] for piece in packed]) for role in packed[0]
        }  # fmt: skip
        return {role: self._in_order(name, tensor) for role, tensor in joined.items()}

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of q and k in half-rotation order."""
        for role, num_heads in self._permuted_heads.items():
            if f".{role}_proj." in name:
                pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
                return pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def _raw(self, place: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._data[place.offset : place.offset + place.num_bytes]

    def _values(self, place: GgufTensor) -> torch.Tensor:
        raw = self._raw(place)
        if place.kind in _FLOATS:
            return torch.from_numpy(raw).view(_FLOATS[place.kind]).view(place.shape)
        rows = raw.reshape(*place.shape[:-1], -1)
        return torch.from_numpy(dequantize(rows, place.kind)).view(place.shape)


def _hugging_face_name(gguf_name: str) -> str:
    stem, _, kind = gguf_name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is not None and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    raise InvalidModel(problem=f"the GGUF file has a tensor of no known role, {gguf_name}")


def _info(name: str, place: GgufTensor) -> TensorInfo:
    if place.kind in _BLOCK_KINDS:
        form = BLOCK_FORMS.get(place.kind) if len(place.shape) == 2 else None
        layout, group_size = (form.layout, form.group_size) if form else ("", 0)
        quantized = Quantized(place.kind.name, place.num_bytes, layout, group_size)
        return TensorInfo(place.shape, torch.float32, quantized)
    if place.kind not in _FLOATS:
        known = ", ".join(sorted(k.name for k in (*_FLOATS, *_BLOCK_KINDS)))
        raise InvalidModel(problem=f"{name} has type {place.kind.name}; known types: {known}")
    return TensorInfo(place.shape, _FLOATS[place.kind])


def _config(
    metadata: Mapping[str, Any], is_tied: bool, rope_factors: list[float] | None
) -> dict[str, Any]:
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            architecture=f"GGUF in {metadata['split.count']} files",
            known="one file; join them with llama-gguf-split --merge",
        )
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UnsupportedModel(architecture=f"GGUF {family}", known=", ".join(ARCHITECTURES))

    field = partial(_number, metadata, family)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise InvalidModel(problem="the GGUF file has no list tokenizer.ggml.tokens")
    num_heads, hidden_size = field("attention.head_count"), field("embedding_length")
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": field("vocab_size", len(tokens)),
        "hidden_size": hidden_size,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": field("attention.head_count_kv", num_heads),
        "head_dim": _head_dim(metadata, family, num_heads, hidden_size),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _shortest_float32(field("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "rope_parameters": {"rope_theta": _shortest_float32(field("rope.freq_base", 10000.0))},
    }
    config["rope_parameters"] |= _rope_scaling(metadata, family, rope_factors)
    return config


def _number(metadata: Mapping[str, Any], family: str, key: str, default: Any = None) -> Any:
    """The family's number of that name, or the default.

    Raises:
        InvalidModel: there is neither, or it is no number.
    """
    value = metadata.get(f"{family}.{key}", default)
    if value is None:
        raise InvalidModel(problem=f"the GGUF file lacks {family}.{key}")
    if isinstance(value, list):
        raise InvalidModel(problem=f"{family}.{key} differs between layers")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidModel(problem=f"{family}.{key} is {value!r}, no number")
    return value


def _head_dim(metadata: Mapping[str, Any], family: str, num_heads: Any, hidden_size: Any) -> Any:
    """The size of keys, values and what is rotated of them, which must be one.

    Raises:
        InvalidModel: it is not given, and the heads do not share the hidden size evenly.
        UnsupportedModel: they differ.
    """
    key_length = f"{family}.attention.key_length"
    if not num_heads or (hidden_size % num_heads and key_length not in metadata):
        problem = f"{hidden_size} values do not divide among {num_heads} heads"
        raise InvalidModel(problem=f"{problem}, and there is no {key_length}")
    head_dim = _number(metadata, family, "attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = _number(metadata, family, key, head_dim)
        if found != head_dim:
            architecture = f"GGUF with {family}.{key} {found}"
            raise UnsupportedModel(architecture=architecture, known=f"{head_dim}, the head's size")
    return head_dim


def _rope_scaling(
    metadata: Mapping[str, Any], family: str, factors: list[float] | None
) -> dict[str, Any]:
    """GGUF's scaling in config.json's words. Llama 3's is stored as one divisor per frequency."""
    if factors is not None:
        return {"rope_type": "divisors", "divisors": factors}
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    scaling = {"rope_type": kind, "factor": metadata.get(f"{family}.rope.scaling.factor", 1.0)}
    original = metadata.get(f"{family}.rope.scaling.original_context_length")
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _permuted_heads(config: Mapping[str, Any]) -> dict[str, int]:
    if config["model_type"] != "llama":
        return {}
    return {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}


def _shortest_float32(value: float) -> float:
    """The decimal number that was meant: 1e-05, where the file's fp32 reads 9.99999974e-06."""
    return float(str(np.float32(value)))
