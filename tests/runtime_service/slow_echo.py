"""The echo engine at 100 steps a second, for tests that need something to be running."""

from typing import Any

from runtime_service.engine_core import LoadedEngine
from tests.runtime_service import echo_engine


def load(**arguments: Any) -> LoadedEngine:
    """The loader."""
    return echo_engine.load(**arguments, step_s=0.01)
