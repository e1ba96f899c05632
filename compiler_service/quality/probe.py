"""What a build measures with: texts in a row, the positions that count, and what follows each."""

from dataclasses import dataclass

import torch

from compiler_service.calibration.windows import TextTokenizer, TextWindows
from compiler_service.quality.needle import Haystack, hide_needles


@dataclass(frozen=True, slots=True)
class Probe:
    """Legend: R rows whose logits are wanted.

    Args:
        texts: token ids of the measured windows, then of the haystacks that have any.
        logit_rows: the windows' positions, then those that predict a needle's answer; packed.
        following_R: the next token of each row.
        num_measured: rows of the windows.
        haystacks: of the long-context probe, those that are skipped among them.
    """

    texts: tuple[torch.Tensor, ...]
    logit_rows: tuple[int, ...]
    following_R: torch.Tensor
    num_measured: int
    haystacks: tuple[Haystack, ...]

    def without_haystacks(self) -> "Probe":
        """What limits are held against, alone: the windows."""
        num_texts = len(self.texts) - sum(bool(h.needles) for h in self.haystacks)
        rows = self.num_measured
        return Probe(
            self.texts[:num_texts], self.logit_rows[:rows], self.following_R[:rows], rows, ()
        )


def make_probe(
    windows: TextWindows, tokenizer: TextTokenizer, max_positions: int, most_tokens: int
) -> Probe:
    """The probe over a text's held-out windows, and facts hidden in its beginning.

    Args:
        most_tokens: that haystacks may have together.
    """
    texts = [window.token_ids for window in windows.measured]
    following = [window.following for window in windows.measured]
    num_measured = sum(map(len, texts))
    rows = list(range(num_measured))
    haystacks = hide_needles(tokenizer, windows.haystack, max_positions, most_tokens)
    first = num_measured
    for haystack in haystacks:
        if haystack.needles:
            texts.append(haystack.token_ids)
        for needle in haystack.needles:
            rows += [first + row for row in needle.rows]
            following.append(torch.tensor(needle.answer))
        first += len(haystack.token_ids)
    return Probe(tuple(texts), tuple(rows), torch.cat(following), num_measured, haystacks)
