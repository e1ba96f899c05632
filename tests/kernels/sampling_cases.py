"""Rows that draw in every way, drawn by the kernels and by the host's sampler: the same tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from kernels.attention.shares import Shares
from kernels.launch import Grid, Sizes
from kernels.step_inputs.launch import step_inputs_grid, step_inputs_variant, write_tables_variant
from kernels.step_inputs.layout import HEADER_WORDS, MessageLayout, TableLayout
from kernels.variant import KernelVariant
from runtime_service.execution.cuda_model_runner import Reading
from runtime_service.execution.device_rows import DeviceRows
from runtime_service.execution.device_sampler import DeviceSampler, sampler_scratch
from runtime_service.execution.device_stream import DeviceStream
from runtime_service.limits import RuntimeLimits
from runtime_service.sampling.sampler import Draw, RowSampler, sample
from runtime_service.scheduling.output import (
    NewSequence,
    SampledSequence,
    ScheduledSequence,
    SchedulerOutput,
)
from runtime_service.scheduling.request import SamplingParams, StopParams

Run = Callable[[KernelVariant, Grid, dict[str, torch.Tensor | int]], None]

_MAX_TOKENS = 400
_NUM_PROMPT = 30


@dataclass(frozen=True)
class Device:
    """A kernel library, and the stream that it launches on."""

    library: Any
    stream: DeviceStream


Way = tuple[SamplingParams, StopParams]


def _way(min_new_tokens: int = 0, ends: tuple[int, ...] = (), **params: Any) -> Way:
    return SamplingParams(**params), StopParams(1000, min_new_tokens, ends)


WAYS: dict[str, Way] = {
    "greedy": _way(),
    "random": _way(temperature=1.0, seed=1 << 63 | 5),
    "top-k": _way(temperature=0.7, top_k=5, seed=77),
    "top-k of many": _way(temperature=1.0, top_k=2000, seed=78),
    "top-p": _way(temperature=1.3, top_p=0.8, seed=3),
    "top-p of nearly all": _way(temperature=1.0, top_p=0.9999, seed=4),
    "top-p of a peak": _way(temperature=0.05, top_p=0.6, seed=5),
    "min-p": _way(temperature=2.0, min_p=0.2, seed=11),
    "top-k, top-p, min-p": _way(temperature=0.9, top_k=50, top_p=0.5, min_p=0.01, seed=(1 << 64) - 1),
    "top-k of all, top-p": _way(temperature=1.0, top_k=1 << 30, top_p=0.999, seed=13),
    "top-k below a hot top-p": _way(temperature=30.0, top_k=900, top_p=0.3, seed=14),
    "hardly warm": _way(temperature=1e-30, seed=12),
    "hardly warm top-k": _way(temperature=1e-30, top_k=3, seed=12),
    "repetition": _way(repetition_penalty=1.7),
    "presence and frequency": _way(presence_penalty=1.5, frequency_penalty=-0.7, temperature=0.8, seed=15),
    "bias": _way(logit_bias=((0, 4.0), (2, -100.0)), temperature=0.5, top_p=0.9, seed=16),
    "masked ends": _way(1000, (0, 1, 2, 3)),
    "ends masked no more": _way(3, (0, 1, 2, 3)),
    "everything": _way(
        1000, (4, 5), temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1,
        presence_penalty=0.3, frequency_penalty=0.2, logit_bias=((3, 2.0), (4, 9.0)), num_logprobs=3,
        seed=17,
    ),
    "log probabilities": _way(num_logprobs=20, temperature=1.0, seed=18),
    "only the token's own": _way(num_logprobs=0),
}  # fmt: skip


class Rows:
    """Rows that draw in the given ways: row r is sequence r, its history has 40 + 7 r tokens."""

    def __init__(self, device: Device, ways: list[Way], vocab_size: int, seed: int) -> None:
        self.ways, self.vocab_size, count = ways, vocab_size, len(ways)
        limits = RuntimeLimits(_MAX_TOKENS, count, 64, 16, 64, "float32", 0, "")
        self.rows = DeviceRows(device.library, limits, vocab_size, Shares(1, 1), device.stream)
        scratch = sampler_scratch(count, vocab_size, device.stream.device)
        self.sampler = DeviceSampler(device.library, self.rows, vocab_size, scratch, torch.clone)
        self._stream = device.stream
        self._reading = Reading(count, vocab_size, device.stream)
        generator = np.random.default_rng(seed)
        # A small set of tokens, so that most come more than once.
        some = min(vocab_size, 23)
        self.histories = [
            generator.integers(0, some, 40 + 7 * row).astype(np.int32) for row in range(count)
        ]
        new = tuple(
            NewSequence(
                row, history.tolist(), _NUM_PROMPT, params,
                replace(stop, end_token_ids=tuple(e for e in stop.end_token_ids if e < vocab_size)),
                row % 3, 0, [],
            )
            for row, (history, (params, stop)) in enumerate(zip(self.histories, ways, strict=True))
        )  # fmt: skip
        self.rows.apply(SchedulerOutput(0, (), new, (), ()))
        self.scheduled = [
            ScheduledSequence(row, len(history) - 1, 1)
            for row, history in enumerate(self.histories)
        ]

    def draw(self, logits_RV: torch.Tensor) -> tuple[SampledSequence, ...]:
        """By the kernels."""
        self._launch(logits_RV, self.scheduled)
        self._reading.num_top = {
            row: params.num_logprobs
            for row, (params, _) in enumerate(self.ways)
            if params.num_logprobs is not None
        }
        return self._reading.sampled(self.scheduled)

    def draw_tokens(self, logits_RV: torch.Tensor, first: int = 0) -> list[int]:
        """By the kernels, tokens alone, of as many rows as there are logits; -1 where they are not finite."""
        count = len(logits_RV)
        self._launch(logits_RV, self.scheduled[first : first + count])
        return [int(token) for token in self._reading.drawn_S[:count].tolist()]

    def _launch(self, logits_RV: torch.Tensor, scheduled: list[ScheduledSequence]) -> None:
        # A copy: the sampler changes its logits.
        on_device = logits_RV.to(self._stream.device, copy=True)
        reading = self._reading
        self.sampler.launch(
            on_device, self.rows.send(scheduled), reading.drawn_S, reading.reports_SW
        )
        self._stream.mark().synchronize()

    def draw_on_host(self, logits_RV: torch.Tensor) -> tuple[SampledSequence, ...]:
        """By the host's sampler."""
        draws = [
            Draw(
                RowSampler(
                    params, _within(stop, self.vocab_size), row % 3, _NUM_PROMPT, self.vocab_size
                ),
                history,
            )
            for row, ((params, stop), history) in enumerate(
                zip(self.ways, self.histories, strict=True)
            )
        ]
        token_ids, entries = sample(logits_RV.clone(), draws)
        return tuple(
            SampledSequence(row, (token_id,), () if entry is None else (entry,))
            for row, (token_id, entry) in enumerate(zip(token_ids, entries, strict=True))
        )

    def kept(self, row: int) -> int:
        """The token that the row's table has at the place that was drawn for."""
        return int(self.rows.tokens[row, len(self.histories[row])])


