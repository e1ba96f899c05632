"""The long-context probe: facts hidden at several depths of a text, and asked for at its end.

All answers are teacher-forced in one pass: a fact counts as retrieved where every token of its
answer is the likeliest one. What the unquantized model cannot retrieve says nothing about
quantization, and is reported as not applicable.
"""

from dataclasses import dataclass

import torch

from compiler_service.calibration.windows import TextTokenizer

CONTEXT_TOKENS = 384
_MIN_CONTEXT_TOKENS = 256
_FACTS = ((0.1, "Lisbon", "7193"), (0.5, "Cairo", "4826"), (0.9, "Oslo", "3057"))


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact: how deep it lies, the rows that predict its answer, and the answer's tokens."""

    depth: float
    rows: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Haystack:
    """The text with its facts and questions."""

    token_ids: torch.Tensor
    needles: tuple[Needle, ...]


def hide_needles(
    tokenizer: TextTokenizer, text: torch.Tensor, max_positions: int
) -> Haystack | None:
    """The probe's text, made of the beginning of `text`; None where the model is too short for it."""
    pieces = [
        (depth, tokenizer.ids(f"\nThe secret code of {city} is"), tokenizer.ids(f" {code}"))
        for depth, city, code in _FACTS
    ]
    facts = 2 * sum(len(question) + len(answer) + 1 for _, question, answer in pieces)
    room = min(CONTEXT_TOKENS, max_positions) - facts - len(tokenizer.start)
    if room + facts < _MIN_CONTEXT_TOKENS or room < facts or len(text) < room:
        return None
    stop = tokenizer.ids(".")[:1]
    ids, used = list(tokenizer.start), 0
    for depth, question, answer in pieces:
        place = int(depth * room)
        ids += [*text[used:place].tolist(), *question, *answer, *stop]
        used = place
    ids += text[used:room].tolist()
    needles = []
    for depth, question, answer in pieces:
        ids += question
        rows = range(len(ids) - 1, len(ids) - 1 + len(answer))
        needles.append(Needle(depth, tuple(rows), tuple(answer)))
        ids += [*answer, *stop]
    return Haystack(torch.tensor(ids), tuple(needles))
