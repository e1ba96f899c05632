"""What a build measures with: texts in a row, the positions that count, and what follows each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compiler_service.calibration.windows import TextTokenizer, TextWindows
from compiler_service.quality.needle import Context, hide_needles


@dataclass(frozen=True, slots=True)
class Probe:
    """Legend: R rows whose logits are wanted.

    Args:
        texts: token ids of the measured windows, of the haystack, and of what is asked behind it.
        going_on: by text, an earlier one and how many of its first tokens come before it.
        logit_rows: the windows' positions, then those that predict a needle's answer; packed.
        following_R: the next token of each row.
        num_measured: rows of the windows.
        contexts: of the long-context probe, those that are skipped among them.
    """

    texts: tuple[torch.Tensor, ...]
    going_on: Mapping[int, tuple[int, int]]
    logit_rows: tuple[int, ...]
    following_R: torch.Tensor
    num_measured: int
    contexts: tuple[Context, ...]

    def windows_alone(self) -> "Probe":
        """What limits are held against, without the long-context probe."""
        rows, texts = self.num_measured, self.texts
        if self.going_on:
            texts = texts[: min(haystack for haystack, _ in self.going_on.values())]
        return Probe(texts, {}, self.logit_rows[:rows], self.following_R[:rows], rows, ())


def make_probe(
    windows: TextWindows,
    tokenizer: TextTokenizer,
    probe_tokens: int,
    max_positions: int,
    most_tokens: int,
) -> Probe:
    """The probe over a text's held-out windows, and facts hidden in its beginning.

    Args:
        probe_tokens, max_positions, most_tokens: as in `hide_needles`.
    """
    texts = [window.token_ids for window in windows.measured]
    following = [window.following for window in windows.measured]
    num_measured = sum(map(len, texts))
    rows = list(range(num_measured))
    hay, contexts = hide_needles(
        tokenizer, windows.haystack, probe_tokens, max_positions, most_tokens
    )
    going_on: dict[int, tuple[int, int]] = {}
    if len(hay):
        texts.append(hay)
    haystack, first = len(texts) - 1, num_measured + len(hay)
    for context in contexts:
        if context.needles:
            going_on[len(texts)] = (haystack, context.hay_tokens)
            texts.append(context.asked)
        for needle in context.needles:
            rows += [first + row for row in needle.rows]
            following.append(torch.tensor(needle.answer))
        first += len(context.asked)
    return Probe(tuple(texts), going_on, tuple(rows), torch.cat(following), num_measured, contexts)
