"""Mistral: the plain decoder with a sliding attention window, unless the config turns it off."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder, uniform_windows
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph; the window holds for every layer."""
    traits = DecoderTraits("mistral", windows=uniform_windows(config))
    return lower_decoder(config, dtype, traits)
