"""Qwen3 (dense): q and k are normalized per head before RoPE."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder
from compiler_service.models.fields import flag
from compiler_service.models.windows import sliding_windows
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph; biases only where the config asks for them."""
    has_bias = flag(config, "attention_bias")
    traits = DecoderTraits(
        "qwen3",
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        windows=sliding_windows(config),
        default_head_dim=128,
        default_num_kv_heads=32,
    )
    return lower_decoder(config, dtype, traits)
