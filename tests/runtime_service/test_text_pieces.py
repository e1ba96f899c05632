"""Text that comes in pieces: never half a character, never a stop string, nothing lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer, byte_tokenizer_files
from runtime_service.detokenizer import Detokenizer, TokenBytes
from runtime_service.sample_text import SampleText
from runtime_service.stop_strings import StopAutomaton, StopScanner
from runtime_service.text import ModelText
from shared.errors import InvalidModel

BYTE_LEVEL = byte_tokenizer()
BYTE_LEVEL.add_tokens([AddedToken("<tool>", special=False), AddedToken("héé€", special=False)])


def sentencepiece_tokenizer() -> Tokenizer:
    """A tokenizer with byte fallback, as Llama 2's and Mistral's are."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ("▁", "▁the", "e", "é", "日本", "▁▁", "a"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


SENTENCEPIECE = sentencepiece_tokenizer()


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """The text of `token_ids`, fed in pieces of `sizes` tokens, the last as large as needed."""
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    texts, rest = [], token_ids
    for size in [*sizes, len(token_ids)]:
        texts.append(detokenizer.feed_all(rest[:size]))
        rest = rest[size:]
    return [*texts, detokenizer.flush()]


@given(text=st.text(), sizes=st.lists(st.integers(1, 5)))
def test_byte_level_pieces_add_up_to_the_text(text: str, sizes: list[int]) -> None:
    pieces = pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode(text).ids, sizes)
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@given(
    token_ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3)),
    sizes=st.lists(st.integers(1, 5)),
)
@settings(max_examples=300)
def test_any_byte_level_tokens_add_up_to_the_full_decode(
    token_ids: list[int], sizes: list[int]
) -> None:
    """Broken UTF-8, special tokens and unknown ids included."""
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces_of(BYTE_LEVEL, token_ids, sizes)) == expected


@given(text=st.text(alphabet="a e thé日本€🙂\n"), sizes=st.lists(st.integers(1, 4)))
def test_byte_fallback_pieces_add_up_to_the_full_decode(text: str, sizes: list[int]) -> None:
    token_ids = SENTENCEPIECE.encode("a" + text.replace(" ", "▁")).ids
    pieces = pieces_of(SENTENCEPIECE, token_ids, sizes)
    assert "".join(pieces) == SENTENCEPIECE.decode(token_ids)


def test_first_space_of_a_continuation_is_kept() -> None:
    """What is generated goes on after a prompt, so its first space is a real one."""
    detokenizer = Detokenizer(TokenBytes(SENTENCEPIECE))
    assert detokenizer.feed(SENTENCEPIECE.token_to_id("▁the")) == " the"


def test_no_half_character_is_shown() -> None:
    detokenizer = Detokenizer(TokenBytes(BYTE_LEVEL))
    token_ids = BYTE_LEVEL.encode("🙂").ids
    assert len(token_ids) == 4
    assert [detokenizer.feed(token_id) for token_id in token_ids] == ["", "", "", "🙂"]


def test_unknown_decoder_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InvalidModel, match="WordPiece"):
        TokenBytes(tokenizer)


def first_stop(text: str, stops: list[str]) -> tuple[str, str]:
    """By brute force: the text before the stop string that is complete first, and that string."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=6)


@given(pieces=st.lists(TEXTS), stops=STOPS)
@settings(max_examples=500)
def test_stop_string_ends_the_text_just_before_it(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(StopAutomaton(stops))
    shown, found = "", ""
    for piece in pieces:
        text, found = scanner.feed(piece)
        shown += text
        if found:
            break
    assert (shown + scanner.flush(), found) == first_stop("".join(pieces), stops)


@given(pieces=st.lists(TEXTS), stops=STOPS)
@settings(max_examples=300)
def test_only_what_may_become_a_stop_string_is_held_back(
    pieces: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(StopAutomaton(stops))
    shown = whole = ""
    for piece in pieces:
        text, found = scanner.feed(piece)
        shown, whole = shown + text, whole + piece
        if found:
            return
        held = whole[len(shown) :]
        assert whole.startswith(shown)
        assert not held or any(s.startswith(held) and s != held for s in stops)


@given(text=st.text(alphabet="ab\n€é ", max_size=30), min_new_tokens=st.integers(0, 20))
@settings(max_examples=300)
def test_stop_string_counts_only_from_the_least_tokens_on(text: str, min_new_tokens: int) -> None:
    token_ids = BYTE_LEVEL.encode(text).ids
    sample = SampleText(
        Detokenizer(TokenBytes(BYTE_LEVEL)), StopAutomaton(["b\n", "€"]), min_new_tokens
    )
    num_taken, found = sample.feed(token_ids)
    if found:
        assert num_taken >= min_new_tokens
        assert BYTE_LEVEL.decode(token_ids[:num_taken]) == sample.take() + found
    else:
        sample.flush()
        assert sample.take() == text
        assert num_taken == len(token_ids)


def test_resumed_sample_shows_what_was_held_back_elsewhere() -> None:
    """Whatever the first server held back when it died, the second one shows."""
    stops, token_bytes = StopAutomaton(["hello world"]), TokenBytes(BYTE_LEVEL)
    token_ids = BYTE_LEVEL.encode("I say hello €worm").ids
    for cut in range(len(token_ids) + 1):
        first = SampleText(Detokenizer(token_bytes), stops, 0)
        first.feed(token_ids[:cut])
        second = SampleText(Detokenizer(token_bytes), stops, 0)
        second.resume(token_ids[:cut])
        second.feed(token_ids[cut:])
        second.flush()
        assert first.take() + second.take() == "I say hello €worm"


def test_half_a_character_is_dropped_when_cancelled() -> None:
    sample = SampleText(Detokenizer(TokenBytes(BYTE_LEVEL)), StopAutomaton(["x!"]), 0)
    sample.feed(BYTE_LEVEL.encode("€x").ids + BYTE_LEVEL.encode("é").ids[:1])
    sample.flush(is_whole=False)
    assert sample.take() == "€x"


def test_end_tokens_come_from_every_file_that_names_them() -> None:
    files = byte_tokenizer_files() | {"config.json": b'{"eos_token_id": 7}'}
    assert ModelText(files).end_token_ids == (2, 7)


@pytest.mark.parametrize("found", ['"2"', "[2, null]", "{}"])
def test_end_token_that_is_no_number_is_the_models_fault(found: str) -> None:
    """Told when it is loaded, not as an unforeseen failure of every request."""
    files = byte_tokenizer_files() | {
        "generation_config.json": b'{"eos_token_id": %s}' % found.encode()
    }
    with pytest.raises(InvalidModel, match=r"generation_config.json says that eos_token_id is"):
        ModelText(files)


def test_chat_is_rendered_as_transformers_renders_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in byte_tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}\n"
        "  {% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ m | tojson }} {{ m.content | trim }}\n"
        "    {% generation %}{{ m['role'] }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}<go>{% endif %}{% if tools %}never{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [
        {"role": "system", "content": " <b>é</b> "},
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "hello\n"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert ModelText(files).encode_chat(messages, {}) == list(theirs["input_ids"])
