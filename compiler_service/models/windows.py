"""Sliding attention windows: which layers of a config.json have one, in tokens; 0 = none."""

from collections.abc import Mapping
from typing import Any

from compiler_service.models.fields import flag, num_layers_of, positive
from shared.errors import InvalidModel, UnsupportedModel

# What transformers' MistralConfig, Qwen2Config and Qwen3Config say where config.json does not.
_DEFAULT_WINDOW, _DEFAULT_WINDOW_LAYERS = 4096, 28
_LAYER_TYPES = ("full_attention", "sliding_attention")


def uniform_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window where a config's window holds for all of them; null turns it off.

    Where there are `layer_types` they say for which, as in Ministral.
    """
    return _windows(config, _window(config), first=0)


def sliding_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window where a config turns windows on by `use_sliding_window`.

    `layer_types` says which layers; where it is missing, those from `max_window_layers` on.
    """
    first = config.get("max_window_layers", _DEFAULT_WINDOW_LAYERS)
    window = _window(config) if flag(config, "use_sliding_window") else 0
    if window and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
        raise InvalidModel(problem=f"config.json's max_window_layers is {first!r}")
    return _windows(config, window, first)


def _windows(config: Mapping[str, Any], window: int, first: int) -> tuple[int, ...]:
    """`window` for layers that slide: as `layer_types` says, else those from `first` on."""
    num_layers = num_layers_of(config)
    layer_types = config.get("layer_types")
    if layer_types is None:
        return tuple(window if window and layer >= first else 0 for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        found = len(layer_types) if isinstance(layer_types, list) else f"{layer_types!r} as"
        raise InvalidModel(problem=f"{found} layer_types for {num_layers} layers")
    for kind in layer_types:
        if kind not in _LAYER_TYPES:
            known = ", ".join(_LAYER_TYPES)
            raise UnsupportedModel(architecture=f"layer type {kind}", known=known)
    if not window and "sliding_attention" in layer_types:
        problem = "layer_types has sliding_attention, and config.json turns sliding windows off"
        raise InvalidModel(problem=problem)
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def _window(config: Mapping[str, Any]) -> int:
    """0 where it is null; a config that says nothing means the default of its family."""
    value = config.get("sliding_window", _DEFAULT_WINDOW)
    if value is None:
        return 0
    return positive(config, "sliding_window", _DEFAULT_WINDOW)
