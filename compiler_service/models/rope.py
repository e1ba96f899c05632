"""Rotary frequencies with every scaling variant folded in: what ops see is `inv_freq` and a factor.

    inv_freq[i] = theta ** (-2 i / D),  i = 0 .. D/2 - 1,  then the variant below

Computed in fp64 by the C library and rounded once to fp32, so that engines are the same bits
everywhere.
Source: Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN); Llama 3.1's model card (llama3).
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import InvalidModel, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Rope:
    """What the ops `rope` and `qkv_rope_write` take.

    Args:
        inv_freq: D/2 angular frequencies, fp32 values.
        attention_scaling: multiplies cos and sin.
        max_positions: longest sequence that the scaling was made for; 0 = as the config says.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    max_positions: int = 0


def rope_of(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The frequencies of a config: `rope_parameters`, or older `rope_theta` and `rope_scaling`.

    Raises:
        UnsupportedModel: a variant without a row in ROPE_VARIANTS, or a partial rotation.
        InvalidModel: the variant lacks a parameter.
    """
    # Where a config has both, transformers takes the older one.
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise InvalidModel(problem=f"config.json's rope_scaling is {given!r}, no object")
    parameters = dict(given)
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise InvalidModel(problem=f"rope_theta is {theta!r}; it must be a number above 1")
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise UnsupportedModel(architecture=f"partial_rotary_factor {share}", known="1.0")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_VARIANTS:
        raise UnsupportedModel(architecture=f"rope_type {kind}", known=", ".join(ROPE_VARIANTS))
    # As transformers has it: the config's own field wins over that among the parameters.
    original = "original_max_position_embeddings"
    if config.get(original) is not None:
        parameters[original] = config[original]
    elif parameters.get(original) is None:
        # What it was trained for, if nothing else is said, is what the config says.
        parameters[original] = config.get("max_position_embeddings")
    plain = [float(theta) ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    try:
        rope = ROPE_VARIANTS[kind](plain, float(theta), parameters)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InvalidModel(problem=f"rope_type {kind} has a bad parameter ({error})") from error
    if len(rope.inv_freq) != head_dim // 2:
        raise InvalidModel(problem=f"rope has {len(rope.inv_freq)} factors for {head_dim // 2}")
    if not all(0 < f < math.inf for f in (*rope.inv_freq, rope.attention_scaling)):
        raise InvalidModel(problem=f"rope_type {kind} gives frequencies that are not positive")
    inv_freq = tuple(_as_float32(f) for f in rope.inv_freq)
    return Rope(inv_freq, _as_float32(rope.attention_scaling), rope.max_positions)


def _default(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> Rope:
    return Rope(tuple(plain))


def _linear(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> Rope:
    return Rope(tuple(f / parameters["factor"] for f in plain))


def _dynamic(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> Rope:
    """Dynamic NTK changes frequencies only beyond max_position_embeddings, which is our limit."""
    return Rope(tuple(plain))


def _divisors(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> Rope:
    """One divisor per frequency: how GGUF files carry a scaling that was computed before."""
    return Rope(tuple(f / d for f, d in zip(plain, parameters["divisors"], strict=True)))


def _llama3(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> Rope:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    factor = float(parameters["factor"])
    original = float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])

    def scaled(frequency: float) -> float:
        waves = original * frequency / (2 * math.pi)
        if waves > high:
            return frequency
        if waves < low:
            return frequency / factor
        smooth = (waves - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return Rope(tuple(scaled(f) for f in plain))


def _yarn(plain: list[float], theta: float, parameters: Mapping[str, Any]) -> Rope:
    """Dims that turn often are kept, dims that turn seldom are stretched, with a ramp between."""
    factor = float(parameters["factor"])
    original = int(parameters["original_max_position_embeddings"])
    head_dim = 2 * len(plain)

    def dim_of(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dim_of(parameters.get("beta_fast") or 32)
    high = dim_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001

    def scaled(i: int, frequency: float) -> float:
        stretch = min(max((i - low) / width, 0.0), 1.0)
        return frequency / factor * stretch + frequency * (1 - stretch)

    inv_freq = tuple(scaled(i, f) for i, f in enumerate(plain))
    return Rope(inv_freq, _yarn_attention_scaling(parameters), int(factor * original))


def _yarn_attention_scaling(parameters: Mapping[str, Any]) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    factor = float(parameters["factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)


def _as_float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


ROPE_VARIANTS: dict[str, Callable[[list[float], float, Mapping[str, Any]], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "divisors": _divisors,
}
