"""Llama 2, 3, 3.1 and 3.2, and everything that calls itself a Llama (SmolLM2, TinyLlama, ...)."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.decoder import DecoderTraits, lower_decoder
from compiler_service.models.fields import flag
from shared.ir import Graph


def lower(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph: the plain decoder; biases only where the config asks for them."""
    has_attention_bias = flag(config, "attention_bias")
    traits = DecoderTraits(
        "llama",
        qkv_bias=has_attention_bias,
        o_bias=has_attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
    return lower_decoder(config, dtype, traits)
