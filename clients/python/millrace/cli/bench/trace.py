"""Traces of real traffic: a CSV with a moment, a prompt length and an answer length a row.

Columns are known by name, case and punctuation aside; others are ignored. Moments are ISO dates or
seconds, and count from the first row.

    moment   timestamp, time, arrival, arrived_at, start_time
    prompt   context_tokens, input_tokens, prompt_tokens, input_length, request_tokens, num_prefill_tokens
    answer   generated_tokens, output_tokens, completion_tokens, output_length, response_tokens, num_decode_tokens
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import cycle
from pathlib import Path

from millrace.cli.bench.workload import Lengths

_MOMENT = ("timestamp", "time", "arrival", "arrivedat", "arrivaltime", "starttime")
_INPUT = (
    "contexttokens", "inputtokens", "prompttokens", "inputlength", "requesttokens",
    "numprefilltokens",
)  # fmt: skip
_OUTPUT = (
    "generatedtokens", "outputtokens", "completiontokens", "outputlength", "responsetokens",
    "numdecodetokens",
)  # fmt: skip
# Some traces have more digits of a second than the six that Python reads.
_LONG_FRACTION = re.compile(r"(\.\d{6})\d+")


class TraceError(ValueError):
    """The file is no trace; the message says what is wrong, and where."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request that once was made; `at_s` counts from the first."""

    at_s: float
    input_tokens: int
    output_tokens: int


def read_trace(path: Path, limit: int | None = None) -> list[TraceRow]:
    """The rows of `path` (the first `limit`), in the order of their moments.

    Raises:
        TraceError: it cannot be read, lacks a column, or has a row that makes no sense.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = [_column(reader.fieldnames or (), n) for n in (_MOMENT, _INPUT, _OUTPUT)]
            rows: list[TraceRow] = []
            for row in reader:
                if limit is not None and len(rows) == limit:
                    break
                rows.append(_row([row[column] for column in columns], reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read {path}: {error}") from None
    if not rows:
        raise TraceError(f"{path} has no rows")
    rows.sort(key=lambda row: row.at_s)
    first_s = rows[0].at_s
    return [TraceRow(r.at_s - first_s, r.input_tokens, r.output_tokens) for r in rows]


def trace_arrivals(rows: Sequence[TraceRow], speed: float) -> Iterator[float]:
    """The trace's own moments, `speed` times as fast."""
    return (row.at_s / speed for row in rows)


def trace_lengths(
    rows: Sequence[TraceRow], inputs: Lengths | None, outputs: Lengths | None
) -> Iterator[tuple[int, int]]:
    """The trace's lengths, within limits where there are some; begins again at its end."""
    for row in cycle(rows):
        yield (
            inputs.clip(row.input_tokens) if inputs else row.input_tokens,
            outputs.clip(row.output_tokens) if outputs else row.output_tokens,
        )


def _column(found: Sequence[str], names: Sequence[str]) -> str:
    by_name = {"".join(filter(str.isalnum, column)).lower(): column for column in found}
    for name in names:
        if name in by_name:
            return by_name[name]
    columns = ", ".join(found) or "none"
    raise TraceError(f"a trace has one of the columns {', '.join(names)}; found: {columns}")


def _row(values: Sequence[str], line: int) -> TraceRow:
    moment, *lengths = values
    try:
        input_tokens, output_tokens = map(int, lengths)
        at_s = _seconds(moment)
    except (TypeError, ValueError):
        raise TraceError(f"line {line} is no request: {', '.join(map(str, values))}") from None
    # A prompt has a token; a request that generated nothing asked for one.
    return TraceRow(at_s, max(input_tokens, 1), max(output_tokens, 1))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # Some traces have seven digits of a second, of which Python reads six.
        return datetime.fromisoformat(_LONG_FRACTION.sub(r"\1", text)).timestamp()
