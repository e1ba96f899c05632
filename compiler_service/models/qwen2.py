"""Qwen2 and Qwen2.5: q, k and v add a bias; later layers may have a sliding window."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder
from compiler_service.models.windows import sliding_windows
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph."""
    windows = sliding_windows(config)
    traits = DecoderTraits("qwen2", qkv_bias=True, windows=windows, default_num_kv_heads=32)
    return lower_decoder(config, dtype, traits)
