"""Mistral: the plain decoder with a sliding attention window where the config gives one."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph; the window holds for every layer."""
    window = config.get("sliding_window") or 0
    windows = (window,) * config.get("num_hidden_layers", 0) if window else ()
    return lower_decoder(config, dtype, DecoderTraits("mistral", windows=windows))
