"""What torch and the driver say of a GPU without room, in our words; knows neither of them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import DeviceFull


@contextmanager
def device_full(engine: str) -> Iterator[None]:
    """Turns their errors into ours, wherever `engine` asks for memory: while it loads, in a step, or between steps.

    Raises:
        DeviceFull: the GPU holds no more.
    """
    try:
        yield
    except RuntimeError as error:
        problem = what_is_full(error)
        if not problem:
            raise
        raise DeviceFull(engine=engine, problem=problem) from error


def what_is_full(error: RuntimeError) -> str:
    """What was asked for and what was free, as far as `error` says so; "" where it is of another kind."""
    if "out of memory" not in str(error).replace("_", " ").lower():
        return ""
    said = re.search(r"Tried to allocate .+? is free", str(error))
    return said[0] if said else str(error).partition("\n")[0].rstrip(".")
