"""The long-context probe: where facts lie, what is asked, and what counts as retrieved."""

from pathlib import Path

import pytest
import torch

from compiler_service.calibration.windows import TextTokenizer, cut_windows
from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer_files
from compiler_service.quality.logits import LogitComparison
from compiler_service.quality.needle import (
    MAX_PROBE_TOKENS,
    Context,
    hide_needles,
    most_tokens,
)
from compiler_service.quality.probe import make_probe
from compiler_service.quality.report import measurement_of
from compiler_service.resolve import resolve
from kernels.reference import dense, prompt_batch, run
from shared.engine import QuantConfig
from shared.store.weights import WeightReader
from tests.checkpoints import write_checkpoint
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
    probe_tokens: int, max_positions: int = PLENTY, num_tokens: int = PLENTY, text: str = WORDS
) -> tuple[list[int], tuple[Context, ...]]:
    words = _WordTokenizer()
    ids = torch.tensor(words.ids(text))
    hay, contexts = hide_needles(words, ids, probe_tokens, max_positions, num_tokens)  # type: ignore[arg-type]
    return hay.tolist(), contexts


@pytest.mark.parametrize("text", [WORDS, "too short to hide in"], ids=["long", "short"])
def test_facts_lie_at_their_depths_and_are_asked_for_at_the_end(text: str) -> None:
    hay, contexts = _hidden(2048, text=text)
    assert [context.num_tokens for context in contexts] == [256, 512, 1024, 2048]
    assert hay[0] == 7, "a sequence begins with what the tokenizer puts there"
    for context in contexts:
        ids = [*hay[: context.hay_tokens], *context.asked.tolist()]
        assert 0.99 * context.num_tokens < len(ids) <= context.num_tokens
        assert [needle.depth for needle in context.needles] == DEPTHS
        assert len({needle.answer for needle in context.needles}) == len(DEPTHS)
        for needle in context.needles:
            assert tuple(context.asked[row + 1] for row in needle.rows) == needle.answer
            places = [i for i in range(len(ids)) if ids[i] == needle.answer[0]]
            assert len(places) == 2, "a fact is told once and asked for once"
            assert places[0] / context.hay_tokens == pytest.approx(needle.depth, abs=0.06)
            assert places[1] >= context.hay_tokens


def test_longest_probe_has_a_fact_for_every_depth_of_every_length() -> None:
    hay, contexts = _hidden(MAX_PROBE_TOKENS)
    assert [context.num_tokens for context in contexts] == [256 << i for i in range(10)]
    assert all(len(context.needles) == len(DEPTHS) for context in contexts)
    assert len(hay) == contexts[-1].hay_tokens


def test_lengths_are_halves_of_the_longest_and_stop_where_the_model_or_the_memory_does() -> None:
    for probe_tokens, max_positions, num_tokens, probed, last in (
        (2048, PLENTY, PLENTY, [256, 512, 1024, 2048], None),
        (3000, PLENTY, PLENTY, [375, 750, 1500, 3000], None),
        (300, PLENTY, PLENTY, [300], None),
        (4096, 1500, PLENTY, [256, 512, 1024], (2048, "the model has 1500 positions")),
        (1024, 100, PLENTY, [], (256, "the model has 100 positions")),
        (1024, PLENTY, 800, [256, 512], (1024, "would take more than 512 MiB of memory")),
    ):
        hay, contexts = _hidden(probe_tokens, max_positions, num_tokens)
        asked = [context for context in contexts if not context.skipped]
        assert [context.num_tokens for context in asked] == probed
        assert all(context.needles for context in asked)
        assert len(hay) == (asked[-1].hay_tokens if asked else 0)
        assert len(hay) + sum(len(context.asked) for context in asked) <= num_tokens
        skipped = [(c.num_tokens, c.skipped) for c in contexts if c.skipped]
        assert skipped == ([last] if last else [])


