"""A text cut into windows of tokens: some to measure with, and others, never the same, to calibrate.

Windows lie evenly over the text, so that each share sees all of its kinds of prose. Everything is a
function of the text and the sizes: no randomness.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from shared.errors import InvalidField, InvalidModel

WINDOW_TOKENS = 256
MEASURED_WINDOWS = 2
DEFAULT_CALIBRATION_TOKENS = 4096
MIN_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of the text. `following` is each one's next token."""

    token_ids: torch.Tensor
    following: torch.Tensor


@dataclass(frozen=True, slots=True)
class TextWindows:
    """What a build looks at.

    Args:
        measured: held out: no scheme saw them.
        calibration: what schemes look at.
        haystack: tokens of the text's beginning, for the long-context probe.
    """

    measured: tuple[Window, ...]
    calibration: tuple[Window, ...]
    haystack: torch.Tensor


class TextTokenizer:
    """An engine's own tokenizer: text to ids, and what every sequence begins with.

    Args:
        vocab_size: how many tokens the model has an embedding of.
    """

    def __init__(self, files: Mapping[str, bytes], vocab_size: int) -> None:
        self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        self._vocab_size = vocab_size
        plain, full = self.ids("a"), self._tokenizer.encode("a").ids
        self.start = full[:1] if full[:1] != plain[:1] else []

    def ids(self, text: str) -> list[int]:
        """The tokens of `text`, no special ones added.

        Raises:
            InvalidModel: the model has no embedding of one.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= self._vocab_size:
            problem = (
                f"tokenizer.json makes token {max(ids)} of a text, and config.json's vocab_size"
            )
            raise InvalidModel(problem=f"{problem} is {self._vocab_size}")
        return ids


def cut_windows(
    documents: Sequence[str],
    tokenizer: TextTokenizer,
    max_positions: int,
    calibration_tokens: int,
    measured_windows: int = MEASURED_WINDOWS,
) -> TextWindows:
    """The windows of a text.

    Args:
        calibration_tokens: at most about so many to calibrate; 0 for a scheme that does not.
        measured_windows: at most so many to measure.

    Raises:
        InvalidField: the text is empty or too short.
        InvalidModel: the model has no positions for a text, or no embedding of its tokens.
    """
    tokens = [token for text in documents for token in tokenizer.ids(text)]
    # Two windows and the token after them, where one is measured and another calibrated with.
    needed = 2 * WINDOW_TOKENS + 1 if calibration_tokens else MIN_TOKENS
    if len(tokens) < needed:
        problem = f"the text has {len(tokens)} tokens, and at least {needed} are needed"
        raise InvalidField(field="calibration_uri", problem=problem)
    size = min(WINDOW_TOKENS, max_positions) - len(tokenizer.start)
    if size < 1:
        problem = f"max_position_embeddings is {max_positions}, which leaves a text no room"
        raise InvalidModel(problem=problem)
    # A window's last token is followed by the first of the next one; the last of all by nothing.
    count = max((len(tokens) - 1) // size, 1)
    size = min(size, len(tokens) - 1)
    windows = [
        _window(tokenizer.start, tokens[i * size : (i + 1) * size + 1]) for i in range(count)
    ]
    measured = _evenly(count, min(measured_windows, max(count // 2, 1)))
    rest = [index for index in range(count) if index not in measured]
    wanted = min(len(rest), -(-calibration_tokens // size))
    return TextWindows(
        tuple(windows[index] for index in measured),
        tuple(windows[rest[place]] for place in _evenly(len(rest), wanted)),
        torch.tensor(tokens),
    )


def _evenly(count: int, wanted: int) -> list[int]:
    """`wanted` different numbers below `count`, spread over all of it."""
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _window(start: list[int], tokens: list[int]) -> Window:
    ids = torch.tensor([*start, *tokens])
    return Window(ids[:-1], ids[1:])
