"""The text of one sample as its client may see it: whole characters, and no stop strings."""

from collections.abc import Sequence

from runtime_service.detokenizer import Detokenizer
from runtime_service.stop_strings import StopAutomaton, StopScanner


class SampleText:
    """Grows with a sample's tokens; `take` gives what may be shown by now.

    Args:
        stops: None where there are no stop strings.
        min_new_tokens: stop strings that are complete before this many tokens pass as text.
    """

    __slots__ = ("_detokenizer", "_min_new_tokens", "_num_tokens", "_ready", "_scanner")

    def __init__(
        self, detokenizer: Detokenizer, stops: StopAutomaton | None, min_new_tokens: int
    ) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops) if stops is not None else None
        self._min_new_tokens = min_new_tokens
        self._num_tokens = 0
        self._ready: list[str] = []

    @property
    def is_ready(self) -> bool:
        """Claims that `take` gives something."""
        return bool(self._ready)

    def feed(self, token_ids: Sequence[int], ends_with_end_token: bool = False) -> tuple[int, str]:
        """How many of the tokens count, and the stop string that they ran into or "".

        Tokens after the one that completed a stop string do not count.

        Args:
            ends_with_end_token: the last token ends the sample; its own text is not shown.
        """
        shown = token_ids[:-1] if ends_with_end_token else token_ids
        if self._scanner is None:
            text = self._detokenizer.feed_all(shown)
            if text:
                self._ready.append(text)
            return len(token_ids), ""
        for place, token_id in enumerate(shown, start=1):
            self._num_tokens += 1
            text, found = self._scanner.feed(
                self._detokenizer.feed(token_id),
                can_stop=self._num_tokens >= self._min_new_tokens,
            )
            if text:
                self._ready.append(text)
            if found:
                return place, found
        return len(token_ids), ""

    def resume(self, token_ids: Sequence[int]) -> str:
        """Goes on after tokens whose text was sent from elsewhere; the stop string in it or ""."""
        _, found = self.feed(token_ids)
        self._ready.clear()
        return found

    def flush(self, *, is_whole: bool = True) -> None:
        """Readies what was held back: the sample has ended.

        Args:
            is_whole: its tokens are all there will be; else half a character is dropped.
        """
        rest = self._detokenizer.flush() if is_whole else ""
        if self._scanner is not None:
            # The replacement character of a broken end may not complete a stop string.
            rest = "".join(self._scanner.feed(rest, can_stop=False)) + self._scanner.flush()
        if rest:
            self._ready.append(rest)

    def spelling(self, token_id: int) -> bytes:
        """How a token of it, or one that could have been, is shown by itself."""
        return self._detokenizer.spelling(token_id)

    def take(self) -> str:
        """What may be shown and was not taken yet."""
        text = "".join(self._ready)
        self._ready.clear()
        return text
