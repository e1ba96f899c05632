"""Model families, a row each: config.json to graph. The runtime knows none of this."""

from collections.abc import Callable, Mapping
from typing import Any

from compiler_service.models import llama, mistral, qwen2, qwen3
from shared.errors import InvalidModel, UnsupportedModel
from shared.ir import Graph

FAMILIES: dict[str, Callable[[Mapping[str, Any], str], Graph]] = {
    "LlamaForCausalLM": llama.lower,
    "MistralForCausalLM": mistral.lower,
    "Qwen2ForCausalLM": qwen2.lower,
    "Qwen3ForCausalLM": qwen3.lower,
}


def lower_model(config: Mapping[str, Any], dtype: str) -> Graph:
    """The unfused graph of a config.json.

    Args:
        dtype: of activations, torch's name without the prefix.

    Raises:
        UnsupportedModel: its architecture has no family, or a feature that none has.
        InvalidModel: its fields contradict each other.
    """
    architectures = config.get("architectures") or [config.get("model_type") or "unnamed"]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise InvalidModel(problem=f"config.json's architectures is {architectures!r}, no list")
    lower = FAMILIES.get(architectures[0])
    if lower is None:
        raise UnsupportedModel(architecture=architectures[0], known=", ".join(FAMILIES))
    # A checkpoint that is quantized tells its config without it.
    if settings := config.get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise UnsupportedModel(
            architecture=f"{architectures[0]}, already quantized by {method}",
            known="configs of float weights here",
        )
    return lower(config, dtype)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with this config holds."""
    graph = lower_model(config, "bfloat16")
    return {
        part: (rows, *weight.shape[1:])
        for weight in graph.weights.values()
        for part, rows in zip(weight.parts, weight.part_rows, strict=True)
    }
