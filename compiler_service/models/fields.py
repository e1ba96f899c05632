"""Fields of a config.json, checked: what is missing, of another type or absurd is refused by name."""

from collections.abc import Mapping
from typing import Any

from shared.errors import InvalidModel

# Beyond these a config is corrupt, and lowering it would take forever.
_MOST, _MOST_LAYERS = (1 << 31) - 1, 4096


def positive(
    config: Mapping[str, Any], name: str, default: int | None = None, most: int = _MOST
) -> int:
    """A whole number from 1 to `most`; `default` where it is missing or null.

    Raises:
        InvalidModel: it is not, or there is no default.
    """
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        found = "is missing" if value is None else f"is {value!r}"
        wanted = f"a whole number from 1 to {most}"
        raise InvalidModel(problem=f"config.json's {name} {found}; it must be {wanted}")
    return value


def num_layers_of(config: Mapping[str, Any]) -> int:
    """How many layers the decoder has."""
    return positive(config, "num_hidden_layers", most=_MOST_LAYERS)


def fraction(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number between 0 and 1; `default` where it is missing or null.

    Raises:
        InvalidModel: it is not.
    """
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        problem = f"config.json's {name} is {value!r}; it must be between 0 and 1"
        raise InvalidModel(problem=problem)
    return float(value)


def flag(config: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false where it is missing or null.

    Raises:
        InvalidModel: it is neither.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidModel(problem=f"config.json's {name} is {value!r}; it must be true or false")
    return bool(value)