def test_lengths_without_room_for_the_facts_are_skipped_and_longer_ones_are_not() -> None:
    tokenizer = TextTokenizer(byte_tokenizer_files(), 320)
    text = torch.tensor(tokenizer.ids("All work and no play makes Jack a dull boy. " * 40))
    _, contexts = hide_needles(tokenizer, text, 1024, 1024, PLENTY)
    found = {context.num_tokens: context for context in contexts}
    assert "facts and questions alone have" in found[256].skipped
    assert found[256].needles == ()
    assert len(found[1024].needles) == len(DEPTHS)


def test_contexts_that_share_their_hay_compute_what_each_would_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    store, engine = build_quantized(folder, QuantConfig("fp32"), tmp_path)
    graph = graph_of(store, engine)
    with WeightReader(store, engine) as reader:
        weights = dense(graph, {name: reader.roles(name) for name in graph.weights}, torch.float64)
    tokens = torch.randint(100, (40,), generator=torch.Generator().manual_seed(0)).int()
    window, hay, *questions = tokens.split([5, 20, 7, 8])
    alone = [window, hay, torch.cat((hay[:9], questions[0])), torch.cat((hay, questions[1]))]

    def logits(texts: list[torch.Tensor], going_on: dict[int, tuple[int, int]]) -> torch.Tensor:
        lengths = list(map(len, texts))
        batch = prompt_batch(graph, lengths, torch.float64, block_tokens=1, going_on=going_on)
        return run(graph, weights, torch.cat(texts), batch)["logits"]

    expected = logits(alone, {}).split([5, 20, 9, 7, 20, 8])
    found = logits([window, hay, *questions], {2: (1, 9), 3: (1, 20)}).split([5, 20, 7, 8])
    for mine, theirs in zip(
        found, (expected[0], expected[1], expected[3], expected[5]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_needle_is_scored_only_where_the_unquantized_model_finds_it() -> None:
    words = _WordTokenizer()
    windows = cut_windows([WORDS], words, 1000, 0)  # type: ignore[arg-type]
    probe = make_probe(windows, words, 1000, PLENTY, PLENTY)  # type: ignore[arg-type]
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
        assert [len(context.needles) for context in found.contexts] == [5, 5]
        last = found.contexts[1].needles[-1]
        assert (last.unquantized, last.quantized) == (reference is logits, quantized is logits)


def test_windows_alone_are_what_the_probe_measures_limits_with() -> None:
    words = _WordTokenizer()
    windows = cut_windows([WORDS], words, 1000, 0)  # type: ignore[arg-type]
    probe = make_probe(windows, words, 1000, PLENTY, PLENTY)  # type: ignore[arg-type]
    alone = probe.windows_alone()
    assert len(probe.texts) == len(alone.texts) + 3, "a hay and two contexts"
    assert alone.going_on == {}
    assert sum(map(len, alone.texts)) == alone.num_measured == probe.num_measured
    assert alone.logit_rows == tuple(range(alone.num_measured))
    assert torch.equal(alone.following_R, probe.following_R[: alone.num_measured])


def test_wider_models_are_probed_with_fewer_tokens(tmp_path: Path) -> None:
    """512 MiB hold both runs' inputs and outputs of the widest linear, and their residual streams."""
    folder = write_induction_model(tmp_path / "induction")
    store, engine = build_quantized(folder, QuantConfig("int8", skip_quality=True), tmp_path)
    assert most_tokens(graph_of(store, engine)) == (512 << 20) // (8 * (320 + 3 * 512 + 320))


def test_default_length_spelled_out_is_the_same_engine_and_no_field_of_its_key(
    tmp_path: Path,
) -> None:
    """Runtimes from before the field go on reading engines that do not need it."""
    folder = write_checkpoint(tmp_path / "tiny")
    plain, spelled, other = (
        resolve(str(folder), ["cpu"], QuantConfig("int8", probe_tokens=tokens), "", tmp_path).keys[
            "cpu"
        ]
        for tokens in (0, 1024, 512)
    )
    assert plain == spelled != other
    assert "probe_tokens" not in plain.quant.to_dict()


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
