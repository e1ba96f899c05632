"""Logging: structlog events with fields, JSON lines for machines or colours on a terminal.

Events are facts in snake_case; context that holds for a whole RPC, build or generation is bound
once, at the edge, with `structlog.contextvars`. Prompts and tokens are never logged; tracebacks are
printed without local variables, which could hold them.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import Context
from typing import Any, Literal

import structlog

LogFormat = Literal["auto", "console", "json"]


def configure_logging(level: str, log_format: LogFormat, component: str) -> None:
    """Sets up logging for this process, to stderr; libraries' records go the same way.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        component: `compiler`, `runtime`, ...: a field of every line.
    """
    is_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())

    def add_component(
        _: object, __: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event.setdefault("component", component)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_component,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if is_json
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *rendering,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # They tell every request with its whole URL, and those that registries redirect to hold signatures.
    for library in ("httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.WARNING)


class Tally:
    """An event that comes by the thousand when there is too much to do: a line a second says how often, not one each.

    Needs a running event loop. The context of whoever comes first is not that of the others, and is left out.
    """

    def __init__(self, event: str, period_s: float = 1.0, **fields: object) -> None:
        self._event, self._period_s, self._fields = event, period_s, fields
        self._count = 0
        self._pause: asyncio.TimerHandle | None = None

    def add(self) -> None:
        """It came once more. The first time is told at once, what comes after it when the period is over."""
        self._count += 1
        if self._pause is None:
            self._tell()

    def _tell(self) -> None:
        self._pause = None
        if not self._count:
            return
        nobodys = Context()
        log = structlog.get_logger()
        nobodys.run(log.info, self._event, count=self._count, **self._fields)
        self._count = 0
        loop = asyncio.get_running_loop()
        self._pause = loop.call_later(self._period_s, self._tell, context=nobodys)


@contextmanager
def canonical_line(
    event: str, *, is_quiet: bool = False, **fields: object
) -> Iterator[dict[str, Any]]:
    """One log line when the block ends, with `duration_s` and all that the block put in the dict.

    An exception that leaves the block is named in `error`, at WARNING, and goes on: its traceback
    is for whoever handles it to log.

    Args:
        is_quiet: the line is at DEBUG, unless it is a warning.
    """
    line: dict[str, Any] = dict(fields)
    start = time.monotonic()
    log = structlog.get_logger()
    emit = log.debug if is_quiet else log.info
    try:
        yield line
    except BaseException as error:
        line.setdefault("error", type(error).__name__)
        if not isinstance(error, asyncio.CancelledError):  # a caller that left is no warning
            emit = log.warning
        raise
    finally:
        emit(event, duration_s=round(time.monotonic() - start, 6), **line)
