"""The long-context probe: facts hidden at several depths of contexts of several lengths, and asked for
at their ends.

All contexts begin with one text, the hay, and part from it where they ask: the hay is computed once.

    hay        ...fact....fact....fact......fact......fact........fact..........fact...
    context 0  [ ---- hay ----> ] question answer question answer ...
    context 1  [ ------------ hay -------------> ] question answer ...

All answers of a context are teacher-forced in one pass: a fact counts as retrieved where every token of
its answer is the likeliest one. What the unquantized model cannot retrieve says nothing about
quantization, and is not scored. Which lengths are tried depends on sizes alone: on what was asked for, on
the model's positions, and on how much a build may hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compiler_service.calibration.windows import TextTokenizer
from compiler_service.streaming import values_a_token
from shared.ir import Graph

DEFAULT_PROBE_TOKENS = 1024
MIN_PROBE_TOKENS, MAX_PROBE_TOKENS = 256, 131072
# So many bytes of activations the probe may add to what a build holds.
_MOST_BYTES = 512 << 20
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Five for the shortest context, and three for each that is twice as long.
PLACES = (
    "Lisbon", "Vienna", "Cairo", "Toronto", "Oslo", "Madrid", "Athens", "Dublin",
    "Prague", "Warsaw", "Lima", "Havana", "Seoul", "Tokyo", "Delhi", "Boston",
    "Chicago", "Denver", "Sydney", "Nairobi", "Berlin", "Paris", "London", "Rome",
    "Moscow", "Kiev", "Bogota", "Manila", "Beirut", "Tunis", "Dakar", "Accra",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact: how deep it lies, nearly; the rows of `Context.asked` that predict its answer; the
    answer's tokens."""

    depth: float
    rows: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """What is asked behind the beginning of the hay; of another length, why nothing is.

    Args:
        num_tokens: of the context, at most.
        hay_tokens: how many of the hay it begins with.
        asked: token ids of questions and answers.
        skipped: why nothing is asked at this length; empty where something is.
    """

    num_tokens: int
    hay_tokens: int
    asked: torch.Tensor
    needles: tuple[Needle, ...]
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class _Fact:
    """`stop` ends the sentence, told or asked for."""

    question: list[int]
    answer: list[int]
    stop: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.question, *self.answer, *self.stop]


def most_tokens(graph: Graph) -> int:
    """How many tokens of haystacks a build can hold, in both runs."""
    return _MOST_BYTES // (2 * 4 * values_a_token(graph))


def hide_needles(
    tokenizer: TextTokenizer,
    text: torch.Tensor,
    probe_tokens: int,
    max_positions: int,
    most_tokens: int,
) -> tuple[torch.Tensor, tuple[Context, ...]]:
    """The hay, and a context for each length, the shortest first, up to the first that is too long.

    Args:
        text: token ids of what facts are hidden in, not empty; repeated where it is too short.
        probe_tokens: of the longest context; the others are its halves, quarters, ...
        most_tokens: that hay and questions may have together.
    """
    facts = _facts(tokenizer)
    questions = len(_DEPTHS) * max(len(fact.ids) for fact in facts)
    hay = _Hay(tokenizer.start, text, facts)
    contexts: list[Context] = []
    num_asked = 0
    for length in _lengths(probe_tokens):
        skipped = ""
        if length > max_positions:
            skipped = f"the model has {max_positions} positions"
        elif length + num_asked * questions > most_tokens:
            skipped = f"would take more than {_MOST_BYTES >> 20} MiB of memory"
        if skipped:
            contexts.append(_skipped(length, skipped))
            break
        # Half of the hay is text: no two facts meet.
        if length < len(tokenizer.start) + 3 * questions:
            problem = f"the facts and questions alone have {2 * questions} tokens"
            contexts.append(_skipped(length, problem))
            continue
        asked = hay.grow(length - questions)
        contexts.append(_context(length, length - questions, asked))
        num_asked += 1
    return torch.tensor(hay.ids if num_asked else [], dtype=torch.int64), tuple(contexts)


def _lengths(probe_tokens: int) -> list[int]:
    halvings = range((probe_tokens // MIN_PROBE_TOKENS).bit_length())
    return [probe_tokens >> halving for halving in reversed(halvings)]


def _facts(tokenizer: TextTokenizer) -> list[_Fact]:
    stop = tokenizer.ids(".")[:1]
    return [
        _Fact(
            tokenizer.ids(f"\nThe secret code of {place} is"),
            tokenizer.ids(f" {code_of(number)}"),
            stop,
        )
        for number, place in enumerate(PLACES)
    ]


def code_of(number: int) -> int:
    """The code of a place: four digits, of each another one."""
    return 1000 + (6193 + 3467 * number) % 9000


class _Hay:
    """Text with facts in it, so far."""

    def __init__(self, start: list[int], text: torch.Tensor, facts: list[_Fact]) -> None:
        self.ids = list(start)
        self._text, self._used = text.tolist(), 0
        self._facts: Iterator[_Fact] = iter(facts)
        self._placed: list[tuple[int, _Fact]] = []

    def grow(self, num_tokens: int) -> list[_Fact]:
        """Grows to `num_tokens`; gives a fact for each depth of them.

        Depths in what was there already have the fact that lies nearest; the others a new one.
        """
        found, shared = [], len(self.ids) if self._placed else 0
        for depth in _DEPTHS:
            place = int(depth * num_tokens)
            if place >= shared:
                self._fill(place)
                self._placed.append((len(self.ids), next(self._facts)))
                self.ids += self._placed[-1][1].ids
                found.append(self._placed[-1][1])
            else:
                found.append(min(self._placed, key=lambda fact: abs(fact[0] - place))[1])
        self._fill(num_tokens)
        return found

    def _fill(self, num_tokens: int) -> None:
        while len(self.ids) < num_tokens:
            self.ids.append(self._text[self._used % len(self._text)])
            self._used += 1


def _context(num_tokens: int, hay_tokens: int, facts: list[_Fact]) -> Context:
    asked: list[int] = []
    needles = []
    for depth, fact in zip(_DEPTHS, facts, strict=True):
        asked += fact.question
        rows = range(len(asked) - 1, len(asked) - 1 + len(fact.answer))
        needles.append(Needle(depth, tuple(rows), tuple(fact.answer)))
        asked += [*fact.answer, *fact.stop]
    return Context(num_tokens, hay_tokens, torch.tensor(asked), tuple(needles))


def _skipped(num_tokens: int, reason: str) -> Context:
    return Context(num_tokens, 0, torch.empty(0, dtype=torch.int64), (), reason)
