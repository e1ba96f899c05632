"""Finds stop strings in text that comes in pieces, and holds back what may become one.

One automaton walks all of a request's stop strings at once: its state is the longest end of the
text so far that begins a stop string, so holding back and matching are one thing and cost one
lookup a character, however the text is cut. Source: Aho and Corasick 1975.
"""

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """The stop strings of a request, ready to be searched; shared by its samples.

    States are numbers, 0 is the start.

    Args:
        strings: at least one, none empty.
    """

    __slots__ = ("held", "matched", "transitions")

    def __init__(self, strings: Sequence[str]) -> None:
        self.transitions: list[dict[str, int]] = [{}]
        # By state: the longest stop string that ends here, and how many characters may still
        # become one.
        self.matched: list[str] = [""]
        self.held: list[int] = [0]
        for string in strings:
            self._add(string)
        self._link()

    def _add(self, string: str) -> None:
        state = 0
        for depth, char in enumerate(string, start=1):
            following = self.transitions[state].get(char)
            if following is None:
                following = len(self.transitions)
                self.transitions[state][char] = following
                self.transitions.append({})
                self.matched.append("")
                self.held.append(depth)
            state = following
        self.matched[state] = string

    def _link(self) -> None:
        """Adds to each state what its longest proper end knows: transitions and matches."""
        queue = deque((state, 0) for state in self.transitions[0].values())
        while queue:
            state, fallback = queue.popleft()
            own = self.transitions[state]
            queue.extend((s, self.transitions[fallback].get(c, 0)) for c, s in own.items())
            if not own:
                self.held[state] = self.held[fallback]
            self.transitions[state] = {**self.transitions[fallback], **own}
            self.matched[state] = self.matched[state] or self.matched[fallback]


class StopScanner:
    """One text, searched as it grows."""

    __slots__ = ("_automaton", "_held", "_state")

    def __init__(self, automaton: StopAutomaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._held = ""

    def feed(self, text: str, *, can_stop: bool = True) -> tuple[str, str]:
        """The text that is safe to show, and the stop string that the text ran into or "".

        The first stop string to be complete wins, the longest of those that end there; what comes
        after it is dropped, and the scanner is done.

        Args:
            can_stop: false lets stop strings that end in this piece pass as text.
        """
        automaton, state = self._automaton, self._state
        transitions, matched = automaton.transitions, automaton.matched
        for place, char in enumerate(text, start=1):
            state = transitions[state].get(char, 0)
            if matched[state] and can_stop:
                whole, self._held = self._held + text[:place], ""
                return whole[: -len(matched[state])], matched[state]
        self._state = state
        whole = self._held + text
        num_safe = len(whole) - automaton.held[state]
        self._held = whole[num_safe:]
        return whole[:num_safe], ""

    def flush(self) -> str:
        """The text held back; it will not become a stop string any more."""
        held, self._held = self._held, ""
        return held
