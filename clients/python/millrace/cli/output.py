"""How results are shown: tables and sizes for people, JSON for programs.

On a terminal rich draws; elsewhere, and with NO_COLOR, plain aligned text. Results go to stdout,
everything about the work (progress, hints) to stderr.
"""

import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console
    from rich.table import Table

_BETWEEN = "  "  # columns of a table


@cache
def console(is_stderr: bool = False) -> "Console":
    """The rich console of stdout, or of stderr."""
    from rich.console import Console

    return Console(stderr=is_stderr, highlight=False, emoji=False, soft_wrap=True)


def is_fancy(is_stderr: bool = False) -> bool:
    """Claims that colours and redrawn lines are welcome."""
    stream = sys.stderr if is_stderr else sys.stdout
    is_dumb = os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ
    return stream.isatty() and not is_dumb


def say(text: str = "") -> None:
    """One line about the work, for people, on stderr. Markup is rich's."""
    console(is_stderr=True).print(text)


@contextmanager
def waiting(for_what: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal's stderr what is waited for; the line goes once it is there.

    Gives what changes the line.
    """
    if not is_fancy(is_stderr=True):
        yield lambda for_what: None
        return
    from rich.text import Text

    with console(is_stderr=True).status(Text(for_what, "dim")) as status:
        yield lambda for_what: status.update(Text(for_what, "dim"))


def print_line(text: str) -> None:
    """One line of result, plain."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_indented(text: str) -> None:
    """One line of result; on a terminal it is wrapped."""
    print_line(indented(text, console().width) if is_fancy() else text)


def indented(text: str, width: int) -> str:
    """`text`, what does not fit into `width` characters on lines of its own, further in."""
    inset = " " * (len(text) - len(text.lstrip()) + 4)
    lines = textwrap.wrap(
        text, width, subsequent_indent=inset, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print_line(json.dumps(value, ensure_ascii=False))


def to_dict(message: "Message") -> dict[str, Any]:
    """A wire message as JSON knows it, under its own field names, with fields that are unset."""
    from google.protobuf.json_format import MessageToDict

    value: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return value


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    least: Sequence[str] = (),
    width: int | None = None,
) -> "Table":
    """A table as terminals show it.

    Args:
        least: columns to do without on a narrow terminal, the least important one first.
        width: of the terminal, in characters; unset: this one's.
    """
    from rich import box
    from rich.table import Table

    rows = list(rows)
    shown = fitting(columns, rows, least, console().width if width is None else width)
    drawn = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for i in shown:
        # The first one says which row it is: where there is no room, others are folded.
        drawn.add_column(columns[i], no_wrap=not drawn.columns, overflow="fold")
    for row in rows:
        drawn.add_row(*(row[i] for i in shown))
    return drawn


def fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], least: Sequence[str], width: int
) -> list[int]:
    """Indices of the columns that are shown: all but `least`, and of those what `width` has room for, the most
    important ones first."""
    widths = [max(len(c), *(len(row[i]) for row in rows), 0) for i, c in enumerate(columns)]
    shown = {i for i, name in enumerate(columns) if name not in least}
    for name in reversed(least):
        more = shown | {columns.index(name)}
        if sum(widths[i] for i in more) + len(_BETWEEN) * (len(more) - 1) <= width:
            shown = more
    return sorted(shown)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str, least: Sequence[str] = ()
) -> None:
    """A table on stdout; `empty` is said where there are no rows. `least` as `table` has it."""
    if not rows:
        say(empty)
    elif is_fancy():
        console().print(table(columns, rows, least))
    else:
        widths = [
            max(len(column), *(len(row[i]) for row in rows)) for i, column in enumerate(columns)
        ]
        for row in ([column.upper() for column in columns], *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print_line(_BETWEEN.join(cells).rstrip())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout; on a terminal, a value stays in its column where its words fit.

    A longer word, such as a whole digest, is no use in two parts: it has a line of its own.
    """
    width = max(len(name) for name, _ in fields)
    if not is_fancy():
        for name, value in fields:
            print_line(f"{name.ljust(width)}{_BETWEEN}{value}".rstrip())
        return
    from rich.text import Text

    for name, value in fields:
        room = console().width - width - len(_BETWEEN)
        if max(map(len, value.split()), default=0) > room:
            console().print(Text(name, "bold"))
            lines, inset = _wrapped(value, console().width - len(_BETWEEN)), _BETWEEN
        else:
            lines, inset = _wrapped(value, room), " " * width + _BETWEEN
            console().print(Text(name.ljust(width) + _BETWEEN, "bold"), end="")
            console().print(Text(lines.pop(0)))
        for line in lines:
            console().print(Text(inset + line))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of `text` that are no longer, where no word is; at least one."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def bytes_text(size: float) -> str:
    """`134 MB`: powers of ten, as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3:07`, `1:02:03`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def left_text(seconds: float) -> str:
    """`7 s left`, `3:07 left`: an estimate, which knows no hundredths."""
    return f"{duration_text(seconds) if seconds >= 10 else f'{seconds:.0f} s'} left"


def count_text(number: int, noun: str) -> str:
    """`1 runtime`, `2 runtimes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def age_text(unix_s: float) -> str:
    """How long ago that was: `12 s ago`; `-` for 0."""
    if not unix_s:
        return "-"
    age_s = max(0.0, time.time() - unix_s)
    for limit_s, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if age_s < limit_s:
            return f"{age_s / unit_s:.0f} {unit} ago"
    return f"{age_s / 86400:.0f} d ago"


def short_name(name: str) -> str:
    """A resource name cut to what people type: `engines/ab12…` to 12 digits of its digest."""
    return name.rpartition("/")[2][:12]