def _within(stop: StopParams, vocab_size: int) -> StopParams:
    return replace(stop, end_token_ids=tuple(e for e in stop.end_token_ids if e < vocab_size))


def check_draws(device: Device, vocab_size: int, seed: int, flatness: float = 0.33) -> None:
    """Random logits, and the tokens of every way of drawing; twice, so that what must be left at 0 is."""
    torch.manual_seed(seed)
    ways = {name: _fitting(way, vocab_size) for name, way in WAYS.items()}
    rows = Rows(device, list(ways.values()), vocab_size, seed)
    for _ in range(2):
        logits = torch.randn(len(ways), vocab_size) / flatness
        found = rows.draw(logits)
        wanted = rows.draw_on_host(logits)
        for name, ours, theirs in zip(ways, found, wanted, strict=True):
            assert ours.token_ids == theirs.token_ids, name
            assert (rows.kept(ours.row),) == ours.token_ids, name
            for entry, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert entry.logprob == pytest.approx(other.logprob, abs=1e-4), name
                assert (entry.token_id, entry.rank) == (other.token_id, other.rank), name
                assert [t for t, _ in entry.top] == [t for t, _ in other.top], name
                assert [p for _, p in entry.top] == pytest.approx(
                    [p for _, p in other.top], abs=1e-4
                )


