"""Rows that draw in every way, drawn by the kernels and by the host's sampler: the same tokens."""

from collections.abc import Callable

import numpy as np
import torch

from kernels.launch import Grid, Sizes
from kernels.sampling.launch import (
    draw_best_variant,
    draw_random_variant,
    draw_truncated_variant,
    greedy_grid,
)
from kernels.step_inputs.launch import step_inputs_grid, step_inputs_variant, write_tables_variant
from kernels.step_inputs.layout import HEADER_WORDS, MessageLayout, TableLayout
from kernels.variant import KernelVariant
from runtime_service.execution.row_parameters import sampling_words
from runtime_service.sampling.sampler import Draw, RowSampler, sample
from runtime_service.scheduling.request import SamplingParams, StopParams

Run = Callable[[KernelVariant, Grid, dict[str, torch.Tensor | int]], None]

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1 << 63 | 5),
    SamplingParams(temperature=0.7, top_k=5, seed=77),
    SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.5, min_p=0.01, seed=(1 << 64) - 1),
    SamplingParams(temperature=2.0, min_p=0.2, seed=11),
    SamplingParams(temperature=1e-30, seed=12),
    SamplingParams(temperature=1.0, top_k=1 << 30, top_p=0.999, seed=13),
]


class Rows:
    """Tables and a message on a device, filled by hand: row r is sequence r and draws position 40 + r."""

    def __init__(self, params: list[SamplingParams], vocab_size: int, device: str) -> None:
        self.params, self.vocab_size, self.count = params, vocab_size, len(params)
        self.layout = TableLayout(self.count, 64, 4)
        tables = torch.zeros(self.layout.num_words, dtype=torch.int32)
        for row, param in enumerate(params):
            at = self.layout.sampling_at + 8 * row
            words = sampling_words(param, row % 3, vocab_size, False)
            tables[at : at + 8] = torch.from_numpy(words)
        message = torch.zeros(MessageLayout(self.count, 1, 16).num_words, dtype=torch.int32)
        message[0] = self.count
        entries = message[HEADER_WORDS : HEADER_WORDS + 5 * self.count].view(5, -1)
        entries[0] = torch.arange(self.count)
        entries[1] = torch.arange(self.count) + 39
        entries[2] = entries[4] = 1
        self.tables, self.message = tables.to(device), message.to(device)
        self.drawn = torch.full((self.count,), -7, dtype=torch.int32, device=device)
        self.best = torch.zeros(self.count, dtype=torch.uint64, device=device)
        self.counters = torch.zeros(self.count, dtype=torch.int32, device=device)
        self.highest = torch.zeros(self.count, device=device)

    @property
    def tokens(self) -> torch.Tensor:
        """The token table."""
        return self.tables[: self.count * 64].view(-1, 64)

    def draw(self, run: Run, logits_RV: torch.Tensor) -> list[int]:
        """Tokens by the kernels."""
        operands: dict[str, torch.Tensor | int] = {
            "logits": logits_RV, "best": self.best, "counters": self.counters,
            "highest": self.highest, "drawn": self.drawn, "message": self.message,
            "tokens": self.tables, "sampling": self.tables[self.layout.sampling_at :],
            "max_sequences": self.count, "tokens_stride": 64,
        }  # fmt: skip
        grid = greedy_grid(self.count, self.vocab_size)
        run(draw_best_variant(self.vocab_size), grid, operands)
        run(draw_random_variant(self.vocab_size), grid, operands)
        run(draw_truncated_variant(self.vocab_size), (self.count, 1, 1), operands)
        return [int(token) for token in self.drawn.tolist()]

    def draw_on_host(self, logits_RV: torch.Tensor) -> list[int]:
        """Tokens by the host's sampler."""
        draws = [
            Draw(
                RowSampler(p, StopParams(9), row % 3, 3, self.vocab_size),
                np.zeros(40 + row, np.int32),
            )
            for row, p in enumerate(self.params)
        ]
        return sample(logits_RV.clone(), draws)[0]


def check_draws(run: Run, device: str, vocab_size: int, seed: int) -> None:
    """Random logits, and the tokens of every way of drawing."""
    torch.manual_seed(seed)
    rows = Rows(PARAMS, vocab_size, device)
    logits = torch.randn(len(PARAMS), vocab_size) * 3
    drawn = rows.draw(run, logits.to(device))
    assert drawn == rows.draw_on_host(logits)
    kept = [int(rows.tokens[row, 40 + row]) for row in range(len(PARAMS))]
    assert kept == drawn
    assert not rows.counters.any()


def check_ties(run: Run, device: str) -> None:
    """Greedy takes the lowest id; truncation keeps all that equal the last one kept."""
    params = [SamplingParams()] + [
        SamplingParams(temperature=1.0, top_k=2, seed=seed) for seed in range(24)
    ]
    logits = torch.full((len(params), 9), -1.0)
    logits[:, 2], logits[:, 5], logits[:, 7] = 0.5, 0.5, 0.5
    rows = Rows(params, 9, device)
    drawn = rows.draw(run, logits.to(device))
    assert drawn == rows.draw_on_host(logits)
    assert drawn[0] == 2
    assert set(drawn[1:]) == {2, 5, 7}


def check_non_finite(run: Run, device: str) -> None:
    """Rows of NaN (of either sign), infinity and nothing at all draw -1 and keep nothing; others draw."""
    params = [SamplingParams(temperature=t, top_k=k) for t, k in ((0, 0), (1, 0), (1, 3))]
    vocab_size = 33
    for poison in (float("nan"), -float("nan"), float("inf")):
        for row in range(3):
            rows = Rows(params, vocab_size, device)
            logits = torch.randn(3, vocab_size)
            logits[row, 17] = poison
            drawn = rows.draw(run, logits.to(device))
            assert [token == -1 for token in drawn] == [r == row for r in range(3)]
            assert rows.tokens[row, 40 + row] == 0
    nothing = torch.full((3, vocab_size), -float("inf"))
    assert Rows(params, vocab_size, device).draw(run, nothing.to(device)) == [-1] * 3


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
    entries = message[HEADER_WORDS : HEADER_WORDS + 30].reshape(5, 6)
    starts = np.cumsum([0, *(n for _, _, n in steps)])
    for i, (row, start, count) in enumerate(steps):
        entries[:, i] = row, start, count, starts[i], 1
    message[:2] = len(steps), starts[-1]
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
        "logit_rows": 6, "block_tables": 6 * 44,
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
    assert found["query_start"].tolist() == [*starts, starts[-1], starts[-1], *[-9] * 5]
    assert found["logit_rows"].tolist() == [*(starts[1:] - 1), 0, 0, *[-9] * 5]
    gathered = found["block_tables"][: 6 * 44].reshape(6, 44)
    for i, (r, _, _) in enumerate(steps):
        used = -(-ends[i] // 16)
        assert gathered[i, :used].tolist() == blocks[r, :used].tolist()
        assert (gathered[i, used:] == -9).all()
