"""What a step's messages leave in the tables, and when their host memory is used again."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kernels.attention.shares import Shares
from kernels.step_inputs.layout import (
    EDIT_WORDS,
    HEADER_WORDS,
    MAX_BIASES,
    MAX_ENDS,
)
from kernels.variant import KernelVariant
from runtime_service.execution.device_rows import DeviceRows
from runtime_service.execution.row_parameters import ADJUSTS, DRAWS_RANDOM, REPORTS, TRUNCATES
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams

_LIMITS = RuntimeLimits(100_000, 3, 64, 16, 20_000, "float32", 0, "")


def _words(address: int, count: int) -> npt.NDArray[np.int32]:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


class _Library:
    """`copy_words` and `write_tables`, in numpy."""

    def kernel(self, variant: KernelVariant) -> Callable[..., None]:
        def copy_words(grid: tuple[int, int, int], source: int, to: int, count: int) -> None:
            _words(to, count)[:] = _words(source, count)

        def write_tables(grid: tuple[int, int, int], message: int, to: int, writes_at: int) -> None:
            for at, first, count in _words(message + 4 * writes_at, 3 * grid[0]).reshape(-1, 3):
                words = _words(message + 4 * int(first), int(count))
                _words(to + 4 * int(at), int(count))[:] = words

        return {"copy_words": copy_words, "write_tables": write_tables}[variant.kernel]


@dataclass
class _Mark:
    is_reached: bool = False

    def synchronize(self) -> None:
        self.is_reached = True


@dataclass
class _Stream:
    """Remembers the marks that it gave."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    marks: list[_Mark] = field(default_factory=list)

    def host_words(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def mark(self) -> _Mark:
        self.marks.append(_Mark())
        return self.marks[-1]

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        raise AssertionError("rows capture nothing")


@pytest.fixture
def stream() -> _Stream:
    return _Stream()


@pytest.fixture
def rows(stream: _Stream) -> DeviceRows:
    library: Any = _Library()
    return DeviceRows(library, _LIMITS, 1000, Shares(40, 16), stream)


def _new(row: int, tokens: list[int], blocks: list[int], **sampling: Any) -> NewSequence:
    params = SamplingParams(**sampling)
    return NewSequence(row, tokens, len(tokens), params, StopParams(9), 0, 0, blocks)


def test_prompts_longer_than_a_message_arrive_whole(rows: DeviceRows) -> None:
    tokens = [list(range(k, k + 90_000)) for k in (1, 2, 3)]
    new = tuple(_new(row, tokens[row], list(range(row, 5_700))) for row in range(3))
    rows.apply(SchedulerOutput(0, (), new, (), ()))
    sent = rows.send([ScheduledSequence(2, 0, 7), ScheduledSequence(0, 5, 1)])
    for row in range(3):
        assert rows.read_tokens(row, 90_000).tolist() == tokens[row]
        first = row * rows.layout.blocks_stride
        found = rows.blocks[first : first + 5_700 - row].tolist()
        assert found == list(range(row, 5_700))
    assert (sent.num_tokens, sent.num_sequences, sent.is_decode) == (8, 2, False)
    assert sent.ends.tolist() == [7, 6]
    entries = rows.message[HEADER_WORDS : HEADER_WORDS + 18].view(6, 3)[:, :2]
    assert entries.tolist() == [[2, 0], [0, 5], [7, 1], [0, 7], [1, 1], [0, 0]]
    assert rows.message[:3].tolist() == [2, 8, 0]


def test_a_message_deals_out_the_further_parts_of_long_sequences(rows: DeviceRows) -> None:
    rows.send(
        [ScheduledSequence(0, 999, 1), ScheduledSequence(1, 39, 1), ScheduledSequence(2, 399, 1)]
    )
    entries = rows.message[HEADER_WORDS : HEADER_WORDS + 18].view(6, 3)
    # Parts of 64 keys at least: 16, one and seven.
    assert entries[5].tolist() == [0, 15, 15]
    assert rows.message[:3].tolist() == [3, 3, 21]


def test_memory_of_a_message_is_used_again_only_behind_its_mark(
    rows: DeviceRows, stream: _Stream
) -> None:
    for _ in range(3):
        rows.send_nothing()
    assert not any(mark.is_reached for mark in stream.marks)
    rows.send_nothing()
    assert [mark.is_reached for mark in stream.marks] == [True, False, False, False]


def test_new_blocks_go_behind_those_that_a_row_has(rows: DeviceRows) -> None:
    rows.apply(SchedulerOutput(0, (), (_new(1, [5], [7, 8]),), (), ()))
    scheduled = ScheduledSequence(1, 32, 1, (9, 3))
    rows.apply(SchedulerOutput(1, (), (), (), (scheduled,)))
    rows.send([scheduled])
    first = rows.layout.blocks_stride
    assert rows.blocks[first : first + 5].tolist() == [7, 8, 9, 3, 0]


def test_each_row_draws_as_its_parameters_say(rows: DeviceRows) -> None:
    new = (
        _new(0, [5], [0], temperature=1.0, num_logprobs=4),
        _new(1, [5], [1], temperature=1.0, top_p=0.5),
        _new(2, [5], [2], presence_penalty=0.1),
    )
    rows.apply(SchedulerOutput(0, (), new, (), ()))
    sent = rows.send([ScheduledSequence(row, 0, 1) for row in range(3)])
    assert rows.message[HEADER_WORDS + 12 : HEADER_WORDS + 15].tolist() == [1, 1, 1]
    assert sent.needs == DRAWS_RANDOM | TRUNCATES | ADJUSTS | REPORTS
    assert list(sent.reporting) == [0]
    assert [rows.send([ScheduledSequence(row, 0, 1)]).needs for row in range(3)] == [
        DRAWS_RANDOM | REPORTS, TRUNCATES, ADJUSTS,
    ]  # fmt: skip
    assert rows.num_top(0) == 4


@pytest.mark.parametrize("draws", [True, False])
def test_a_sequence_that_draws_nothing_on_the_device_is_told_so(
    rows: DeviceRows, draws: bool
) -> None:
    """One that is not sampled, and any where the host draws."""
    new = _new(0, [5], [0], presence_penalty=0.1, num_logprobs=1)
    rows.apply(SchedulerOutput(0, (), (new,), (), ()))
    sent = rows.send([ScheduledSequence(0, 0, 1, is_sampled=not draws)], draws)
    assert (sent.needs, list(sent.reporting)) == (0, [])
    assert rows.message[HEADER_WORDS + 12] == 0


def test_a_rows_edits_are_its_last_sequences(rows: DeviceRows) -> None:
    """End tokens are masked from the prompt's end on; words of the one before are not counted any more."""
    stop = StopParams(9, 3, (7, 8))
    params = SamplingParams(logit_bias=((4, 0.5), (6, -1.0)))
    first = NewSequence(1, [5, 6, 7], 2, params, stop, 0, 0, [0])
    rows.apply(SchedulerOutput(0, (), (first,), (), ()))
    rows.send_nothing()
    words = rows.edits[EDIT_WORDS : 2 * EDIT_WORDS]
    assert words[:3].tolist() == [7, 8, 0]
    assert words[MAX_ENDS : MAX_ENDS + 3].tolist() == [4, 6, 0]
    biases = words[MAX_ENDS + MAX_BIASES :][:2].view(torch.float32)
    assert biases.tolist() == [0.5, -1.0]
    assert rows.sampling[16 + 11 : 32].tolist() == [2, 2 + 3, 2, 2, 0]
    rows.apply(SchedulerOutput(1, (1,), (_new(1, [5], [0]),), (), ()))
    rows.send_nothing()
    assert rows.sampling[16 + 11 : 32].tolist() == [1, 1, 0, 0, 0]


def test_end_tokens_may_be_masked_to_the_end_of_any_sequence(rows: DeviceRows) -> None:
    stop = StopParams((1 << 31) - 1, (1 << 31) - 1, (7,))
    new = NewSequence(0, [5, 6], 2, SamplingParams(), stop, 0, 0, [0])
    rows.apply(SchedulerOutput(0, (), (new,), (), ()))
    rows.send_nothing()
    assert int(rows.sampling[12]) == (1 << 31) - 1
