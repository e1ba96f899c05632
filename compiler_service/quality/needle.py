"""The long-context probe: facts hidden at several depths of texts of several lengths, and asked for
at their ends.

All answers of a text are teacher-forced in one pass: a fact counts as retrieved where every token of
its answer is the likeliest one. What the unquantized model cannot retrieve says nothing about
quantization, and is not scored. Which lengths are tried depends on sizes alone: on the model's positions, and
on how much a build may hold and compute.
"""

from dataclasses import dataclass

import torch

from compiler_service.calibration.windows import TextTokenizer
from shared.ir import Graph

CONTEXT_TOKENS = (256, 512, 1024, 2048, 4096)
# All contexts together: so much is computed for them in every build, by both graphs.
_MOST_TOKENS = 4096
# And so many bytes of activations they may add to what a build holds.
_MOST_BYTES = 512 << 20
_FACTS = (
    (0.1, "Lisbon", "7193"),
    (0.3, "Vienna", "2658"),
    (0.5, "Cairo", "4826"),
    (0.7, "Toronto", "9374"),
    (0.9, "Oslo", "3057"),
)


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact: how deep it lies, the rows that predict its answer, and the answer's tokens."""

    depth: float
    rows: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text with its facts and questions; of another length, why there is none.

    Args:
        num_tokens: of the context.
        skipped: why nothing is asked at this length; empty where something is.
    """

    num_tokens: int
    token_ids: torch.Tensor
    needles: tuple[Needle, ...]
    skipped: str = ""


def most_tokens(graph: Graph) -> int:
    """How many tokens of haystacks a build can hold: both runs' widest node, inputs and outputs in
    fp32, and the residual streams beside them."""
    widths = [
        sum(graph.weights[node.weights["weight"]].shape)
        for node in graph.nodes
        if node.op == "linear" and node.outputs[0] not in graph.outputs
    ]
    hidden = int(str(graph.config["hidden_size"]))
    return _MOST_BYTES // (2 * 4 * (max(widths, default=0) + hidden))


def hide_needles(
    tokenizer: TextTokenizer, text: torch.Tensor, max_positions: int, most_tokens: int
) -> tuple[Haystack, ...]:
    """A haystack for each length, the shortest first, up to the first that is too long.

    Args:
        text: token ids of what facts are hidden in, not empty; repeated where it is too short.
        most_tokens: that all of them may have together.
    """
    haystacks: list[Haystack] = []
    spent = 0
    for length in CONTEXT_TOKENS:
        skipped = ""
        if length > max_positions:
            skipped = f"the model has {max_positions} positions"
        elif spent + length > most_tokens:
            skipped = f"would take more than {_MOST_BYTES >> 20} MiB of memory"
        elif spent + length > _MOST_TOKENS:
            skipped = f"a build probes {_MOST_TOKENS} tokens in all"
        if skipped:
            haystacks.append(_skipped(length, skipped))
            break
        haystacks.append(_haystack(tokenizer, text, length))
        spent += len(haystacks[-1].token_ids)
    return tuple(haystacks)


def _skipped(num_tokens: int, reason: str) -> Haystack:
    return Haystack(num_tokens, torch.empty(0, dtype=torch.int64), (), reason)


def _haystack(tokenizer: TextTokenizer, text: torch.Tensor, num_tokens: int) -> Haystack:
    pieces = [
        (depth, tokenizer.ids(f"\nThe secret code of {city} is"), tokenizer.ids(f" {code}"))
        for depth, city, code in _FACTS
    ]
    stop = tokenizer.ids(".")[:1]
    facts = 2 * sum(len(question) + len(answer) + len(stop) for _, question, answer in pieces)
    room = num_tokens - facts - len(tokenizer.start)
    if room < facts // 2:
        return _skipped(num_tokens, f"the facts and questions alone have {facts} tokens")
    hay = text.repeat(-(-room // len(text))).tolist()
    ids, used = list(tokenizer.start), 0
    for depth, question, answer in pieces:
        place = int(depth * room)
        ids += [*hay[used:place], *question, *answer, *stop]
        used = place
    ids += hay[used:room]
    needles = []
    for depth, question, answer in pieces:
        ids += question
        rows = range(len(ids) - 1, len(ids) - 1 + len(answer))
        needles.append(Needle(depth, tuple(rows), tuple(answer)))
        ids += [*answer, *stop]
    return Haystack(num_tokens, torch.tensor(ids), tuple(needles))
