"""Tokens to text as they come: every token is some bytes, and whole characters become text.

What a token's bytes are is read from the tokenizer's own decoder, once per token. The text that
comes out piece by piece is the text of all tokens decoded at once; a run of byte-fallback tokens
that is not UTF-8 loses only its bad bytes here, where `tokenizers` gives up the whole run.
Knows nothing of stop strings.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

from shared.errors import InvalidModel

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# How one part of a tokenizer's decoder turns a token into bytes; None passes it to the next part.
_Step = Callable[[str], str | bytes]


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of one tokenizer, filled as tokens are seen; shared by all streams.

    Special tokens, and ids that the tokenizer does not know, have none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str())["decoder"]
        self._steps = [step for part in _parts(decoder) for step in _steps_of(part)]
        self._special = {
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        value: str | bytes = token or b""
        for step in self._steps:
            if isinstance(value, bytes):
                break
            value = step(value)
        self[token_id] = value = value if isinstance(value, bytes) else value.encode()
        return value

    def spelling(self, token_id: int) -> bytes:
        """The token's bytes; a special token's name, which is no part of any text."""
        if token_id in self._special:
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        return self[token_id]


class Detokenizer:
    """The text of one stream of tokens, never with half a character."""

    __slots__ = ("_decode", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decode = _utf8_decoder("replace").decode

    def feed(self, token_id: int) -> str:
        """The text that this token completes."""
        return self._decode(self._token_bytes[token_id])

    def feed_all(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        table = self._token_bytes
        return self._decode(b"".join([table[token_id] for token_id in token_ids]))

    def spelling(self, token_id: int) -> bytes:
        """How the token is shown by itself; see `TokenBytes`."""
        return self._token_bytes.spelling(token_id)

    def flush(self) -> str:
        """The replacement for an unfinished character, if there is one; the stream has ended."""
        return self._decode(b"", True)


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise InvalidModel(problem="its tokenizer has no decoder")
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _parts(inner)]
    return [decoder]


def _steps_of(part: dict[str, Any]) -> list[_Step]:
    kind = part["type"]
    if kind == "ByteLevel":
        return [_byte_level]
    if kind == "ByteFallback":
        return [_byte_fallback]
    if kind == "Metaspace":
        return [_replace(part["replacement"], " ")]
    if kind == "Replace" and "String" in part["pattern"]:
        return [_replace(part["pattern"]["String"], part["content"])]
    # Joining is what we do anyway; stripping concerns the start of a text, and what is generated
    # goes on after a prompt: its first space is a real one.
    if kind == "Fuse" or (kind == "Strip" and part["stop"] == 0):
        return []
    raise InvalidModel(problem=f"its tokenizer's decoder {kind!r} is not supported")


def _replace(old: str, new: str) -> _Step:
    return lambda token: token.replace(old, new)


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _byte_level(token: str) -> bytes:
    # An added token is not spelled in the byte alphabet: it stands for itself.
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters. Source: Radford et al. 2019, encoder.py"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(rest)})
    return alphabet


_BYTE_OF = _byte_alphabet()
