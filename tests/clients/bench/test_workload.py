"""What a load consists of: arrivals, lengths, traces."""

import statistics
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from millrace.cli.bench.trace import TraceError, read_trace, trace_arrivals, trace_lengths
from millrace.cli.bench.workload import (
    Lengths,
    Planned,
    drawn_lengths,
    open_loop,
    plan,
    prompt_of,
)

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.1000000,20,0
"""


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_asked_rate_and_burstiness(burstiness: float) -> None:
    """A gamma distribution of shape b has a coefficient of variation of 1 / sqrt(b)."""
    moments = list(islice(open_loop(50.0, burstiness, seed=7), 20_001))
    gaps = [after - before for before, after in pairwise(moments)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_seed_repeats_a_load_and_another_one_does_not() -> None:
    def load(seed: int) -> list[Planned]:
        lengths = drawn_lengths(Lengths(5, 50), Lengths(1, 9), seed)
        return list(plan(open_loop(3.0, 1.0, seed), lengths, 20))

    assert load(1) == load(1) != load(2)
    assert [prompt_of(p, 1) for p in load(1)] == [prompt_of(p, 1) for p in load(1)]
    assert prompt_of(load(1)[0], 1) != prompt_of(load(1)[0], 2)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 1 << 30))
def test_lengths_stay_within_their_range(low: int, more: int, seed: int) -> None:
    lengths = Lengths.parse(f"{low}-{low + more}" if more else str(low))
    pairs = islice(drawn_lengths(lengths, lengths, seed), 20)
    assert all(low <= n <= low + more for pair in pairs for n in pair)


@pytest.mark.parametrize("text", ["", "0", "9-3", "a", "3-", "-4", "1.5"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of tokens"):
        Lengths.parse(text)


def test_a_trace_gives_its_moments_in_order_and_its_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    rows = read_trace(path)
    assert list(trace_arrivals(rows, 2.0)) == pytest.approx([0.0, 0.709705, 2.15729])
    assert list(islice(trace_lengths(rows, None, None), 4)) == [
        (374, 44), (20, 1), (396, 109), (374, 44),
    ]  # fmt: skip
    clipped = trace_lengths(rows, Lengths(32, 380), Lengths(2, 64))
    assert list(islice(clipped, 3)) == [(374, 44), (32, 2), (380, 64)]


def test_a_trace_knows_its_columns_by_other_names_and_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("user,output_tokens,Input Tokens,time\nme,3,7,12.5\nyou,4,8,13\n")
    assert [(r.at_s, r.input_tokens, r.output_tokens) for r in read_trace(path)] == [
        (0.0, 7, 3), (0.5, 8, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "one of the columns timestamp"),
        ("timestamp,input_tokens\n1,2\n", "one of the columns generatedtokens"),
        ("timestamp,input_tokens,output_tokens\n", "has no rows"),
        ("timestamp,input_tokens,output_tokens\n1,2,3\n1,many,3\n", "line 3 is no request"),
        ("timestamp,input_tokens,output_tokens\n1,2\n", "line 2 is no request"),
        ("timestamp,input_tokens,output_tokens\nnoon,2,2\n", "line 2 is no request"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=says):
        read_trace(path)