def _fitting(way: Way, vocab_size: int) -> Way:
    """The way, without tokens that a small vocabulary lacks; not all of it is masked."""
    params, stop = way
    bias = tuple((token, value) for token, value in params.logit_bias if token < vocab_size)
    ends = tuple(token for token in stop.end_token_ids if token < vocab_size - 1)
    return replace(params, logit_bias=bias), replace(stop, end_token_ids=ends)


def check_ties(device: Device) -> None:
    """Greedy takes the lowest id; truncation keeps all that equal the last one kept."""
    ways = [_way(), *(_way(temperature=1.0, top_k=2, seed=seed) for seed in range(24))]
    logits = torch.full((len(ways), 9), -1.0)
    logits[:, 2], logits[:, 5], logits[:, 7] = 0.5, 0.5, 0.5
    rows = Rows(device, ways, 9, 0)
    drawn = [s.token_ids[0] for s in rows.draw(logits)]
    assert drawn == [s.token_ids[0] for s in rows.draw_on_host(logits)]
    assert drawn[0] == 2
    assert set(drawn[1:]) == {2, 5, 7}


def check_equal_scores(device: Device, vocab_size: int) -> None:
    """A flat row, all of whose tokens are undecided to the end, and more than any list holds."""
    ways = [
        _way(temperature=1.0, top_k=10, seed=1), _way(temperature=1.0, top_p=0.4, seed=2),
        _way(temperature=1.0, top_k=7, top_p=0.1, seed=3),
    ]  # fmt: skip
    rows = Rows(device, ways, vocab_size, 0)
    logits = torch.full((len(ways), vocab_size), 3.25)
    logits[:, 1:] -= 0.001
    found = rows.draw(logits)
    assert [s.token_ids for s in found] == [s.token_ids for s in rows.draw_on_host(logits)]


def check_neighbours(device: Device, vocab_size: int) -> None:
    """A row's draw is the same alone and in a batch, bit by bit, whatever its neighbours do."""
    torch.manual_seed(5)
    ways = list(WAYS.values())
    logits = torch.randn(len(ways), vocab_size)
    among = Rows(device, ways, vocab_size, 3)
    found = among.draw(logits)
    for row in range(len(ways)):
        assert tuple(among.draw_tokens(logits[row : row + 1], row)) == found[row].token_ids, row


def check_non_finite(device: Device) -> None:
    """Rows of NaN (of either sign), infinity and nothing at all draw -1 and keep nothing; others draw."""
    ways = [_way(temperature=t, top_k=k) for t, k in ((0, 0), (1, 0), (1, 3))]
    ways.append(_way(repetition_penalty=2.0, num_logprobs=2))
    vocab_size = 33
    for poison in (float("nan"), -float("nan"), float("inf")):
        for row in range(len(ways)):
            rows = Rows(device, ways, vocab_size, 0)
            logits = torch.randn(len(ways), vocab_size)
            logits[row, 17] = poison
            drawn = rows.draw_tokens(logits)
            assert [token == -1 for token in drawn] == [r == row for r in range(len(ways))]
            assert rows.kept(row) == 0
    nothing = torch.full((len(ways), vocab_size), -float("inf"))
    rows = Rows(device, ways, vocab_size, 0)
    assert rows.draw_tokens(nothing) == [-1] * len(ways)


