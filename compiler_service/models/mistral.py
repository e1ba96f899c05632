"""Mistral: the plain decoder with a sliding attention window, unless the config turns it off; some
layers only where it says so (Ministral)."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder
from compiler_service.models.windows import uniform_windows
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph; the window holds for every layer, unless `layer_types` says for which."""
    traits = DecoderTraits("mistral", windows=uniform_windows(config), default_num_kv_heads=8)
    return lower_decoder(config, dtype, traits)
