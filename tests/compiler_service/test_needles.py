"""The long-context probe: where facts lie, what is asked, and what counts as retrieved."""

from pathlib import Path

import pytest
import torch

from compiler_service.calibration.windows import TextTokenizer, cut_windows
from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer_files
from compiler_service.quality.logits import LogitComparison
from compiler_service.quality.needle import CONTEXT_TOKENS, Haystack, hide_needles, most_tokens
from compiler_service.quality.probe import make_probe
from compiler_service.quality.report import measurement_of
from shared.engine import QuantConfig
from tests.compiler_service.induction_model import induction_text, write_induction_model
from tests.compiler_service.quantized_engines import LOOSE, build_quantized, graph_of, report_of

PLENTY = 1 << 20
DEPTHS = [0.1, 0.3, 0.5, 0.7, 0.9]
WORDS = "some words of a long and quiet text " * 80


class _WordTokenizer:
    """Ids of whole words, in order of appearance."""

    start: tuple[int, ...] = (7,)

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    @property
    def size(self) -> int:
        return len(self._ids)

    def ids(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in text.split()]


def _hidden(
    max_positions: int, num_tokens: int = PLENTY, text: str = WORDS
) -> tuple[Haystack, ...]:
    words = _WordTokenizer()
    return hide_needles(words, torch.tensor(words.ids(text)), max_positions, num_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [WORDS, "too short to hide in"], ids=["long", "short"])
def test_facts_lie_at_their_depths_and_are_asked_for_at_the_end(text: str) -> None:
    probed = [h for h in _hidden(8192, text=text) if not h.skipped]
    assert [h.num_tokens for h in probed] == [256, 512, 1024, 2048]
    for haystack in probed:
        ids = haystack.token_ids.tolist()
        assert 0.99 * haystack.num_tokens < len(ids) <= haystack.num_tokens
        assert ids[0] == 7, "a sequence begins with what the tokenizer puts there"
        assert [needle.depth for needle in haystack.needles] == DEPTHS
        for needle in haystack.needles:
            assert tuple(ids[row + 1] for row in needle.rows) == needle.answer
            places = [i for i in range(len(ids)) if ids[i] == needle.answer[0]]
            assert len(places) == 2, "a fact is told once and asked for once"
            assert places[0] / len(ids) == pytest.approx(needle.depth, abs=0.15)
            assert places[1] > len(ids) - 80


def test_lengths_stop_where_the_model_the_memory_or_the_time_does_and_say_so() -> None:
    for max_positions, num_tokens, probed, reason in (
        (1500, PLENTY, [256, 512, 1024], "the model has 1500 positions"),
        (8192, 800, [256, 512], "would take more than 512 MiB of memory"),
        (8192, PLENTY, [256, 512, 1024, 2048], "a build probes 4096 tokens in all"),
        (100, PLENTY, [], "the model has 100 positions"),
    ):
        *found, last = _hidden(max_positions, num_tokens)
        assert [h.num_tokens for h in found] == probed
        assert all(h.needles and not h.skipped for h in found)
        assert (last.num_tokens, last.skipped) == (CONTEXT_TOKENS[len(probed)], reason)
        assert last.needles == ()


def test_lengths_without_room_for_the_facts_are_skipped_and_longer_ones_are_not() -> None:
    tokenizer = TextTokenizer(byte_tokenizer_files())
    text = torch.tensor(tokenizer.ids("All work and no play makes Jack a dull boy. " * 40))
    found = {h.num_tokens: h for h in hide_needles(tokenizer, text, 1024, PLENTY)}
    assert "facts and questions alone have" in found[256].skipped
    assert found[256].needles == ()
    assert len(found[1024].needles) == len(DEPTHS)


def test_needle_is_scored_only_where_the_unquantized_model_finds_it() -> None:
    words = _WordTokenizer()
    windows = cut_windows([WORDS], words, 1000, 0)  # type: ignore[arg-type]
    probe = make_probe(windows, words, 1000, PLENTY)  # type: ignore[arg-type]
    logits = torch.nn.functional.one_hot(probe.following_R, words.size).float() * 9
    lost = logits.clone()
    lost[-1] = 0.0  # the only token of the deepest fact in the longest context
    for reference, quantized, scored, retrieved in (
        (logits, logits, 10, 10),
        (logits, lost, 10, 9),
        (lost, logits, 9, 9),
    ):
        comparison = LogitComparison(probe.following_R)
        comparison.add(0, reference, quantized)
        found = measurement_of(probe, comparison.finish(), ())
        assert len(found.scored_needles) == scored
        assert sum(needle.quantized for needle in found.scored_needles) == retrieved
        assert [len(context.needles) for context in found.contexts] == [5, 5, 0]
        last = found.contexts[1].needles[-1]
        assert (last.unquantized, last.quantized) == (reference is logits, quantized is logits)


def test_windows_alone_are_what_the_probe_measures_limits_with() -> None:
    words = _WordTokenizer()
    windows = cut_windows([WORDS], words, 1000, 0)  # type: ignore[arg-type]
    probe = make_probe(windows, words, 1000, PLENTY)  # type: ignore[arg-type]
    alone = probe.without_haystacks()
    assert len(probe.texts) == len(alone.texts) + 2
    assert sum(map(len, alone.texts)) == alone.num_measured == probe.num_measured
    assert alone.logit_rows == tuple(range(alone.num_measured))
    assert torch.equal(alone.following_R, probe.following_R[: alone.num_measured])


def test_wider_models_are_probed_with_fewer_tokens(tmp_path: Path) -> None:
    """512 MiB hold both runs' inputs and outputs of the widest linear, and their residual streams."""
    folder = write_induction_model(tmp_path / "induction")
    store, engine = build_quantized(folder, QuantConfig("int8", skip_quality=True), tmp_path)
    assert most_tokens(graph_of(store, engine)) == (512 << 20) // (8 * (320 + 3 * 512 + 320))


def _retrieval(folder: Path, scheme: str, tmp_path: Path) -> tuple[int, int]:
    """(scored, retrieved) of an engine of the model in `folder`."""
    text = tmp_path / "text.txt"
    text.write_text(induction_text())
    quant = QuantConfig(scheme, **LOOSE)
    store, engine = build_quantized(folder, quant, tmp_path, calibration_uri=str(text))
    needle = report_of(store, engine)["needle"]
    assert [c["tokens"] for c in needle["contexts"] if not c["skipped"]] == [256, 512, 1024]
    return needle["num_scored"], needle["num_retrieved"]


def test_model_that_repeats_retrieves_every_fact_and_a_grid_too_coarse_loses_them(
    tmp_path: Path,
) -> None:
    """Weights on silent channels change nothing but the grid: 8 bits reach over them, 4 bits do not."""
    plain = write_induction_model(tmp_path / "plain", max_positions=1024)
    assert _retrieval(plain, "int4-rtn", tmp_path) == (15, 15)
    uneven = write_induction_model(tmp_path / "uneven", outlier=100.0, max_positions=1024)
    assert _retrieval(uneven, "int8", tmp_path) == (15, 15)
    scored, retrieved = _retrieval(uneven, "int4-rtn", tmp_path)
    assert scored == 15, "the unquantized model needs none of the outliers"
    assert retrieved < 5