def check_inputs(run: Run, device: str, parts: int) -> None:
    """A ragged step's inputs, with padding, against numpy; nothing beyond them is written."""
    layout = TableLayout(6, 700, 44)
    generator = np.random.default_rng(parts)
    tables = generator.integers(0, 1000, layout.num_words).astype(np.int32)
    tokens = tables[: 6 * 700].reshape(6, 700)
    blocks = tables[layout.blocks_at : layout.blocks_at + 6 * 44].reshape(6, 44)
    steps = [(4, 0, 600), (1, 33, 1), (5, 15, 17), (0, 699, 1)]
    message_layout = MessageLayout(6, 2, 64)
    message = np.zeros(message_layout.num_words, np.int32)
    entries = message[HEADER_WORDS : HEADER_WORDS + 36].reshape(6, 6)
    starts = np.cumsum([0, *(n for _, _, n in steps)])
    for i, (row, start, count) in enumerate(steps):
        entries[:, i] = row, start, count, starts[i], 1, 3 * i
    message[:3] = len(steps), starts[-1], 11
    # One new token and a new block table come with the step.
    new = np.array([801, *range(50, 94)], np.int32)
    at = message_layout.words_at
    message[at : at + 45] = new
    row = layout.blocks_at + 44 * 5
    message[message_layout.writes_at : at] = [700 + 33, at, 1, row, at + 1, 44]
    on_device = torch.from_numpy(tables.copy()).to(device)
    sent = torch.from_numpy(message).to(device)
    tokens[1, 33], blocks[5] = 801, new[1:]
    writes: dict[str, torch.Tensor | int] = {
        "message": sent, "tables": on_device, "writes_at": message_layout.writes_at,
    }  # fmt: skip
    run(write_tables_variant(), (2, 1, 1), writes)
    assert np.array_equal(on_device.cpu().numpy(), tables)
    sizes = Sizes(630, 6, 6)
    lengths = {
        "token_ids": 630, "positions": 630, "slots": 630, "seq_lens": 6, "query_start": 7,
        "part_start": 7, "logit_rows": 6, "block_tables": 6 * 44,
    }  # fmt: skip
    out = {
        name: torch.full((n + 5,), -9, dtype=torch.int32, device=device)
        for name, n in lengths.items()
    }
    operands: dict[str, torch.Tensor | int] = {
        "message": sent, "tokens": on_device, "blocks": on_device[layout.blocks_at :], **out,
        "max_sequences": 6, "tokens_stride": 700, "blocks_stride": 44, "num_tokens": 630,
        "num_sequences": 6,
    }  # fmt: skip
    programs, _, _ = step_inputs_grid(sizes)
    run(step_inputs_variant(16), (programs, parts, 1), operands)
    found = {name: tensor.cpu().numpy() for name, tensor in out.items()}
    rows = np.concatenate([np.full(n, r) for r, _, n in steps])
    positions = np.concatenate([np.arange(s, s + n) for _, s, n in steps])
    slots = blocks[rows, positions // 16] * 16 + positions % 16
    padding = 630 - len(rows)
    assert found["token_ids"].tolist() == [*tokens[rows, positions], *[0] * padding, *[-9] * 5]
    assert found["positions"].tolist() == [*positions, *[0] * padding, *[-9] * 5]
    assert found["slots"].tolist() == [*slots, *[-1] * padding, *[-9] * 5]
    ends = [s + n for _, s, n in steps]
    assert found["seq_lens"].tolist() == [*ends, 0, 0, *[-9] * 5]
    assert found["part_start"].tolist() == [0, 3, 6, 9, 11, 11, 11, *[-9] * 5]
    assert found["query_start"].tolist() == [*starts, starts[-1], starts[-1], *[-9] * 5]
    assert found["logit_rows"].tolist() == [*(starts[1:] - 1), 0, 0, *[-9] * 5]
    gathered = found["block_tables"][: 6 * 44].reshape(6, 44)
    for i, (r, _, _) in enumerate(steps):
        used = -(-ends[i] // 16)
        assert gathered[i, :used].tolist() == blocks[r, :used].tolist()
        assert (gathered[i, used:] == -9).all()
