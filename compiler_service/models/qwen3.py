"""Qwen3 (dense): q and k are normalized per head before RoPE."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder, sliding_windows
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph; biases only where the config asks for them."""
    has_bias = bool(config.get("attention_bias", False))
    traits = DecoderTraits(
        "qwen3",
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        windows=sliding_windows(config),
    )
    return lower_decoder(config, dtype, traits)
