"""Millrace's Python SDK: build engines, and stream what they generate.

    import millrace

    with millrace.Client() as client:
        for chunk in client.generate("Once upon a time", max_new_tokens=64):
            print(chunk.text, end="", flush=True)

`Client` blocks, `AsyncClient` is the same with `await`. What fails raises `MillraceError`. Names
are imported when they are first used, so that the generated protocol code alone stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millrace.aio import AsyncClient
    from millrace.async_stream import AsyncStream
    from millrace.client import Client
    from millrace.errors import MillraceError
    from millrace.generation import Chunk, GenerateOptions, Generation, Message, Prompt, Sample
    from millrace.retries import Retries
    from millrace.session import Session
    from millrace.stream import Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "GenerateOptions",
    "Generation",
    "Message",
    "MillraceError",
    "Prompt",
    "Retries",
    "Sample",
    "Session",
    "Stream",
]

_MODULES = {
    "AsyncClient": "aio",
    "AsyncStream": "async_stream",
    "Retries": "retries",
    "Session": "session",
    "Client": "client",
    "Stream": "stream",
    "MillraceError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'millrace' has no attribute {name!r}")
    return getattr(import_module(f"millrace.{_MODULES.get(name, 'generation')}"), name)
