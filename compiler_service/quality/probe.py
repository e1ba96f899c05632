"""What a build measures with: texts in a row, the positions that count, and what follows each."""

from dataclasses import dataclass

import torch

from compiler_service.calibration.windows import TextTokenizer, TextWindows
from compiler_service.quality.needle import Haystack, hide_needles


@dataclass(frozen=True, slots=True)
class Probe:
    """Legend: R rows whose logits are wanted.

    Args:
        texts: token ids of the measured windows, then the haystack where there is one.
        logit_rows: the windows' positions, then those that predict a needle's answer; packed.
        following_R: the next token of each row.
        num_measured: rows of the windows.
        haystack: None where the model's context is too short for the long-context probe.
    """

    texts: tuple[torch.Tensor, ...]
    logit_rows: tuple[int, ...]
    following_R: torch.Tensor
    num_measured: int
    haystack: Haystack | None


def make_probe(windows: TextWindows, tokenizer: TextTokenizer, max_positions: int) -> Probe:
    """The probe over a text's held-out windows."""
    texts = [window.token_ids for window in windows.measured]
    following = [window.following for window in windows.measured]
    num_measured = sum(map(len, texts))
    rows = list(range(num_measured))
    haystack = hide_needles(tokenizer, windows.haystack, max_positions)
    if haystack is not None:
        texts.append(haystack.token_ids)
        for needle in haystack.needles:
            rows += [num_measured + row for row in needle.rows]
            following.append(torch.tensor(needle.answer))
    return Probe(tuple(texts), tuple(rows), torch.cat(following), num_measured, haystack)
